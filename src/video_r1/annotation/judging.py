"""Which of a question's rationales is kept, and why the others are not. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

from video_r1.annotation import filters
from video_r1.annotation.filters import FILTERS, rationale_of
from video_r1.data.answers import extract_answer, read_answer
from video_r1.data.manifests.records import Sample
from video_r1.rewards.correctness import above, correctness
from video_r1.rollout.chat import Completion
from video_r1.settings.annotation import AnnotateSettings


class Judged(NamedTuple):
    """One rationale."""

    answer: str
    score: float  # of its answer, in [0, 1]
    rejected: str  # the first filter of FILTERS that it did not pass, "" when it passed all
    detail: str  # in words


class Verdict(NamedTuple):
    """One question."""

    kept: int | None  # the rationale's place, None when there is none
    reason: str  # the filter that stopped the rationale that came furthest, "" when one is kept
    judged: list[Judged]


def judge(sample: Sample, completions: Sequence[Completion], settings: AnnotateSettings) -> Verdict:
    """Applies all filters to a question's K rationales and chooses one of those that pass.

    best: the highest score; among equals the one whose answer most of the K agree with, then the earliest.
    majority: the same, among those whose answer more than half of the K agree with: a right answer that the
    teacher mostly does not give was luck. They agree when one scores above the threshold against the other.
    """
    kind = sample.problem_type
    judged = [judge_one(sample, completion, settings) for completion in completions]
    answers = [one.answer for one in judged if one.answer]
    votes = [  # how many of the answers agree with each, its own included; none with an empty one
        sum(above(correctness(kind, other, one.answer), settings.threshold) for other in answers)
        for one in judged
    ]
    if settings.choose == "majority":
        judged = [
            one._replace(rejected="majority", detail=f"{count} of {len(judged)} answers agree")
            if not one.rejected and 2 * count <= len(judged)
            else one
            for one, count in zip(judged, votes, strict=True)
        ]
    passed = [place for place, one in enumerate(judged) if not one.rejected]
    if passed:
        return Verdict(max(passed, key=lambda i: (judged[i].score, votes[i], -i)), "", judged)
    return Verdict(None, max((one.rejected for one in judged), key=FILTERS.index), judged)


def judge_one(sample: Sample, completion: Completion, settings: AnnotateSettings) -> Judged:
    """The first filter that a rationale does not pass (majority apart, which needs all of them)."""
    text, options, kind = completion.text, sample.options, sample.problem_type
    rationale = rationale_of(text)
    answer = read_answer(text, kind, options) if extract_answer(text) else ""
    truth = sample.answer
    score = correctness(kind, answer, truth)
    references = (sample.problem, *options, truth)
    checks = {
        "cut off": lambda: filters.cut_off(completion.finish_reason),
        "refusal": lambda: filters.refusal(text, completion.finish_reason),
        "tags": lambda: filters.tags(text),
        "length": lambda: filters.length(rationale, *settings.length_range),
        "characters": lambda: filters.characters(text),
        "language": lambda: filters.language(rationale, references),
        "repetition": lambda: filters.repetition(rationale),
        "prompt leak": lambda: filters.prompt_leak(rationale, sample.problem, kind, truth, options),
        "score": lambda: (
            None if above(score, settings.threshold) else f"its answer {answer!r} scores {score:.2f}"
        ),
        "contradiction": lambda: filters.contradiction(rationale, answer, kind, options),
    }
    for name, check in checks.items():
        if detail := check():
            return Judged(answer, score, name, detail)
    return Judged(answer, score, "", "")
