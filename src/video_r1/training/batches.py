"""A step's rollouts and micro-batches.

The policy samples a step's rollouts before its update, or with `async_rollouts` one step ahead on a server:

    step t:   collect the rollouts of t ─► sync θ_t ─► start sampling t+1 ─► update to θ_t+1

The rollouts of step t+1 then come from θ_t, one update old. The first step of an epoch or of a resumed run
has nothing to collect: the current weights sample it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.models.group_forward import GroupLogprobs, VisualFeatures
from video_r1.processes import gather, process_count
from video_r1.rollout.engine import RolloutEngine, SamplingSettings, sample_rollouts
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.vllm import VLLMSettings
from video_r1.training.metrics import Meter, warn_once
from video_r1.training.objective import high_entropy, importance_weights, loss_normaliser, objective_of
from video_r1.training.questions import Ready


class Sampled(NamedTuple):
    """Completions of questions, ordered [Q][G] and shuffled [Q][H or 0]; seconds that the engine took."""

    ordered: list[list[Rollout]]
    shuffled: list[list[Rollout]]
    seconds: float


class StepRollouts:
    """Samples a step's questions: G completions each in frame order, H with frames shuffled.

    settings: TGRPOSettings and VLLMSettings. policy: a context in which every rank has the whole model.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        settings: Any,
        meter: Meter,
        policy: Callable[[], AbstractContextManager[nn.Module]],
    ) -> None:
        self.engine = engine
        self.sampling = SamplingSettings(
            n=settings.num_generations,
            temperature=settings.temperature,
            max_tokens=settings.max_completion_length,
        )
        self.shuffled_n: int = settings.shuffled_generations
        self.uses_vllm: bool = settings.use_vllm
        self.meter = meter
        self.policy = policy
        self.thread = ThreadPoolExecutor(1, "rollouts-ahead") if settings.async_rollouts else None
        self.under_way: Future[Sampled] | None = None

    def of_step(self, questions: Sequence[Question]) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """Return the step's ordered completions [Q][G] and shuffled ones [Q][H or 0]: those sampled ahead, or
        else those of the current policy. Raises the errors of sampling and reading.
        """
        with self.meter.seconds("rollout"):
            ahead, self.under_way = self.under_way, None
            sampled = self.sample(questions) if ahead is None else ahead.result()
        self.meter.speeds([*sampled.ordered, *sampled.shuffled], sampled.seconds)
        if self.uses_vllm:
            self.meter.add("sampler/staleness", ahead is not None)
        return sampled.ordered, sampled.shuffled

    def sample(self, questions: Sequence[Question]) -> Sampled:
        """Sample with the current policy."""
        with self.policy() as model:
            self.engine.update_weights(model)
            sampled = self._sample(questions)
        self.engine.rest()
        return sampled

    def begin_next(self, pending: Sequence[Future[Ready[Question]]]) -> None:
        """Start sampling the next step's questions with the current policy, if rollouts are sampled ahead.

        Nothing else may use the engine until `wait` returns.
        """
        if self.thread is not None and pending:
            with self.policy() as model:
                self.engine.update_weights(model)
            self.under_way = self.thread.submit(
                lambda: self._sample([question.result().content for question in pending])
            )

    def wait(self) -> None:
        """Wait until nothing is being sampled; `of_step` raises the errors."""
        if self.under_way is not None:
            self.under_way.exception()

    def _sample(self, questions: Sequence[Question]) -> Sampled:
        started = time.perf_counter()
        ordered, shuffled = sample_rollouts(self.engine, questions, self.sampling, self.shuffled_n)
        return Sampled(ordered, shuffled, time.perf_counter() - started)


@dataclass(slots=True)
class PolicyBatch:
    """A micro-batch of groups, and the values that all updates on the same rollouts share.

    The model sees only `trained`: Q questions with N completion tokens in all. They include groups of equal
    rewards if these count (`flat_groups_count`).
    """

    groups: list[RolloutGroup]
    trained: list[RolloutGroup]
    old_logprobs: Tensor | None = None  # [N], of the policy that sampled
    ref_logprobs: Tensor | None = None  # [N]
    sampler_weights: Tensor | None = None  # [N], if vLLM sampled
    vision: list[VisualFeatures | None] | None = None  # one per question, if the vision tower is frozen

    @property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self.trained]

    @property
    def completions(self) -> list[list[Tensor]]:
        return [[rollout.token_ids for rollout in group.ordered] for group in self.trained]

    @property
    def advantages(self) -> Tensor:
        """[completions]"""
        return torch.cat([group.advantages for group in self.trained])

    @property
    def finished(self) -> Tensor:
        """[completions] bool: False for those that were cut at the longest length."""
        rollouts = [rollout for group in self.trained for rollout in group.ordered]
        return torch.tensor([rollout.finish_reason != "length" for rollout in rollouts])

    def token_weights(self, kept: Tensor | None) -> Tensor | None:
        """[N], factors of each token's policy term: the temporal rule's weight (1 for a group without one)
        times the sampler's, and 0 for tokens that are not kept ([N] bool; None: all are). None: all 1.
        """
        weights = self.sampler_weights
        if any(group.token_weights is not None for group in self.trained):
            ones = ([torch.ones(len(r.token_ids)) for r in group.ordered] for group in self.trained)
            own = (group.token_weights or each for group, each in zip(self.trained, ones, strict=True))
            temporal = torch.cat([weight for group in own for weight in group])
            weights = temporal if weights is None else temporal.to(weights) * weights
        if kept is None:
            return weights
        return kept.float() if weights is None else kept * weights.to(kept.device)

    @property
    def problem_ids(self) -> list[str | int]:
        return [group.sample.problem_id for group in self.trained]


