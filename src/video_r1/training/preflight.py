"""Checks before the first step: a reward is in reach, and the engine samples from the policy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rewards, Rollouts
from video_r1.errors import VideoR1Error
from video_r1.files import warn_once
from video_r1.models.group_forward import group_logprobs
from video_r1.processes import gather, gather_lists
from video_r1.rollout.engine import RolloutEngine, SamplingSettings, eval_mode

# Mean absolute difference of log-probs. With the same weights it is about 0.01 in bfloat16, 1e-5 in float32.
SUSPICIOUS = 0.05
CHECKED_QUESTIONS, CHECKED_TOKENS = 4, 16


class StartChecks(TrainerCallback):
    """Calls `check` before the first step of a new or resumed run."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.check()


def check_rewards(rollouts: Sequence[Rollouts], rewards: Sequence[Rewards]) -> None:
    """Raise VideoR1Error when no completion of any question, on any rank, earns a reward."""
    mine = [
        (float(total), rollout.finish_reason == "length", len(rollout.token_ids), rollout.text)
        for one, own in zip(rollouts, rewards, strict=True)
        for rollout, total in zip(one.ordered, own.total, strict=True)
    ]
    completions, _ = gather_lists(mine)
    if not completions:
        return
    totals, truncated, lengths, texts = zip(*completions, strict=True)
    share = sum(truncated) / len(completions)
    if not any(totals):
        remedy = "Run SFT first, or set prompt_template to the prompt that the model was trained with"
        if share > 0.9:
            cut = f"{share:.0%} of them were cut off at max_completion_length ({max(lengths)} tokens)"
            remedy = f"{cut}: raise it or run SFT first"
        raise VideoR1Error(
            f"none of {len(completions)} completions earns any reward, so there is nothing to learn from: no "
            f"right answer in <think>…</think><answer>…</answer> among them. {remedy}. One of them: "
            f"{texts[0][:160]!r}. (preflight_questions 0 skips this check.)"
        )


def warn_of_difference(difference: float) -> None:
    if difference > SUSPICIOUS:
        warn_once(
            f"vLLM's log-probs differ from the trainer's by more than {SUSPICIOUS} on average (rounding: "
            "about 0.01); check that both have the same weights, number format and processor files"
        )


@torch.no_grad()
def sampler_difference(
    engine: RolloutEngine, model: nn.Module, prompts: Sequence[Prompt], temperature: float
) -> float:
    """Sync the weights; return the mean of |log π_trainer − log π_sampler| over some tokens of all ranks."""
    with eval_mode(model):
        engine.update_weights(model)
        sampling = SamplingSettings(temperature=temperature, max_tokens=CHECKED_TOKENS, seed=0)
        groups = engine.sample(prompts, sampling)
        completions = [[rollout.token_ids for rollout in group] for group in groups]
        pieces = [[rollout.pieces() for rollout in group] for group in groups]
        scored = group_logprobs(model, prompts, completions, temperature, pieces=pieces).logprobs
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group])
    parts = gather((float((scored - sampled.to(scored)).abs().sum()), len(sampled)))
    return sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))
