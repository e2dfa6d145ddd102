"""The rules that a teacher's rationale has to pass: tables of what passes and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_r1.annotation import filters
from video_r1.annotation.filters import FILTERS, judge, judge_one
from video_r1.chat_client import Completion
from video_r1.data.manifests.records import Sample
from video_r1.settings.decoding import AnnotateSettings

OPTIONS = ("A. left", "B. right", "C. up")
RATIONALE = (
    "At first the ball is near the left edge of the frame. Two seconds later it has reached the middle, and "
    "in the last frames it stands at the right edge. So the ball moves to the right."
)


def sample(problem_type: Any = "multiple choice", truth: str = "B", **fields: Any) -> Sample:
    options = OPTIONS if problem_type == "multiple choice" else ()
    base = Sample(1, "Which way does the ball move?", "video", "free-form", f"<answer>{truth}</answer>", "x")
    return replace(base, problem_type=problem_type, **{"options": options, **fields})


def output(answer: str = "B", rationale: str = RATIONALE) -> str:
    return f"<think>{rationale}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize("text", [
    "<think>I don't have access to the video, so I guess.</think><answer>A</answer>",
    "<think>I can't see the image you mean.</think><answer>A</answer>",
    "<think>Since no video was provided, I assume a ball.</think><answer>A</answer>",
    "<think>I am not able to view videos, so A.</think><answer>A</answer>",
])  # fmt: skip
def test_refusals(text: str) -> None:
    assert filters.refusal(text) is not None and filters.refusal("", "content_filter") is not None


@pytest.mark.parametrize("text", [
    output(),
    output(rationale="I can't see the image clearly in the first second, later it is sharp."),
    "",
])  # fmt: skip
def test_what_is_no_refusal(text: str) -> None:
    assert filters.refusal(text) is None


@pytest.mark.parametrize(("text", "passes"), [
    (output(), True),
    ("<think>a</think><answer>b</answer>", True),
    ("", False),
    ("<answer>B</answer>", False),
    ("<think>a</think><answer>B</answer> Done.", False),
    ("<think> </think><answer>B</answer>", False),
    ("<think>a</think><answer> </answer>", False),
])  # fmt: skip
def test_tags(text: str, passes: bool) -> None:
    assert (filters.tags(text) is None) is passes


def test_length_bounds_are_included() -> None:
    texts = [output(rationale=" ".join(f"word{n}" for n in range(count))) for count in (4, 5, 9, 10)]
    rules = AnnotateSettings(length_range=[5, 9])
    judged = [judge_one(sample(), Completion(text, "stop"), rules).rejected for text in texts]
    assert judged == ["length", "", "", "length"]


@pytest.mark.parametrize(("rationale", "references", "passes"), [
    (RATIONALE, ["Which way?", "B"], True),
    ("球从左往右移动，所以答案是右。", ["Which way?", "B"], False),
    (RATIONALE + " 所以答案是右边的那一个。", ["Which way?"], False),  # a switch in the middle
    (RATIONALE + " 右", ["Which way?"], True),  # one stray character
    ("The sign reads 出口, that is exit.", ["What does the sign say?", "出口"], True),  # the answer has them
    ("ボールは右に動く。", ["球は右?", "右"], True),  # kana and kanji are one script here
    ("The angle α is π/2 and Δ is small.", ["Which angle?"], True),
    ("Мяч движется вправо.", ["3 + 4 = ?", "7"], True),  # nothing to compare with
])  # fmt: skip
def test_language(rationale: str, references: Sequence[str], passes: bool) -> None:
    assert (filters.language(rationale, references) is None) is passes


@pytest.mark.parametrize(("text", "passes"), [
    (RATIONALE, True),
    (RATIONALE + " ha" * 40, False),
    ("no, no, no! It goes ha ha ha ha.", True),
    ("At 1 s the ball is left. At 2 s the ball is up. At 3 s the ball is right. At 4 s it is down.", True),
    ("The red ball goes from the left side of the frame to the right side. " + "Now again slowly: "
     "The red ball goes from the left side of the frame to the right side. " + "Once more to be sure: "
     "The red ball goes from the left side of the frame to the right side. ", False),
    ("", True),
])  # fmt: skip
def test_repetition(text: str, passes: bool) -> None:
    assert (filters.repetition(text) is None) is passes


ANYTHING = st.text(alphabet=st.characters(codec=None), max_size=400) | st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "so", "the answer is", "A", "3", "left", "\n", "."]
    ),
    max_size=40,
).map(" ".join)


@given(ANYTHING, st.sampled_from(["multiple choice", "numerical", "OCR", "free-form", "regression"]))
def test_no_text_breaks_a_filter(text: str, kind: str) -> None:
    truth = {"numerical": "3", "regression": "2.5"}.get(kind, "B")
    judged = judge_one(sample(kind, truth), Completion(text, "stop"), AnnotateSettings())
    assert judged.rejected in ("", *FILTERS)
    assert bool(judged.rejected) == bool(judged.detail)
    assert 0 <= judged.score <= 1


@pytest.mark.parametrize(("completion", "rejected"), [
    (Completion(output(), "stop"), ""),
    (Completion(output("B. right"), "stop"), ""),
    (Completion(output(), "length"), "cut off"),
    (Completion("I cannot see the video.", "stop"), "refusal"),
    (Completion("The answer is B.", "stop"), "tags"),
    (Completion(output(rationale="Right."), "stop"), "length"),
    (Completion(output(rationale="球从左边往右边移动" * 3), "stop"), "language"),
    (Completion(output(rationale=RATIONALE + " So it is." * 20), "stop"), "repetition"),
    (Completion(output("A"), "stop"), "score"),
])  # fmt: skip
def test_each_filter_is_reached(completion: Completion, rejected: str) -> None:
    assert judge_one(sample(), completion, AnnotateSettings()).rejected == rejected


def judged_answers(
    answers: Sequence[str], choose: Any, kind: str = "multiple choice", truth: str = "B"
) -> Any:
    neutral = " ".join(f"word{number}" for number in range(30))
    completions = [Completion(output(answer, neutral), "stop") for answer in answers]
    return judge(sample(kind, truth), completions, AnnotateSettings(choose=choose, samples=4))


@pytest.mark.parametrize(("answers", "choose", "kept", "reason"), [
    (["A", "B", "C"], "best", 1, ""),  # one lucky hit is enough
    (["A", "B", "B"], "majority", 1, ""),
    (["A", "B", "C"], "majority", None, "majority"),
    (["A", "A", "B"], "majority", None, "majority"),  # the majority is wrong
    (["B", "B", "A", "A"], "majority", None, "majority"),  # half is no majority
])  # fmt: skip
def test_choosing(answers: list[str], choose: str, kept: int | None, reason: str) -> None:
    verdict = judged_answers(answers, choose)
    assert (verdict.kept, verdict.reason) == (kept, reason)


def test_the_best_score_is_kept_and_among_equals_the_one_that_others_agree_with() -> None:
    assert judged_answers(["7", "9", "8"], "best", "regression", "10").kept == 1
    # 8 and 12 score the same; 12 has a neighbour that agrees with it.
    assert judged_answers(["8", "12", "12.5", "3"], "best", "regression", "10").kept == 1


def test_a_question_counts_under_the_filter_that_was_reached_last() -> None:
    completions = [Completion("nothing", "stop"), Completion(output("A"), "stop"), Completion("", "length")]
    verdict = judge(sample(), completions, AnnotateSettings())
    assert (verdict.kept, verdict.reason) == (None, "score")
    assert [one.rejected for one in verdict.judged] == ["tags", "score", "cut off"]
