"""The difference between the engine that samples and the model that is trained, measured and corrected."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.engine import RolloutGroup, SamplingSettings
from video_r1.settings.vllm import VLLMSettings
from video_r1.training.metrics_log import Meter
from video_r1.training.objective import importance_weights
from video_r1.training.processes import gather
from video_r1.training.questions import Slot

if TYPE_CHECKING:
    from video_r1.training.tgrpo import TGRPOTrainer

logger = logging.getLogger(__name__)

# Mean absolute difference of log-probs. With the same weights it is about 0.01 in bfloat16, 1e-5 in float32.
SUSPICIOUS = 0.05
CHECKED_QUESTIONS, CHECKED_TOKENS = 4, 16


def sampler_weights(
    trainer_logprobs: Tensor, groups: Sequence[RolloutGroup], settings: VLLMSettings, meter: Meter
) -> Tensor | None:
    """Importance weights [N] of the groups' ordered completion tokens, min(π_trainer ÷ π_sampler, cap); None
    where the settings want no correction.

    trainer_logprobs: [N] of the model before the update. Adds to the series `sampler/logprob_difference`
    (mean), `sampler/logprob_difference_max` and `sampler/share_capped`.
    """
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group.ordered])
    result = importance_weights(
        trainer_logprobs, sampled.to(trainer_logprobs), settings.vllm_importance_sampling_cap
    )
    tokens = len(sampled)
    meter.add("sampler/logprob_difference", float(result.mean_difference) * tokens, tokens)
    meter.peak("sampler/logprob_difference_max", float(result.max_difference))
    meter.add("sampler/share_capped", float(result.share_capped) * tokens, tokens)
    return result.weights if settings.vllm_importance_sampling_correction else None


class SamplerCheck(TrainerCallback):
    """Says so when sampler and trainer are further apart than rounding explains: on a few tokens before the
    first step, and once when a logged mean shows it later (weights that did not arrive).
    """

    def __init__(self, trainer: TGRPOTrainer) -> None:
        self.trainer = trainer
        self.said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parts = gather(sampler_difference(self.trainer))
        self.compare(sum(total for total, _ in parts) / max(1, sum(count for _, count in parts)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.trainer.settings.async_rollouts:  # the weights that sample are old ones there
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
def sampler_difference(trainer: TGRPOTrainer) -> tuple[float, int]:
    """Sum of |log π_trainer − log π_sampler| over some tokens of the run's first questions, in both frame
    orders, after a hand-over; and how many tokens they are.
    """
    assert trainer.source is not None
    slots = [Slot(0, index) for index in range(min(CHECKED_QUESTIONS, len(trainer.source.samples)))]
    questions = [future.result().content for future in [trainer.source.submit(slot) for slot in slots]]
    prompts = [question.ordered for question in questions]
    prompts += [question.shuffled for question in questions if question.shuffled is not None]
    temperature = trainer.settings.temperature
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    try:
        with trainer.whole_weights(), trainer.accelerator.autocast():
            trainer.engine.update_weights(model)
            groups = trainer.engine.generate(
                prompts, SamplingSettings(temperature=temperature, max_tokens=CHECKED_TOKENS, seed=0)
            )
            completions = [[rollout.token_ids for rollout in group] for group in groups]
            scored = group_logprobs(model, prompts, completions, temperature=temperature).logprobs
    finally:
        model.train(was_training)
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group])
    return float((scored - sampled.to(scored)).abs().sum()), len(sampled)
