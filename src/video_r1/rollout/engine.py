"""The base class of rollout engines, the distribution that they sample from, and their seeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.data.templates import end_token_id
from video_r1.errors import VideoR1Error
from video_r1.models.families import text_of
from video_r1.models.group_forward import vision_language_model
from video_r1.seeds import hashed_seed
from video_r1.settings.decoding import DecodingSettings

MAX_SEQUENCES = 256  # completions decoded at once
WEIGHTS_PER_THREAD = 2**21  # of the text model; with fewer, a CPU's threads wait for each other
Prompts = Sequence[Prompt]
Counts = Sequence[int] | None
"""Completions of each prompt, in place of `SamplingSettings.n`."""
Groups = list[list[Rollout]]
"""Completions of each prompt."""
OnToken = Callable[[int, int, int], object] | None
"""Called with the indices of prompt and completion, and a token id."""
Then = Callable[[int, int, Rollout], "tuple[Prompt, SamplingSettings] | None"]
"""Called with the indices of prompt and completion, and the completion; returns the prompt and the settings
of its next turn, or None if it is complete."""
Asking = tuple[Sequence[Prompt], "SamplingSettings", Sequence[int]]
"""Prompts, settings, and the number of completions of each prompt."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 768
    seed: int | tuple[int, ...] | None = None  # for the call, or one for each prompt

    @classmethod
    def of(cls, settings: DecodingSettings, n: int = 1) -> SamplingSettings:
        """Return a command's sampling settings, without a seed."""
        return cls(n, settings.temperature, settings.top_p, max_tokens=settings.max_new_tokens)


class RolloutEngine(ABC):
    """Base class of rollout engines. `sample` is the one method that an engine has to have."""

    has_own_weights = False
    """Whether a copy of the weights samples, so that the trainer's may be sharded meanwhile."""
    scores_as_trained = False
    """Whether the trained model itself samples, so that log-probs of rollouts are the policy's own."""
    takes_tool_turns = True
    """Whether prompts may hold tool turns (`Prompt.parts`)."""
    served_model: str | None = None
    """Name of the model at an endpoint; None for other engines."""

    @property
    def without_tools(self) -> RolloutEngine:
        """The engine that samples when tools are not offered."""
        return self

    @abstractmethod
    def sample(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None, on_token: OnToken = None
    ) -> Groups:
        """Sample `sampling.n` completions of each prompt, or `counts[q]` of prompt q: a list for each prompt.

        The seed of prompt q (see `prompt_seeds`) fixes its completions, whichever other prompts are in the
        call. At temperature 0 every completion is the greedy one. on_token: called with each token at once by
        engines in this process; other engines ignore it. Raises ValueError when prompts and counts differ in
        number.
        """

    def update_weights(self, model: Any) -> None:  # noqa: B027
        """Sample with the weights of `model` from here on. Every rank calls it."""

    def rest(self) -> None:  # noqa: B027
        """Free the memory that sampling needs; `update_weights` has to be called before the next rollouts."""

    def close(self) -> None:  # noqa: B027
        """Free everything that the engine holds; a model in this process belongs to the caller."""


class ContinuingEngine(RolloutEngine):
    """Engine that continues each completion as soon as its tools have answered."""

    @abstractmethod
    def follow(self, asked: Asking, then: Then) -> None:
        """Sample as `sample`, and continue each completion.

        then: called in a thread when a completion has ended. The engine samples what it returns, with the
        same indices, until it returns None. What it raises ends the call and all requests.
        """

    def sample(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None, on_token: OnToken = None
    ) -> Groups:
        counts, ended = wanted_counts(prompts, sampling, counts), dict[tuple[int, int], Rollout]()
        self.follow((prompts, sampling, counts), lambda *given: ended.update({given[:2]: given[2]}))
        return [[ended[index, number] for number in range(count)] for index, count in enumerate(counts)]


def follow_in_rounds(
    engine: RolloutEngine, asked: Asking, then: Then, on_token: OnToken = None, anyone: Any = bool
) -> None:
    """Do as `ContinuingEngine.follow`, with one call of `sample` for all first turns, one for all second
    turns, and so on: for engines that read a prompt once a call, and ranks that have to make the same calls.

    on_token: for the first turns. anyone: returns whether any rank that shares the engine goes on.
    """
    keys = [(index, number) for index, count in enumerate(asked[2]) for number in range(count)]
    with ThreadPoolExecutor() as pool:
        while True:
            ended = zip(keys, chain(*engine.sample(*asked, on_token=on_token)), strict=True)
            answers = list(pool.map(lambda each: then(each[0][0], each[0][1], each[1]), ended))
            turns = {key: turn for key, turn in zip(keys, answers, strict=True) if turn is not None}
            if not anyone(bool(turns)):
                return
            keys, on_token, settings = list(turns), None, [each for _, each in turns.values()]
            seeds = tuple(prompt_seeds(each.seed, 1)[0] for each in settings)
            longest = max((each.max_tokens for each in settings), default=1)
            sampling = replace(asked[1], n=1, seed=seeds, max_tokens=longest)
            asked = [prompt for prompt, _ in turns.values()], sampling, [1] * len(turns)


