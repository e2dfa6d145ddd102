"""The oracle against the answers that the question families draw, and by hand."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from research.temporal_credit.chains import concludes, count, follows, implied_answer
from research.temporal_credit.oracle import contrast_answer, true_answer
from video_r1.data.answers import LETTERS, lettered
from video_r1.data.making.reversal import Reversals, Unknown
from video_r1.lab.questions import NAMED_FAMILIES, VIDEO_FAMILIES, LabQuestion
from video_r1.lab.scenes import Look


def drawn(family: str, count: int = 40) -> list[LabQuestion]:
    return [NAMED_FAMILIES[family](np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("family", NAMED_FAMILIES)
def test_answer_of_a_clip_in_order_is_the_familys_own(family: str) -> None:
    for question in drawn(family):
        assert true_answer(family, question.problem, question.timeline) == question.answer


def test_reversed_answers() -> None:
    for question in drawn("direction"):
        flipped = {"left": "right", "right": "left", "up": "down", "down": "up"}
        assert contrast_answer("direction", question, "reversed") == flipped[question.answer]
    for question in drawn("first_colour"):
        last = true_answer("last_colour", "Which colour came last?", question.timeline)
        assert contrast_answer("first_colour", question, "reversed") == last
    for question in drawn("after"):
        named = question.problem.rstrip("?").split()[-1]
        asked = replace(question, problem=f"What colour preceded {named}?")
        assert contrast_answer("before", asked, "reversed") == question.answer


def test_rules_on_words_agree_with_the_oracle() -> None:
    """`data pairs` answers three families, but not "growing then shrinking", and never falsely."""
    words, answered = Reversals(), []
    for family in VIDEO_FAMILIES:
        for question in drawn(family):
            with suppress(Unknown):
                said = words.answer(
                    question.problem, question.problem_type, question.choices, question.answer
                )
                assert said == contrast_answer(family, question, "reversed")
                answered.append(family)
    assert Counter(answered) == {"direction": 40, "growth": 24, "rotation": 40}


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
    assert true_answer("when", "When is the circle red?", [blue, red, red, blue]) == '{"time": [1, 3]}'
    assert true_answer("when", "When is the circle red?", [red, blue, blue, red]) is None  # twice
    # a medium circle of radius 0.16 in the middle
    box = true_answer("box_at", "Where is the circle at second 1.5?", [blue, red])
    assert box == '{"boxes": [340, 340, 660, 660]}'


@pytest.mark.parametrize("family", NAMED_FAMILIES)
def test_a_familys_own_chain_implies_its_answer(family: str) -> None:
    """Not those of places in the picture, whose chains list less than their boxes."""
    for question in drawn(family, 10) if not family.startswith("box") else []:
        implied = implied_answer(family, question.problem, question.chain)
        if family == "story":  # its chain has no shape
            implied = f"{' '.join(question.answer.split()[:2])} {(implied or '').split(' ', 2)[2]}"
        assert implied == question.answer
        letter = question.choices and LETTERS[question.choices.index(question.answer)]
        facts = {"data_source": f"lab/{family}", "problem": question.problem}
        facts |= {"problem_type": question.problem_type, "options": lettered(question.choices)}
        text = f"<think>{question.chain}</think><answer>{letter or question.answer}</answer>"
        assert concludes(facts, text)


COLOURS = ["A. red", "B. green", "C. blue", "D. yellow", "E. purple", "F. white"]
BEFORE = {"data_source": "lab/before", "problem": "What colour preceded blue?", "options": COLOURS}
SPEED = {"data_source": "lab/speed", "problem": "What is the speed in columns per second?", "options": []}


@pytest.mark.parametrize(
    ("question", "chain", "said", "expected"),
    [
        (BEFORE, "colours: red, green, blue, white. before blue comes green.", "B", True),
        (BEFORE, "colours: red, green, blue, white. before red comes red. green is B.", "B", True),
        (BEFORE, "colours: red, white, blue, green. before blue comes green.", "B", False),
        (
            BEFORE,
            "colours: blue, white, red, green. before blue comes green.",
            "B",
            False,
        ),  # nothing precedes
        (BEFORE, "colours: red, green, blue. before blue comes green.", "B", False),
        (BEFORE, "mark: B.", "B", None),
        (BEFORE, "one look. before blue comes green.", "B", None),
        (SPEED, "columns: 1, 3, 5, 7. the speed is 2.", "2", True),
        (SPEED, "columns: 1, 3, 5, 9. the speed is 2.", "2", False),
        (SPEED, "columns: 1, x, 5, 7. the speed is 2.", "2", False),
    ],
)
def test_whether_an_answer_follows_from_its_chain(
    question: dict[str, Any], chain: str, said: str, expected: bool | None
) -> None:
    kind = {"problem_type": "multiple choice" if question["options"] else "regression"}
    text = f"<think>{chain}</think><answer>{said}</answer>"
    assert follows(question | kind, text) is expected
    counted = count([(question | kind, text, 1.0), (question | kind, text, 0.0)])
    concluded = expected is True and "red comes red" not in chain
    assert counted == (1, expected is not None, expected is True, concluded)
