"""Validation while training: accuracy on held-out questions with ordered and with shuffled frames; and
what a continued run has to know of earlier validations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import PromptBuilder
from video_r1.data.reading import Batch, Clips, Question, Reader, Unusable, build_question, derived_generator
from video_r1.processes import gather, process_count, process_index
from video_r1.rewards.group import answer_scores, format_scores
from video_r1.rollout.engine import RolloutEngine, SamplingSettings

Built = TypeVar("Built")
Answered = tuple[float, float, float | None]
"""Accuracy and format with ordered frames, accuracy with shuffled frames (None: an image)."""


def temporal_accuracy(
    engine: RolloutEngine, samples: Sequence[Sample], reader: Reader, builder: PromptBuilder, settings: Any
) -> dict[str, float]:
    """Means over all processes: `accuracy`, `format`, and where there are videos `accuracy_video`,
    `accuracy_shuffled` and `temporal_gap` (accuracy_video − accuracy_shuffled); with another contrast of the
    settings, its name in place of `shuffled`. `questions` counts those that were answered, `skipped` those
    without usable media. A question is shuffled, and its answers are drawn, alike every time. settings: a
    TGRPOConfig.
    """

    def build(sample: Sample, media: Clips) -> Question:
        generator = derived_generator(settings.seed, "validation", sample.problem_id)
        contrast, unit = settings.temporal_contrast, settings.contrast_unit
        return build_question(sample, media, builder, generator, contrast, unit)

    answered = [
        entry
        for questions in held_out(samples, reader, build, settings.eval_batch_size)
        for entry in answer(engine, questions, settings)
    ]
    everyone = [entry for part in gather(answered) for entry in part]
    figures = {"questions": float(len(everyone)), "skipped": float(len(samples) - len(everyone))}
    if everyone:
        figures["accuracy"] = fmean(accuracy for accuracy, _, _ in everyone)
        figures["format"] = fmean(formatted for _, formatted, _ in everyone)
    both = [(accuracy, shuffled) for accuracy, _, shuffled in everyone if shuffled is not None]
    if both:
        video, contrast = map(fmean, zip(*both, strict=True))
        figures |= {"accuracy_video": video, f"accuracy_{settings.temporal_contrast}": contrast}
        figures["temporal_gap"] = video - contrast
    return figures


def answer(engine: RolloutEngine, questions: Sequence[Question], settings: Any) -> Iterator[Answered]:
    """Answers to a batch of questions in both orders, scored: a greedy one, or the mean of
    `num_generations_eval` that are sampled at the temperature of training.
    """
    asked = [(q, p) for q in questions for p in (q.ordered, q.shuffled) if p is not None]
    sampling = SamplingSettings(n=1, temperature=0.0, max_tokens=settings.max_completion_length)
    if settings.num_generations_eval is not None:
        seeds = tuple(question.seed + (prompt is question.shuffled) for question, prompt in asked)
        sampling = replace(
            sampling, n=settings.num_generations_eval, temperature=settings.temperature, seed=seeds
        )
    rollouts = iter(engine.generate([prompt for _, prompt in asked], sampling))
    for question in questions:
        ordered, sample = next(rollouts), question.sample
        accuracy, formatted = answer_scores(sample, ordered).mean(), format_scores(sample, ordered).mean()
        shuffled = None if question.shuffled is None else answer_scores(sample, next(rollouts)).mean().item()
        yield accuracy.item(), formatted.item(), shuffled


def held_out(
    samples: Sequence[Sample], reader: Reader, build: Callable[[Sample, Clips], Built], batch_size: int
) -> Iterator[list[Built]]:
    """This process's share of held-out questions that can be used, in batches that are read ahead.

    Every process gets as many batches, some perhaps empty: processes that share an engine call it together.
    """
    mine = samples[process_index() :: process_count()]
    rounds = math.ceil(math.ceil(len(samples) / process_count()) / batch_size)
    batches = [Batch(mine[i * batch_size : (i + 1) * batch_size]) for i in range(rounds)]
    for read in reader.batches(batches, build):
        yield [built for built in read if not isinstance(built, Unusable)]
