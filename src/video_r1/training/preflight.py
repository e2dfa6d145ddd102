"""A few rollouts before training, to stop at once where no reward is in reach."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from video_r1.errors import VideoR1Error
from video_r1.rollout.engine import RolloutGroup
from video_r1.training.processes import gather

if TYPE_CHECKING:
    from video_r1.training.tgrpo import TGRPOTrainer

logger = logging.getLogger(__name__)


class Preflight(TrainerCallback):
    """Samples the first questions of the run before its first step. Raises VideoR1Error when all earn
    nothing.
    """

    def __init__(self, trainer: TGRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        count = self.trainer.settings.preflight_questions
        if count > 0 and state.global_step == 0:
            check_rewards(self.trainer.preflight_groups(count))


def check_rewards(groups: list[RolloutGroup]) -> None:
    """Raises VideoR1Error when no completion of any group, in any process, earns a reward, and says what to
    do.

    A reward that is the same everywhere but not 0 is only warned of.
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
