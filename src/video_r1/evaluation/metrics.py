"""Evaluation figures: means and intervals over questions, relative accuracy. No torch.

Scores are float64 [N] in [0, 1]. Questions about one clip are right or wrong together, so intervals resample
clips, each with all of its questions. `clips` has the clip of each question; None means one for each.
"""

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from video_r1.data.answers import parse_number
from video_r1.data.scores import correctness

RESAMPLES = 2_000
FEWEST = 5  # questions with an interval
OVERLAP_SHARES = {"R@0.3": 0.3, "R@0.5": 0.5, "R@0.7": 0.7}  # least overlaps
_DRAWS_AT_ONCE = 2_000_000  # bounds the memory of a bootstrap: 16 MB of indices
_DIRECTION_DIFFICULTY = re.compile(r"^(object_rel_direction)_(?:easy|medium|hard)$")


Clips = Sequence[Hashable] | None


class Figure(NamedTuple):
    """A mean over `questions` questions with its 95 % interval [low, high]; nan for none."""

    mean: float
    low: float
    high: float
    questions: int

    @property
    def interval(self) -> list[float] | None:
        return None if math.isnan(self.low) else [self.low, self.high]

    def as_json(self, name: str) -> dict[str, Any]:
        return {name: self.mean, "interval95": self.interval, "questions": self.questions}


def mean_relative_accuracy(predicted: float, truth: float) -> float:
    """Return an answer's MRA: mean over θ of [ |predicted − truth| ÷ |truth| < 1 − θ ] (arXiv 2412.14171).

    θ runs over 0.50, 0.55, …, 0.95. A nan scores 0. A truth of 0 has no relative error: an exact 0 scores 1,
    all else 0.
    """
    error, size = abs(predicted - truth), abs(truth)
    relative = error / size if size else 0.0 if error == 0 else math.inf
    # An error of exactly 1 − θ is not below it; 1 − 0.9 in binary is below 0.1, hence the margin.
    return sum(relative < step / 20 - 1e-9 for step in range(1, 11)) / 10


def answer_score(problem_type: str, answer: str, truth: str) -> float:
    """Return an answer's score in an evaluation: MRA for regression, else the training reward."""
    if problem_type != "regression":
        return correctness(problem_type, answer, truth)
    predicted, expected = parse_number(answer), parse_number(truth)
    return 0.0 if predicted is None or expected is None else mean_relative_accuracy(predicted, expected)


def bootstrap_means(
    scores: ArrayLike, clips: Clips = None, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Return bootstrap means [resamples] of the scores [N]: K clips drawn with replacement from the K clips.

    Resamples questions instead if these means spread wider, because few clips may look certain by chance.
    """
    values = np.asarray(scores, dtype=np.float64)
    places: dict[Hashable, int] = {}
    shown = range(len(values)) if clips is None else clips
    clip = [places.setdefault(each, len(places)) for _, each in zip(values, shown, strict=True)]
    by_clip = _resampled_means(np.bincount(clip, values), np.bincount(clip), resamples, seed)
    if len(places) == len(values):
        return by_clip
    by_question = _resampled_means(values, np.ones(len(values)), resamples, seed)
    return max(by_clip, by_question, key=np.std)


def _resampled_means(
    sums: NDArray[Any], counts: NDArray[Any], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return means [resamples] of K groups drawn with replacement. sums, counts of their scores: [K]."""
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // len(sums))
    means = []
    for done in range(0, resamples, rows):
        drawn = generator.integers(0, len(sums), (min(rows, resamples - done), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def mean_figure(scores: ArrayLike, clips: Clips = None, seed: int = 0) -> Figure:
    """Return the mean of scores [N ≥ 1] with its percentile bootstrap interval over clips.

    Equal scores, whose bootstrap has no width, have Wilson's interval; fewer than FEWEST have none.
    """
    values = np.asarray(scores, dtype=np.float64)
    return _figure(bootstrap_means(values, clips, seed=seed), len(values), clips, values.mean())


def paired_difference(first: ArrayLike, second: ArrayLike, clips: Clips = None) -> Figure:
    """Return mean(first − second) of values [N] of the same questions, with its paired 95 % interval.

    With scores of ordered and shuffled frames this is the temporal gap. Equal differences of scores have
    Newcombe's interval; fewer than FEWEST have none.
    """
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    resampled, sides = bootstrap_means(one - other, clips), (one.mean(), other.mean())
    return _figure(resampled, len(one), clips, np.mean(one - other), *sides)


def share_figure(right: float, count: int) -> Figure:
    """Return right ÷ count (≥ 1) with its 95 % score interval (Wilson 1927): [0, 0.32] for 0 of 8."""
    share, z = right / count, 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half), count)


def share_difference(first: Figure, second: Figure) -> Figure:
    """Return the difference of two independent shares with its 95 % interval (Newcombe 1998, method 10)."""
    difference = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Figure(difference, difference - below, difference + above, min(first.questions, second.questions))


def overlap_figures(
    overlaps: Sequence[Mapping[str, float]], clips: Sequence[Hashable]
) -> dict[str, dict[str, Any]]:
    """Return figures of grounding answers: the mean of each overlap (tIoU, IoU) over the questions scored by
    it, and R@m, the share of questions whose overlap is at least m.

    overlaps: those of each question, by name. Returns {"tIoU": {"mean", "interval95",
    "questions", "R@0.3": {"share", "interval95", "questions"}, …}}.
    """
    figures = {}
    for name in sorted({name for each in overlaps for name in each}):
        values = [each[name] for each in overlaps if name in each]
        shown = [clip for each, clip in zip(overlaps, clips, strict=True) if name in each]
        shares = {  # 0.3 as a quotient may lie a rounding error below it
            share: share_figure(sum(value >= least - 1e-9 for value in values), len(values)).as_json("share")
            for share, least in OVERLAP_SHARES.items()
        }
        figures[name] = mean_figure(values, shown).as_json("mean") | shares
    return figures


def task_mean(scores: ArrayLike, tasks: Sequence[str], clips: Clips = None) -> Figure:
    """Return the mean over task types of each task's mean: VSI-Bench's headline figure.

    scores, tasks: [N]. The three difficulties of the relative direction are first averaged into one task. The
    interval resamples the clips within each task.
    """
    values, names = np.asarray(scores, dtype=np.float64), np.asarray(tasks, dtype=object)
    merged: dict[str, list[NDArray[np.float64]]] = {}
    for number, task in enumerate(dict.fromkeys(names)):
        members = np.flatnonzero(names == task)
        chosen, shown = values[members], clips and [clips[member] for member in members]
        means = np.concatenate(([chosen.mean()], bootstrap_means(chosen, shown, seed=number)))
        merged.setdefault(_DIRECTION_DIFFICULTY.sub(r"\1", task), []).append(means)
    # [0] is the figure itself, the rest its resamples
    headline = np.mean([np.mean(parts, axis=0) for parts in merged.values()], axis=0)
    return _figure(headline[1:], len(values), clips, headline[0])


def _figure(resampled: NDArray[np.float64], questions: int, clips: Clips, mean: Any, *sides: Any) -> Figure:
    """Return a mean, or the difference of two (`sides`), with the interval of its resamples."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    if questions < FEWEST:
        low = high = math.nan
    elif high - low < 1e-12 and all(0 <= share <= 1 for share in sides or (mean,)):
        count = questions if clips is None else len(set(clips))  # questions about a clip are right together
        first, *second = (share_figure(share * count, count) for share in sides or (mean,))
        _, low, high, _ = share_difference(first, *second) if second else first
    return Figure(float(mean), float(low), float(high), questions)