@dataclass(slots=True)
class Step:
    """Micro-batches of one optimizer step, which all updates on their rollouts share.

    normaliser: of the loss (`loss_normaliser`); entropy_tokens: tokens that entropies are averaged over. Both
    are sums over all ranks divided by the number of ranks, since gradients are averaged over ranks.
    """

    batches: list[PolicyBatch]
    normaliser: float
    entropy_tokens: float
    is_recorded: bool = False  # in rollouts.jsonl


def step_of(
    groups: Sequence[RolloutGroup],
    sizes: Sequence[int],
    vision: Sequence[VisualFeatures | None] | None,
    settings: TGRPOSettings,
) -> Step:
    """Split scored groups into micro-batches of these sizes. vision: features of their prompts, if known.

    Every rank calls it with its own groups. At least one group of each micro-batch is trained on, so that
    every rank has a loss.
    """
    remaining, batches, all_count = iter(range(len(groups))), [], flat_groups_count(settings)
    for size in sizes:
        part = [next(remaining) for _ in range(size)]
        trained = [n for n in part if all_count or bool(groups[n].advantages.any())] or part[:1]
        batch = PolicyBatch([groups[n] for n in part], [groups[n] for n in trained])
        batch.vision = None if vision is None else [vision[n] for n in trained]
        batches.append(batch)

    rollouts = [rollout for group in groups for rollout in group.ordered]
    masked = settings.mask_truncated_completions
    counted = [rollout for rollout in rollouts if not (masked and rollout.finish_reason == "length")]
    counts = gather((len(rollouts), sum(len(rollout.token_ids) for rollout in counted)))
    responses, tokens = (sum(column) for column in zip(*counts, strict=True))
    normaliser = loss_normaliser(settings.loss_type, responses, tokens, settings.max_completion_length)
    entropy_tokens = max(1.0, tokens * settings.top_entropy_quantile)
    return Step(batches, normaliser / process_count(), entropy_tokens / process_count())


def flat_groups_count(settings: TGRPOSettings) -> bool:
    """Whether groups of equal rewards matter although their advantages of 0 add nothing to the policy term:
    for a KL or entropy term, as tokens that a micro-batch is averaged over (bnpo), or as tokens among which
    the entropies of others are ranked.
    """
    own_terms = settings.beta != 0 or settings.entropy_coef != 0
    averaged = objective_of(settings.loss_type).average == "micro_batch"
    return own_terms or averaged or settings.top_entropy_quantile < 1


def kept_tokens(batch: PolicyBatch, policy: GroupLogprobs, settings: TGRPOSettings) -> Tensor | None:
    """[N] bool: the share `top_entropy_quantile` of highest entropy among the tokens that count in this
    micro-batch of all ranks; None: all. Every rank calls it.
    """
    if settings.top_entropy_quantile == 1.0:
        return None
    assert policy.entropy is not None
    entropy = policy.entropy.detach()
    counted = batch.finished if settings.mask_truncated_completions else torch.ones(len(policy.lengths))
    among = entropy.cpu()[torch.repeat_interleave(counted.bool(), policy.lengths.cpu())]
    everywhere = torch.cat(gather(among))
    return high_entropy(entropy, everywhere.to(entropy), settings.top_entropy_quantile)


def sampler_weights(
    trainer_logprobs: Tensor, groups: Sequence[RolloutGroup], settings: VLLMSettings, meter: Meter
) -> Tensor | None:
    """Return importance weights [N] of the groups' ordered completion tokens (`importance_weights`); None if
    the settings want no correction.

    trainer_logprobs: [N] of the model before the update, detached. Adds to the series
    `sampler/logprob_difference` (mean), `sampler/logprob_difference_max` and `sampler/share_capped`.
    """
    if settings.vllm_importance_sampling_cap is not None:
        warn_once("vllm_importance_sampling_cap still works; it is vllm_importance_sampling_clip_max now")
    rollouts = [rollout for group in groups for rollout in group.ordered]
    sampled = torch.cat([rollout.logprobs for rollout in rollouts]).to(trainer_logprobs)
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts], device=sampled.device)
    difference = trainer_logprobs - sampled  # [N]
    mode, bounds = settings.vllm_importance_sampling_mode, settings.importance_bounds
    weights, tokens = importance_weights(difference, lengths, mode, bounds), len(sampled)
    meter.add("sampler/logprob_difference", float(difference.abs().sum()), tokens)
    meter.peak("sampler/logprob_difference_max", float(difference.abs().max()))
    unbounded = importance_weights(difference, lengths, mode, (0.0, math.inf))
    meter.add("sampler/share_capped", float((weights != unbounded).sum()), tokens)
    return weights if settings.vllm_importance_sampling_correction else None
