"""Checks before the first step: is a reward in reach, and do sampler and trainer agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import RolloutGroup
from video_r1.errors import VideoR1Error
from video_r1.models.group_forward import group_logprobs
from video_r1.processes import gather, process_index
from video_r1.rewards.group import RewardTerms
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.transformers import eval_mode
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.vllm import VLLMSettings
from video_r1.training.metrics import Meter, warn_once
from video_r1.training.objective import importance_weights

logger = logging.getLogger(__name__)

# Mean absolute difference of log-probs. With the same weights it is about 0.01 in bfloat16, 1e-5 in float32.
SUSPICIOUS = 0.05
CHECKED_QUESTIONS, CHECKED_TOKENS = 4, 16


class Preflight(TrainerCallback):
    """`check_rewards` of the run's first questions before its first step. groups: samples and scores them."""

    def __init__(self, groups: Callable[[], list[RolloutGroup]]) -> None:
        self.groups = groups

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.global_step == 0:
            check_rewards(self.groups())


def warn_of_cancelled_bonus(terms: RewardTerms, settings: TGRPOSettings) -> None:
    """Says so, in the first process, when the settings make the temporal reward cancel: where a group has
    rewards of two values, advantages divided by its deviation are the same for any bonus (docs/t-grpo.md).
    """
    shared = settings.temporal_rule in ("margin", "threshold") and "temporal" in terms.names
    adds = shared and settings.temporal_alpha * terms.weights.get("temporal", 1.0) != 0
    telling = {name for name in terms.names if terms.weights.get(name, 1.0) != 0}
    two_values = telling <= {"accuracy", "format", "temporal"}
    if adds and two_values and settings.scale_rewards == "group" and process_index() == 0:
        logger.warning(
            "the temporal reward will change next to nothing: answers are right or wrong, right ones get the "
            "same bonus, and scale_rewards group divides it out (docs/t-grpo.md; see the series "
            "temporal/credit). Set scale_rewards to task, batch or none, or temporal_rule to weight, "
            "tokens or likelihood, which reach the gradient, or to off to save the shuffled completions"
        )


def check_rewards(groups: list[RolloutGroup]) -> None:
    """Raises VideoR1Error when no completion of any group, in any process, earns a reward. A reward that is
    the same everywhere but not 0 is only warned of.
    """
    mine = [
        (float(total), rollout.finish_reason == "length", len(rollout.token_ids), rollout.text)
        for group in groups
        for rollout, total in zip(group.ordered, group.total_reward, strict=True)
    ]
    completions = [entry for part in gather(mine) for entry in part]
    if not completions:
        return
    truncated = sum(cut for _, cut, _, _ in completions) / len(completions)
    example = completions[0][3][:160]
    if all(total == 0 for total, _, _, _ in completions):
        remedy = (
            "Run SFT first so that the model learns the format, or name the prompt that it was trained with "
            "in prompt_template"
        )
        if truncated > 0.9:
            longest = max(length for _, _, length, _ in completions)
            remedy = (
                f"{truncated:.0%} of them were cut off at max_completion_length ({longest} tokens): raise it "
                "or run SFT first"
            )
        raise VideoR1Error(
            f"none of {len(completions)} completions earns any reward, so there is nothing to learn from: no "
            f"right answer in <think>…</think><answer>…</answer> among them. {remedy}. One of them: "
            f"{example!r}. (preflight_questions 0 skips this check.)"
        )
    if len({total for total, _, _, _ in completions}) == 1:
        logger.warning(
            "preflight: all %d completions earn the same reward; groups without variance teach nothing",
            len(completions),
        )


def sampler_weights(
    trainer_logprobs: Tensor, groups: Sequence[RolloutGroup], settings: VLLMSettings, meter: Meter
) -> Tensor | None:
    """Importance weights [N] of the groups' ordered completion tokens (`importance_weights`). None where the
    settings want no correction.

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


class SamplerCheck(TrainerCallback):
    """Says so when sampler and trainer are further apart than rounding explains: on a few tokens before the
    first step, and once when a logged mean shows it later (weights that did not arrive).

    difference: what `sampler_difference` gives for some of the run's questions. while_training: off where the
    weights that sample are old ones on purpose.
    """

    def __init__(self, difference: Callable[[], tuple[float, int]], while_training: bool = True) -> None:
        self.difference = difference
        self.while_training = while_training
        self.said = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        parts = gather(self.difference())
        self.compare(sum(total for total, _ in parts) / max(1, sum(count for _, count in parts)))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **rest: Any) -> None:
        if self.while_training:
            self.compare((logs or {}).get("sampler/logprob_difference", 0.0))

    def compare(self, difference: float) -> None:
        if difference > SUSPICIOUS and not self.said:
            logger.warning(
                "vLLM's log-probs differ from the trainer's by %.3f on average (rounding: up to about 0.01); "
                "check that both have the same weights, number format and processor files",
                difference,
            )
            self.said = True


@torch.no_grad()
def sampler_difference(
    engine: RolloutEngine, model: nn.Module, prompts: Sequence[Prompt], temperature: float
) -> tuple[float, int]:
    """After a hand-over: |log π_trainer − log π_sampler|, summed over some tokens; how many they are."""
    with eval_mode(model):
        engine.update_weights(model)
        groups = engine.generate(
            prompts, SamplingSettings(temperature=temperature, max_tokens=CHECKED_TOKENS, seed=0)
        )
        completions = [[rollout.token_ids for rollout in group] for group in groups]
        scored = group_logprobs(model, prompts, completions, temperature=temperature).logprobs
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group])
    return float((scored - sampled.to(scored)).abs().sum()), len(sampled)
