"""Video-R1's own evaluation: its protocol, its published figures (arXiv 2503.21776, version 4), a comparison.

Published figures are percentages of questions without an interval. A difference is marked when the published
figure is outside the 95 % interval of ours.

The protocol is that of Video-R1's public code (github.com/tulerfeng/Video-R1, src/eval_bench.py): its prompt,
and how it parses and scores an answer. An answer has to be the letter and nothing else, free texts score
nothing, and numbers have 32 bits. Its frames and sampling are in settings/decoding.py.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from video_r1.console import table
from video_r1.data.answers import extract_answer, parse_number
from video_r1.data.manifests.records import Sample
from video_r1.data.templates import ANSWER_HINTS, Template
from video_r1.settings.decoding import PROTOCOLS, EvalSettings
from video_r1.settings.frames import FrameBudget

# The area to which frames are scaled up, according to its author (issue 11).
LEAST_PIXELS = 128 * 28 * 28

_PAPER = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
COLUMNS: list[str] = _PAPER["columns"]
PUBLISHED: dict[str, dict[int, list[float]]] = {
    model: {int(frames): row for frames, row in rows.items()} for model, rows in _PAPER["published"].items()
}
SETUP: dict[str, float] = _PAPER["setup"]


class ReferenceTemplate(Template):
    """A template whose options follow the question without a break, with an empty line after them."""

    def render(self, sample: Sample) -> str:
        options = "".join(f"{option}\n" for option in sample.options)
        question = f"{sample.problem}Options:\n{options}" if options else sample.problem
        return self.text.format(question=question, hint=self.hints[sample.problem_type])


TEMPLATE = ReferenceTemplate(_PAPER["prompt"]["text"], ANSWER_HINTS | _PAPER["prompt"]["hints"])


def as_asked(sample: Sample) -> Sample:
    """Return the sample as the code asks it: about the whole clip, of a chat only the last turn."""
    return replace(sample, start=None, end=None, messages=())


def as_sized(budget: FrameBudget) -> FrameBudget:
    """Return the budget with frames and images sized as in the code, if its frames may be that large."""
    return replace(budget, least_pixels=LEAST_PIXELS) if budget.frame_pixels > LEAST_PIXELS else budget


def read_answer(output: str) -> str:
    """Return the text in the first answer tags, or the whole output without such tags."""
    return extract_answer(output) or output


def score(problem_type: str, answer: str, truth: str) -> float:
    """Return a score in [0, 1]; types compared as texts score 0."""
    if problem_type == "multiple choice":
        return float(answer.strip() == truth.strip())
    if problem_type not in ("numerical", "regression"):
        return 0.0
    if problem_type == "numerical" and _has_mark(answer) != _has_mark(truth):
        return 0.0
    predicted, expected = _number(answer), parse_number(truth)
    if predicted is None or expected is None:
        return 0.0
    if problem_type == "numerical":
        return float(round(predicted, 2) == round(expected, 2))
    return _mean_relative_accuracy(predicted, expected)


def _has_mark(number: str) -> bool:
    return "." in number or "," in number


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _mean_relative_accuracy(predicted: float, truth: float) -> float:
    """Return the MRA in float32, whose rounding decides errors of exactly 1 − θ."""
    import torch

    prediction, target = torch.tensor(predicted), torch.tensor(truth)
    error = (prediction - target).abs() / (target.abs() + 1e-8)
    thresholds = torch.arange(0.5, 0.975, 0.05)
    return (error < 1 - thresholds).float().mean().item()


# According to its author: the mean of mean_acc and mean_mra (github.com/tulerfeng/Video-R1, issue 121).
_KIND_MEAN = {"vsibench": "mean of the accuracy of choices and the MRA of numbers"}


class Comparison(NamedTuple):
    """Our figure and a published one, in percent. low, high: 95 % interval of the difference."""

    benchmark: str
    frames: int
    model: str
    published: float
    ours: float
    low: float
    high: float
    difference: float  # ours − published
    outside: bool  # whether the published figure is outside our interval


def compare_with_paper(results: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Pair every published figure of the summary's benchmarks and frame counts with ours.

    Ours is the ordered accuracy, for VSI-Bench the mean of its two kinds of questions.
    """
    found = []
    for column, name in enumerate(COLUMNS):
        for frames, figures in results.get(name, {}).get("frames", {}).items():
            figure = figures.get("ordered")
            if figure and name in _KIND_MEAN:
                figure = figure.get("kind_mean")
            if not figure or figure["interval95"] is None:
                continue
            mean, count = 100 * figure["accuracy"], int(frames)
            for model, rows in PUBLISHED.items():
                if count in rows:
                    there = rows[count][column]
                    low, high = (100 * end - there for end in figure["interval95"])
                    ours = (mean, low, high, mean - there, not low <= 0 <= high)
                    found.append(Comparison(name, count, model, there, *ours))
    return found


def setup_differences(settings: EvalSettings) -> list[str]:
    """Return how the settings differ from the paper's (by its protocol: its code's), as sentences."""
    by_code = settings.protocol == "reference"
    setup = {name: PROTOCOLS["reference"][name] for name in SETUP} if by_code else SETUP
    found = [
        f"{name} is {getattr(settings, name):g} here and {value:g} there"
        for name, value in setup.items()
        if getattr(settings, name) != value
    ]
    if settings.answer == ["direct"]:
        found.append("answers are direct, without the reasoning that the reference asks for")
    if not by_code:
        found.append("prompt and scores are this project's own; --protocol reference has the reference's")
    return found


def comparison_table(comparisons: Sequence[Comparison], titles: Mapping[str, str]) -> str:
    """Return the comparison as text; `*` marks differences outside our interval."""
    if not comparisons:
        return "the paper has no figures for these benchmarks and frame counts (it has 16, 32 and 64 frames)"
    rows = []
    for each in comparisons:
        title = f"{titles.get(each.benchmark, each.benchmark)}, {each.frames} frames: {each.model}"
        interval = f"{each.difference:+.1f} [{each.low:+.1f}, {each.high:+.1f}]{' *' * each.outside}"
        rows.append((title, f"{each.ours:.1f}", f"{each.published:.1f}", interval))
    notes = ["difference: ours − published, with our 95 % interval; * the published one is outside of it"]
    benchmarks = {each.benchmark for each in comparisons}
    notes += [f"{titles.get(name, name)}: {mean}" for name, mean in _KIND_MEAN.items() if name in benchmarks]
    return "\n".join([table(("", "ours", "published", "difference"), rows), *notes])
