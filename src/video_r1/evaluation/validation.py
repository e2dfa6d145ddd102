"""Validation while training: accuracy on held-out questions in order, with the contrast clip, and with looks
elsewhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.reading import Batch, Clips, Question, Reader, build_question, derived_generator
from video_r1.data.tools import is_control, overview
from video_r1.evaluation.metrics import paired_difference
from video_r1.evaluation.question_loop import read_batches
from video_r1.processes import gather, process_count, process_index
from video_r1.rewards.scoring import answer_scores, format_scores
from video_r1.rollout.engine import RolloutEngine, SamplingSettings

logger = logging.getLogger(__name__)
Built = TypeVar("Built")
Outcomes = Mapping[Any, tuple[float, float]]
"""By clip: mean accuracy in order and with the contrast clip, in [0, 1]."""


def temporal_accuracy(
    engine: RolloutEngine, samples: Sequence[Sample], reader: Reader, builder: PromptBuilder, settings: Any,
    watch: ShortcutWatch | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return means over all ranks: `accuracy`, `format`, and over the videos `accuracy_video`,
    `accuracy_shuffled` and `temporal_gap` (accuracy_video − accuracy_shuffled); with looks
    `accuracy_elsewhere` and `look_gap`, over the questions whose looks left room for a control (their number
    is `look_questions`). Each gap has the ends of its 95 % interval (`…_low`, `…_high`).

    settings: a TGRPOConfig. The contrast is that of the temporal rule; another one's name replaces
    `shuffled`. `questions` is the number of answered questions, `skipped` that of others. Every validation of
    a run uses the same contrast clips and seeds.
    """

    contrast = settings.contrast

    def build(sample: Sample, media: Clips) -> tuple[Question, Prompt | None]:
        generator = derived_generator(settings.seed, "validation", sample.problem_id)
        unit = settings.contrast_unit
        if bounds := settings.overview_frames:
            drawn = derived_generator(settings.seed, "overview", sample.problem_id)
            media = tuple(overview(clip, bounds, drawn) for clip in media)
        question = build_question(sample, media, builder, generator, contrast, unit)
        has_looks = settings.tools and sample.data_type == "video"
        return question, replace(question.ordered, contrast="elsewhere") if has_looks else None

    scored = [
        entry
        for questions in held_out(samples, reader, build, settings.eval_batch_size)
        for entry in _scores(engine, questions, settings)
    ]
    scored = [entry for part in gather(scored) for entry in part]
    figures = {"questions": float(len(scored)), "skipped": float(len(samples) - len(scored))}
    if scored:
        figures["accuracy"] = fmean(accuracy for accuracy, *_ in scored)
        figures["format"] = fmean(formatted for _, formatted, *_ in scored)
    controls = ((2, contrast, "temporal_gap"), (3, "elsewhere", "look_gap"))
    for place, name, gap in controls:
        both = [(entry[0], entry[place], entry[4]) for entry in scored if entry[place] is not None]
        if both:
            ordered, others, clips = zip(*both, strict=True)
            video, other = fmean(ordered), fmean(others)
            figures.setdefault("accuracy_video", video)
            figures |= {f"accuracy_{name}": other, gap: video - other}
            if ends := paired_difference(ordered, others, clips).interval:
                figures |= {f"{gap}_low": ends[0], f"{gap}_high": ends[1]}
            if name == "elsewhere":
                figures["look_questions"] = float(len(both))
            elif watch is not None:
                figures["shortcut"] = float(watch.alerts(outcomes_of(both), name))
    return figures


# ---- Is the run learning a shortcut?


def outcomes_of(scores: Sequence[tuple[float, float, Hashable]]) -> Outcomes:
    """Return the means of each clip. scores: of each question in order, with the contrast, and its clip."""
    by_clip: dict[Hashable, list[tuple[float, float]]] = {}
    for ordered, contrast, clip in scores:
        by_clip.setdefault(clip, []).append((ordered, contrast))
    return {clip: (fmean(o for o, _ in pairs), fmean(c for _, c in pairs)) for clip, pairs in by_clip.items()}


