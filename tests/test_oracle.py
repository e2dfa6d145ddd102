"""The oracle of the lab: answers read off timelines against those that the families drew, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from video_r1.lab.oracle import contrast_answer, true_answer
from video_r1.lab.questions import NAMED_FAMILIES, VIDEO_FAMILIES, Question
from video_r1.lab.scenes import COLOURS, MOMENTS, Look


def drawn(family: str, count: int = 60) -> list[Question]:
    return [NAMED_FAMILIES[family](np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("family", NAMED_FAMILIES)
def test_the_answer_of_a_clip_in_order_is_the_familys_own(family: str) -> None:
    for question in drawn(family):
        assert true_answer(family, question.problem, question.timeline) == question.answer


FLIPPED = {
    "direction": {"left": "right", "right": "left", "up": "down", "down": "up"},
    "rotation": {"clockwise": "counterclockwise", "counterclockwise": "clockwise"},
    "growth": {
        "growing": "shrinking",
        "shrinking": "growing",
        "growing then shrinking": "growing then shrinking",
        "shrinking then growing": "shrinking then growing",
    },
}


@pytest.mark.parametrize("family", FLIPPED)
def test_reversed_answers_flip(family: str) -> None:
    questions = drawn(family)
    assert {question.answer for question in questions} == FLIPPED[family].keys()
    for question in questions:
        assert contrast_answer(family, question, "reversed") == FLIPPED[family][question.answer]


def test_reversed_answers_are_those_of_the_other_end() -> None:
    for question in drawn("first_colour"):
        last = true_answer("last_colour", "Which colour came last?", question.timeline)
        assert contrast_answer("first_colour", question, "reversed") == last
        assert contrast_answer("last_colour", question, "reversed") == question.answer
    for question in drawn("first_shape"):
        assert contrast_answer("first_shape", question, "reversed") == question.timeline[-1].shape
    for question in drawn("end_place"):
        assert contrast_answer("end_place", question, "reversed") == question.timeline[0].place
    for question in drawn("digits"):
        assert contrast_answer("digits", question, "reversed") == question.answer[::-1]
    for question in drawn("story"):
        head, _, colours = question.answer.partition(" was ")
        turned = ", then ".join(reversed(colours.split(", then ")))
        assert contrast_answer("story", question, "reversed") == f"{head} was {turned}"


def test_after_and_before_change_places() -> None:
    """What came right after a colour comes right before it in reverse; beyond an end there is nothing."""
    ends = 0
    for question in drawn("after"):
        named = question.problem.rstrip("?").split()[-1]
        asked = replace(question, problem=f"What colour preceded {named}?")
        assert contrast_answer("before", asked, "reversed") == question.answer
        turned = contrast_answer("after", question, "reversed")
        assert turned == true_answer("before", asked.problem, question.timeline)
        ends += turned is None
    assert 0 < ends < 60


def test_counts_of_a_reversed_clip() -> None:
    for question in drawn("count_before"):
        assert contrast_answer("count_before", question, "reversed") == str(
            MOMENTS - 1 - int(question.answer)
        )
    for family in ("blinks", "speed"):  # a timeline reads the same from both ends
        for question in drawn(family):
            assert contrast_answer(family, question, "reversed") == question.answer


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_frozen_answers(family: str) -> None:
    """Nothing moves, grows, comes before or after; what is seen throughout is first and last."""
    for moment in range(MOMENTS):
        for question in drawn(family, 20):
            look, found = question.timeline[moment], contrast_answer(family, question, "frozen", moment)
            named = question.problem.rstrip("?").split()[-1]
            expected = {
                "first_colour": look.colour,
                "last_colour": look.colour,
                "first_shape": look.shape,
                "end_place": look.place,
                "count_before": "0" if look.colour == named else None,
                "blinks": "1" if look.shape else "0",
                "digits": " ".join([look.shape] * MOMENTS),
                "speed": "0",
                "story": f"the {look.shape} was {look.colour}",
            }
            assert found == expected.get(family)


def test_when_and_where_by_hand() -> None:
    red, blue = Look("red"), Look("blue", size="large").at("bottom left")
    question = "When is the circle red?"
    assert true_answer("when", question, [blue, red, red, blue]) == '{"time": [1, 3]}'
    assert true_answer("when", question, [red, blue, blue, red]) is None  # twice
    assert true_answer("when", question, [blue] * 4) is None
    # a medium circle of 0.16 in the middle, a large one of 0.23 at (0.27, 0.73)
    assert (
        true_answer("box_at", "Where is the circle at second 1.5?", [blue, red])
        == '{"boxes": [340, 340, 660, 660]}'
    )
    assert (
        true_answer("box_at_end", "Where does the object stop?", [red, blue])
        == '{"boxes": [40, 500, 500, 960]}'
    )


def test_by_hand() -> None:
    red, blue, green = (Look(colour) for colour in ("red", "blue", "green"))
    assert true_answer("after", "What colour followed red?", [blue, red, red, green]) == "green"
    assert true_answer("after", "What colour followed green?", [blue, red, red, green]) is None
    assert true_answer("before", "What colour preceded white?", [blue, red, red, green]) is None
    assert true_answer("count_before", "How many colours came before green?", [red, red, blue, green]) == "2"
    assert true_answer("direction", "Which way?", [Look(x=x) for x in (0.2, 0.4, 0.3, 0.8)]) is None
    corners = [Look().at(place) for place in ("top left", "bottom right", "top right", "bottom left")]
    assert true_answer("rotation", "Which way round does it go?", corners) is None
    assert true_answer("speed", "What is the speed?", [Look(x=x) for x in (0.05, 0.15, 0.45, 0.55)]) is None
    assert set(COLOURS) >= {"red", "blue", "green"}
