"""The protocol between the trainer and whatever samples for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout
from video_r1.settings.decoding import DecodingSettings


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 768
    seed: int | tuple[int, ...] | None = None  # of the call, or one of each prompt

    @classmethod
    def of(cls, settings: DecodingSettings, n: int = 1) -> SamplingSettings:
        """How a command samples, without its seed."""
        return cls(n, settings.temperature, settings.top_p, max_tokens=settings.max_new_tokens)


class RolloutEngine(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, counts: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """`sampling.n` completions of each prompt, or `counts[q]` of prompt q."""
        ...

    def update_weights(self, model: Any) -> None: ...

    def rest(self) -> None:
        """Gives back what sampling needs; new weights have to come before it goes on."""
        ...

    def close(self) -> None: ...


def wanted_counts(
    prompts: Sequence[Prompt], sampling: SamplingSettings, counts: Sequence[int] | None
) -> list[int]:
    """Completions wanted of each prompt. Raises ValueError when prompts and counts differ in number."""
    wanted = [sampling.n] * len(prompts) if counts is None else list(counts)
    if len(wanted) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(wanted)} counts")
    return wanted


def sample_rollouts(
    engine: RolloutEngine, questions: Sequence[Question], sampling: SamplingSettings, shuffled_n: int
) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
    """`sampling.n` completions a question with ordered frames, `shuffled_n` with shuffled ones ([] where it
    has no shuffled prompt): two lists in the questions' order, sampled together and in the same way.
    """
    shuffled = [question.shuffled for question in questions if question.shuffled is not None]
    prompts = [*(question.ordered for question in questions), *shuffled]
    counts = [sampling.n] * len(questions) + [shuffled_n] * len(shuffled)
    seeds = [q.seed for q in questions] + [q.seed + 1 for q in questions if q.shuffled is not None]
    rollouts = engine.generate(prompts, replace(sampling, seed=tuple(seeds)), counts)
    remaining = iter(rollouts[len(questions) :])
    return rollouts[: len(questions)], [[] if q.shuffled is None else next(remaining) for q in questions]
