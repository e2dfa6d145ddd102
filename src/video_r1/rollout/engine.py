"""The protocol of rollout engines, the distribution that they sample from, and their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout
from video_r1.seeds import hashed_seed
from video_r1.settings.decoding import DecodingSettings


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 768
    seed: int | tuple[int, ...] | None = None  # for the call, or one for each prompt

    @classmethod
    def of(cls, settings: DecodingSettings, n: int = 1) -> SamplingSettings:
        """Return a command's sampling settings, without a seed."""
        return cls(n, settings.temperature, settings.top_p, max_tokens=settings.max_new_tokens)


class RolloutEngine(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, counts: Sequence[int] | None = None
    ) -> list[list[Rollout]]:
        """Sample `sampling.n` completions of each prompt, or `counts[q]` of prompt q: a list for each prompt.

        The seed of prompt q (see `prompt_seeds`) fixes its completions, whichever other prompts are in the
        call. At temperature 0 every completion is the greedy one. Raises ValueError when prompts and counts
        differ in number.
        """
        ...

    def update_weights(self, model: Any) -> None: ...

    def rest(self) -> None:
        """Free the memory that sampling needs; `update_weights` has to be called before the next rollouts."""

    def close(self) -> None:
        """Free everything that the engine holds; a model in this process belongs to the caller."""


def wanted_counts(
    prompts: Sequence[Prompt], sampling: SamplingSettings, counts: Sequence[int] | None
) -> list[int]:
    wanted = [sampling.n] * len(prompts) if counts is None else list(counts)
    if len(wanted) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(wanted)} counts")
    return wanted


def sample_rollouts(
    engine: RolloutEngine, questions: Sequence[Question], sampling: SamplingSettings, shuffled_n: int
) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
    """Sample `sampling.n` completions a question with ordered frames, `shuffled_n` with shuffled ones.

    Returns two lists in the questions' order; [] for a question without a shuffled prompt. One call samples
    both, in the same way.
    """
    shuffled = [question.shuffled for question in questions if question.shuffled is not None]
    prompts = [*(question.ordered for question in questions), *shuffled]
    counts = [sampling.n] * len(questions) + [shuffled_n] * len(shuffled)
    seeds = [q.seed for q in questions] + [q.seed + 1 for q in questions if q.shuffled is not None]
    rollouts = engine.generate(prompts, replace(sampling, seed=tuple(seeds)), counts)
    remaining = iter(rollouts[len(questions) :])
    return rollouts[: len(questions)], [[] if q.shuffled is None else next(remaining) for q in questions]


# ---- The sampling distribution


def sampling_logprobs(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Return the log-probs [..., V] float32 of the distribution that is sampled.

    Temperature first, then the `top_k` most likely tokens (0: all), then the smallest set of tokens whose
    probabilities sum to at least `top_p`; the rest is normalised again. Tokens outside have -inf.
    `temperature` 0 (greedy) gives the model's own distribution.
    """
    logits = logits.float()
    if temperature > 0 and temperature != 1.0:
        logits = logits / temperature
    truncates_k = 0 < top_k < logits.shape[-1]
    if temperature > 0 and (truncates_k or top_p < 1.0):
        ordered, indices = logits.sort(-1, descending=True)
        if truncates_k:
            ordered[..., top_k:] = -torch.inf
        if top_p < 1.0:
            probabilities = ordered.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities  # the mass of all more likely tokens
            outside = before >= top_p
            outside[..., 0] = False
            ordered = ordered.masked_fill(outside, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, indices, ordered)
    return logits.log_softmax(-1)


def draw_tokens(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Draw token ids [B] int64 from `logprobs` [B, V] by inverting the cumulative distribution.

    uniform: [B] float32 in [0, 1), one number a token. A token depends on its own number and its own
    distribution only, so a sequence is the same whichever other sequences share its batch.
    """
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may lift the threshold to the total itself, and then no token would be above it.
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def uniform_numbers(counts: Sequence[int], sampling: SamplingSettings) -> list[Tensor]:
    """Return [counts[q], max_tokens] float32 in [0, 1) for each prompt q: a number for every token."""
    if sampling.temperature == 0:
        return [torch.zeros(count, 0) for count in counts]
    seeds = prompt_seeds(sampling.seed, len(counts))
    return [
        torch.rand(count, sampling.max_tokens, generator=torch.Generator().manual_seed(seed))
        for count, seed in zip(counts, seeds, strict=True)
    ]


def prompt_seeds(seed: int | Sequence[int] | None, prompts: int) -> list[int]:
    """Return a seed for each prompt: the given ones, or hashes of the call's seed and the prompt's index.

    A call's seed of None is drawn from torch's CPU generator. Raises ValueError when the lengths differ.
    """
    if seed is None or isinstance(seed, int):
        call = int(torch.randint(2**62, ())) if seed is None else seed
        return [prompt_seed(call, prompt) for prompt in range(prompts)]
    if len(seed) != prompts:
        raise ValueError(f"{prompts} prompts but {len(seed)} seeds")
    return list(seed)


def prompt_seed(seed: int, prompt: int) -> int:
    """Return a seed in [0, 2**62) for a prompt of a call; an engine may add the completion's number to it."""
    return hashed_seed(f"{seed}/{prompt}", bits=62)