class InProcessEngine(RolloutEngine):
    """Samples with a transformers model in this process, also within PEFT or DistributedDataParallel.

    The model is in eval mode while sampling. Under mixed precision call `sample` within the trainer's
    autocast. tokenizer: tokenizer or processor. max_sequences: completions decoded at once.
    """

    scores_as_trained = True

    def __init__(self, model: Any, tokenizer: Any, max_sequences: int = MAX_SEQUENCES) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.max_sequences = max_sequences
        self.update_weights(model)

    def update_weights(self, model: Any) -> None:
        """Use `model`. It is the trained model itself, so its weights need no copy."""
        self.model = vision_language_model(model)
        self.stop_ids = stop_token_ids(self.model.generation_config, self.tokenizer)


def stop_token_ids(generation: GenerationConfig, tokenizer: Any) -> list[int]:
    """Return the tokens that end a completion: the generation config's, and the tokenizer's end of turn."""
    configured = generation.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*configured, end_token_id(tokenizer)) if token is not None})


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def useful_threads(model: Any) -> Iterator[None]:
    """Decode with as many CPU threads as the text model's weights keep busy."""
    threads, text = torch.get_num_threads(), text_of(vision_language_model(model))
    weights = sum(weight.numel() for weight in text.parameters())
    torch.set_num_threads(max(1, min(threads, weights // WEIGHTS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_rollouts(
    tokenizer: Any, token_ids: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor
) -> list[Rollout]:
    """Build rollouts from token_ids, logprobs [B, L], lengths [B] and stopped [B] (by an end token).

    Raises VideoR1Error where the model's log-probs are NaN.
    """
    ids = [row[:length].clone() for row, length in zip(token_ids.cpu(), lengths.tolist(), strict=True)]
    texts = tokenizer.batch_decode([row.tolist() for row in ids], skip_special_tokens=True)
    values, ended = logprobs.cpu(), stopped.tolist()
    if any(bool(row[: len(own)].isnan().any()) for row, own in zip(values, ids, strict=True)):
        raise VideoR1Error(
            "the model's probabilities are not numbers: its weights hold NaN or infinity, or their format "
            "is too small for it; use another checkpoint, or dtype bfloat16 or float32"
        )
    return [
        Rollout(row, values[index, : len(row)].clone(), text, "stop" if ended[index] else "length")
        for index, (row, text) in enumerate(zip(ids, texts, strict=True))
    ]


def wanted_counts(prompts: Prompts, sampling: SamplingSettings, counts: Counts) -> list[int]:
    wanted = [sampling.n] * len(prompts) if counts is None else list(counts)
    if len(wanted) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(wanted)} counts")
    return wanted


# ---- The sampling distribution


def sampling_logprobs(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Return the log-probs [..., V] float32 of the distribution that is sampled.

    Temperature first, then the smallest set of tokens whose probabilities sum to at least `top_p`; the rest
    is normalised again. Tokens outside have -inf. Temperature 0 (greedy) gives the model's own distribution.
    """
    logits = logits.float()
    if temperature > 0 and temperature != 1.0:
        logits = logits / temperature
    if temperature > 0 and top_p < 1.0:
        ordered, indices = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the mass of all more likely tokens
        outside = before >= top_p
        outside[..., 0] = False
        ordered = ordered.masked_fill(outside, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, indices, ordered)
    return logits.log_softmax(-1)


def draw(logits: Tensor, sampling: SamplingSettings, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the next tokens [B] from `logits` [B, V]; return them and their log-probs [B].

    uniform: [B], a number for each as in `draw_tokens`.
    """
    distribution = sampling_logprobs(logits, sampling.temperature, sampling.top_p)
    greedy = sampling.temperature == 0
    tokens = distribution.argmax(-1) if greedy else draw_tokens(distribution, uniform)
    return tokens, distribution.gather(-1, tokens[:, None])[:, 0]


def draw_tokens(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Draw token ids [B] int64 from `logprobs` [B, V] by inverting the cumulative distribution.

    uniform: [B] float32 in [0, 1), one number a token. A token depends on its own number and its own
    distribution only, so a sequence is the same whichever other sequences share its batch.
    """
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may lift the threshold to the total itself, and then no token would be above it.
    threshold = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # At most the last: NaN lies nowhere, and `as_rollouts` reports it.
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logprobs.shape[-1] - 1)


def uniform_numbers(counts: Sequence[int], sampling: SamplingSettings) -> list[Tensor]:
    """Return [counts[q], max_tokens] float32 in [0, 1) for each prompt q: a number for every token."""
    if sampling.temperature == 0:
        return [torch.zeros(count, sampling.max_tokens) for count in counts]
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
