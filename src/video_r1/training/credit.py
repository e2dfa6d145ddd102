"""What a step's responses are worth: rewards become advantages, compared over all processes.

rewards R, shares p and p̃ of all processes ─┬► A = w · (R − mean) ÷ (std + eps)     (advantages.py)
                                            └► A without the temporal term, for the series temporal/credit
drops d of a response's own tokens ──────────► w of each token, by which its A is multiplied
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from video_r1.data.rollouts import RolloutGroup
from video_r1.processes import gather_lists
from video_r1.settings.training import TGRPOSettings
from video_r1.training.advantages import (
    Moments,
    added_apart,
    deviation,
    group_advantages,
    question_weights,
    token_weights,
    updated_moments,
)


class TaskMoments(TrainerCallback, ExportableState):
    """Running E[R] and E[R²] of each problem type, for `scale_rewards` task.

    They are the same in every process, and lie in a checkpoint's trainer_state.json: a continued run goes on
    with exactly these.
    """

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"moments": self.moments}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        callbacks: Any = state.stateful_callbacks  # of a new run or of the checkpoint
        saved = callbacks[type(self).__name__]["attributes"]["moments"]
        self.moments = {task: (mean, mean_square) for task, (mean, mean_square) in saved.items()}

    def deviations(self, rewards: Tensor, tasks: Sequence[str]) -> Tensor:
        """[Q], of each question's task, after this step's rewards [Q, G] have joined them."""
        self.moments = updated_moments(self.moments, rewards, tasks)
        return torch.tensor([deviation(self.moments[task]) for task in tasks])


def give_advantages(
    groups: Sequence[RolloutGroup], settings: TGRPOSettings, tasks: TaskMoments | None = None
) -> None:
    """Gives a step's groups their advantages, those that they would have without the temporal term, and the
    weights of their tokens.

    Every process calls it with its own groups. tasks: for `scale_rewards` task.
    """
    everyone, mine = gather_lists(
        [(g.total_reward, g.base_reward, g.sample.problem_type, g.margin) for g in groups]
    )
    rewards, without, types, margins = zip(*everyone, strict=True)
    rewards, without = torch.stack(rewards), torch.stack(without)  # [Q, G]
    deviations = None if tasks is None else tasks.deviations(rewards, types)
    # The deviation of a task is that of the rewards with the temporal term, here as well
    base = group_advantages(without, settings.scale_rewards, task_deviations=deviations)
    if settings.temporal_rule == "likelihood_apart":
        advantages = added_apart(base, rewards - without)
    else:
        advantages = group_advantages(rewards, settings.scale_rewards, task_deviations=deviations)
    if settings.temporal_rule == "weight":
        advantages = advantages * question_weights(margins, settings.temporal_weight_kappa)[:, None]
    for group, own, plain in zip(groups, advantages[mine], base[mine], strict=True):
        group.advantages, group.base_advantages = own, plain
        if settings.temporal_rule == "tokens" and group.token_drops is not None:
            kappa = settings.temporal_weight_kappa
            group.token_weights = [token_weights(drops, kappa) for drops in group.token_drops]
