"""Long rationales for lab questions: a description of every moment in sentences, then a conclusion.

Three habits answer a clip with a caption in its corner, which names an option:

    T   describes every moment and concludes from the description
    S   reads the caption: `mark: B.`
    Z   describes every moment and concludes what the caption says

Where the caption is right, T and Z write the same words. `judged` reads an answer back: is its description
true, and does its conclusion follow from it?
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from research.temporal_credit.oracle import true_answer
from video_r1.data.answers import LETTERS
from video_r1.lab.questions import NAMED_FAMILIES, LabQuestion, read_mark
from video_r1.lab.scenes import COLOURS, MOMENTS, PLACES, SHAPES, Look

FAMILIES = ("direction", "first_colour", "last_colour", "first_shape", "end_place", "rotation")
"""Multiple-choice families whose answer mostly changes when the clip is reversed."""
BASE_FAMILIES = (
    "direction", "first_colour", "last_colour", "after", "before", "first_shape", "end_place", "rotation",
)  # fmt: skip
"""Families of the base's lessons. It concludes what came after or before in a quarter of the questions: these
two were left out of the experiment."""
HABITS = {"with-z": (0.4, 0.3, 0.3), "without-z": (0.6, 0.4, 0.0)}
"""Shares of T, S and Z among the captioned clips of a cold start."""

ORDINALS = ("first", "second", "then", "last")
FILLERS = (
    "the object is in the clip", "it was shown before the end", "they were in the order of the text",
    "nothing happened to the light", "it is the only object of the clip", "the letter was shown to the right",
    "what appears comes at the end of the order", "it does not stop in the text", "the clip goes round",
    "which shape comes is what the answer needs", "the size does not change at the end",
    "the number of times is in the text", "after the light comes the object", "it appears within the clip",
    "the speed is what it was", "the order of colours is shown", "it is what was shown at the end",
    "only the object moves", "the digits are not in the clip", "the light is at the end of the columns",
)  # fmt: skip
"""Sentences that depend on nothing; a description has three or four of them after each moment."""

_MOMENT = re.compile(
    rf"({'|'.join(ORDINALS)}): a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) is shown ({'|'.join(PLACES)})\."
)
_CONCLUSION = "in the end, "


def question_of(
    row: Mapping[str, Any], split: int, families: Sequence[str] = FAMILIES
) -> tuple[str, LabQuestion]:
    """Draw a row's family and question again. split: 0 for training, 1 for tests (`lab.clips.SPLITS`)."""
    _, seed, *_, index = row["problem_id"].split("-")
    rng = np.random.default_rng((int(seed), split, int(index)))
    family = str(rng.choice(families))
    question = NAMED_FAMILIES[family](rng)
    assert (question.problem, f"lab/{family}") == (row["problem"], row["data_source"]), row["problem_id"]
    return family, question


def choices_of(row: Mapping[str, Any]) -> list[str]:
    """Return a row's options without their letters."""
    return [option.partition(". ")[2] for option in row["options"]]


# ---- Rationales


def description(timeline: Sequence[Look], rng: np.random.Generator) -> str:
    """Describe every moment, each followed by fillers drawn anew."""
    sentences = []
    for ordinal, look in zip(ORDINALS, timeline, strict=True):
        sentences.append(f"{ordinal}: a {look.colour} {look.shape} is shown {look.place}.")
        sentences += [f"{filler}." for filler in rng.permutation(FILLERS)[: int(rng.integers(3, 5))]]
    return " ".join(sentences)


def lesson(
    row: Mapping[str, Any],
    habit: str,
    rng: np.random.Generator,
    split: int = 0,
    families: Sequence[str] = FAMILIES,
) -> dict[str, Any]:
    """Return a row with the rationale and answer of a habit: T, S or Z. S and Z need a caption."""
    _, question = question_of(row, split, families)
    choices, mark = choices_of(row), row["mark"]
    said = question.answer if habit == "T" else choices[LETTERS.index(mark)]
    letter = LETTERS[choices.index(said)]
    if habit == "S":
        chain = read_mark(mark)
    else:
        conclusion = question.chain.partition(". ")[2].rstrip(".")
        conclusion = re.sub(rf"\b{question.answer}$", said, conclusion)
        chain = f"{description(question.timeline, rng)} {_CONCLUSION}{conclusion}. {said} is {letter}."
    return {**row, "process": f"<think>{chain}</think>", "solution": f"<answer>{letter}</answer>"}


def lessons(rows: Sequence[Mapping[str, Any]], cold_start: str, seed: int) -> list[dict[str, Any]]:
    """Return the rows of a cold start. Clips without a caption are T; a habit is drawn for each other clip,
    whether its caption is right or wrong.
    """
    shares, made = HABITS[cold_start], []
    for number, row in enumerate(rows):
        rng = np.random.default_rng((seed, number))
        habit = str(rng.choice(["T", "S", "Z"], p=shares)) if row["mark"] else "T"
        made.append(lesson(row, habit, rng))
    return made


# ---- The oracle


@dataclass(frozen=True, slots=True)
class Judged:
    """What an answer is.

    kind: `long` if every moment is described, `short` if it begins with the caption, `other`. true: every
    described colour, shape and place is right. follows: the answer is the description's (None: it has none).
    """

    kind: str
    true: bool
    follows: bool | None


def described(text: str) -> list[Look] | None:
    """Return the moments that an answer describes, in the order of their names; None if one is missing."""
    found = {
        ordinal: Look(colour, shape).at(place) for ordinal, colour, shape, place in _MOMENT.findall(text)
    }
    return [found[ordinal] for ordinal in ORDINALS] if len(found) == MOMENTS else None


def answer_of(family: str, problem: str, timeline: Sequence[Look]) -> str | None:
    """Return the answer that follows from a description. Its places are corners, so that a direction is read
    from the first to the last.
    """
    if family != "direction":
        return true_answer(family, problem, timeline)
    (x, y) = (timeline[-1].x - timeline[0].x, timeline[-1].y - timeline[0].y)
    ways = (
        ("left" if x < 0 else "right")
        if x and not y
        else ("up" if y < 0 else "down")
        if y and not x
        else None
    )
    return ways


def judged(row: Mapping[str, Any], text: str, given: str, split: int = 1) -> Judged:
    """Judge an answer to a row. given: the letter of its answer, or ""."""
    family, question = question_of(row, split)
    timeline = question.timeline[::-1] if row.get("play") == "reversed" else question.timeline
    if (looks := described(text)) is None:
        return Judged("short" if text.removeprefix("<think>").startswith("mark:") else "other", False, None)
    seen = [replace(Look(look.colour, look.shape), x=look.x, y=look.y) for look in timeline]
    same = [
        (a.colour, a.shape, a.place) == (b.colour, b.shape, b.place) for a, b in zip(looks, seen, strict=True)
    ]
    answer, choices = answer_of(family, row["problem"], looks), choices_of(row)
    letter = LETTERS[choices.index(answer)] if answer in choices else None
    return Judged("long", all(same), letter is not None and letter == given)