@dataclass
class ShortcutWatch:
    """Sequential test over the validations of a run: does it learn to answer without the order?

    It alerts at validation k if, against the first validation, more clips are answered with the contrast, and
    the accuracy in order leads by less: two sign tests over clips, both at the level rate · 6 ÷ (π k)². These
    levels add up to `rate`: a run of any length in which neither changes has a false alert with a probability
    of at most `rate`. A resumed run compares with its own first validation.
    """

    rate: float = 0.05
    first: dict[Any, tuple[float, float]] = field(default_factory=dict)  # of each clip
    validations: int = 0  # after the first
    alerted: bool = False

    def alerts(self, now: Outcomes, contrast: str) -> bool:
        """Take the outcomes of a validation; return whether this or an earlier one alerts, and warn once.

        Several held-out sets may share a watch: each is compared with its own first validation.
        """
        first = {clip: self.first[clip] for clip in now if clip in self.first}
        self.first = {**now, **self.first}
        self.validations += bool(first)
        if first and not self.alerted:
            self.alerted = shortcut_p(first, now) <= self.rate * 6 / (math.pi * self.validations) ** 2
            if self.alerted and process_index() == 0:
                was, right = (100 * fmean(c for _, c in outcomes.values()) for outcomes in (first, now))
                logger.warning(
                    "the run is learning a shortcut: %.0f %% of the answers to the %s clips are right "
                    "(%.0f %% in the first validation), and the order adds less; data audit shows which "
                    "questions, data pairs adds time-reversed copies",
                    right, contrast, was,
                )  # fmt: skip
        return self.alerted


def shortcut_p(first: Outcomes, now: Outcomes) -> float:
    """Return the larger p-value of two sign tests over the clips of `first`: contrast answers got better, and
    the lead of the accuracy in order got smaller.
    """
    changes = [(now[clip], first[clip]) for clip in first]
    better = [new - old for (_, new), (_, old) in changes]
    lost = [(old - old_c) - (new - new_c) for (new, new_c), (old, old_c) in changes]
    return max(_sign_test(better), _sign_test(lost))


def _sign_test(changes: Sequence[float]) -> float:
    """Return P(at least as many positive changes) if each change were positive or negative by chance."""
    positive, changed = sum(x > 1e-9 for x in changes), sum(abs(x) > 1e-9 for x in changes)
    return sum(math.comb(changed, k) for k in range(positive, changed + 1)) / 2**changed


def _scores(
    engine: RolloutEngine, questions: Sequence[tuple[Question, Prompt | None]], settings: Any
) -> Iterator[tuple[Any, ...]]:
    """Yield accuracy and format with ordered frames, accuracy with shuffled frames and with looks elsewhere
    (None where not asked), and the question's cluster.

    Scores one greedy answer, or the mean of `num_generations_eval` answers sampled as in training.
    """
    asked = [(q.seed, (q.ordered, q.contrast, elsewhere)) for q, elsewhere in questions]
    seeded = [(seed + n, p) for seed, prompts in asked for n, p in enumerate(prompts) if p is not None]
    sampling = SamplingSettings(n=1, temperature=0.0, max_tokens=settings.max_completion_length)
    if settings.num_generations_eval is not None:
        seeds = tuple(seed for seed, _ in seeded)
        sampling = replace(
            sampling, n=settings.num_generations_eval, temperature=settings.temperature, seed=seeds
        )
    rollouts = iter(engine.sample([prompt for _, prompt in seeded], sampling))
    for question, elsewhere in questions:
        ordered, sample = next(rollouts), question.sample
        accuracy, formatted = answer_scores(sample, ordered).mean(), format_scores(sample, ordered).mean()
        contrast = None if question.contrast is None else answer_scores(sample, next(rollouts)).mean().item()
        looked = None if elsewhere is None else next(rollouts)
        if elsewhere is None or looked is None or not all(is_control(elsewhere, r) for r in looked):
            control = None
        else:
            control = answer_scores(sample, looked).mean().item()
        yield accuracy.item(), formatted.item(), contrast, control, sample.cluster


def held_out(
    samples: Sequence[Sample], reader: Reader, build: Callable[[Sample, Clips], Built], batch_size: int
) -> Iterator[list[Built]]:
    """Yield what `build` makes of this rank's share of usable held-out samples, in batches read ahead.

    Every rank gets the same number of batches, some perhaps empty, because ranks that share an engine or a
    model call it together.
    """
    mine = samples[process_index() :: process_count()]
    rounds = math.ceil(math.ceil(len(samples) / process_count()) / batch_size)
    batches = [Batch(mine[i * batch_size : (i + 1) * batch_size]) for i in range(rounds)]
    for read in read_batches(reader, batches, build):
        yield [built for _, built in read.usable]
