"""Advantages of Q questions with G completions each: A = (R − mean) ÷ (std + 1e-4).

The mean is the group's; `scale_rewards` says what the standard deviation is taken over.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from video_r1.settings.training import AdvantageScale

EPSILON = 1e-4  # keeps a deviation above 0
SCALED_BOUND = 5.0  # a larger |A| by the task's deviation is replaced by A with the group's own deviation
SMALLEST_DEVIATION = 1e-3  # of a task's rewards
Moments = tuple[float, float]
"""E[R] and E[R²] of a task."""


def group_advantages(
    rewards: Tensor,
    scale: AdvantageScale = "group",
    floor: Tensor | None = None,
    task_deviations: Tensor | None = None,
) -> Tensor:
    """Return A = (R − mean) ÷ (std + 1e-4), [Q, G] as rewards [Q, G]; 0 in a group of equal rewards.

    scale: what the sample standard deviation is taken over. `group`: the group's own G rewards (GRPO, arXiv
    2402.03300); `batch`: all Q·G rewards; `none`: no division (Dr. GRPO, arXiv 2503.20783); `task`:
    task_deviations [Q], running deviations of each question's problem type (the code of OneThinker, arXiv
    2512.03043), but the group's own if an |A| exceeds 5. floor: [Q, 1], added to a group's own deviation.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # The mean of equal numbers can be off by a rounding error, which ÷ EPSILON would make visible.
    centred = centred.masked_fill(without_variance(rewards)[:, None], 0.0)
    if scale == "none":
        return centred
    # One response has no deviation (its sample standard deviation is 0 ÷ 0); its advantage is 0 anyway.
    own = rewards.std(dim=1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(rewards)
    own = own if floor is None else own + floor
    if scale == "group":
        std = own
    elif scale == "batch":
        std = rewards.std() if rewards.numel() > 1 else torch.zeros_like(rewards)
    else:
        assert task_deviations is not None, "the scale task needs deviations"
        std = task_deviations.to(rewards)[:, None]
        beyond = (centred / (std + EPSILON)).abs().amax(dim=1, keepdim=True) > SCALED_BOUND
        std = torch.where(beyond, own, std)
    return centred / (std + EPSILON)


def without_variance(rewards: Tensor) -> Tensor:
    """[Q, G] → [Q] bool: True where all rewards of a group are equal."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def updated_moments(
    moments: Mapping[str, Moments], rewards: Tensor, tasks: Sequence[str], decay: float = 0.99
) -> dict[str, Moments]:
    """Update E[R] and E[R²] of the step's tasks: E ← decay·E + (1 − decay)·mean over the step's completions.

    rewards: [Q, G] of all ranks; tasks: the problem type of each question. A new task starts with the step's
    means. The sums are exact: the result does not depend on the order of the questions.
    """
    updated = dict(moments)
    for task in sorted(set(tasks)):
        own = [row for row, name in zip(rewards.tolist(), tasks, strict=True) if name == task]
        values = [value for row in own for value in row]
        means = math.fsum(values) / len(values), math.fsum(v * v for v in values) / len(values)
        if task in moments:
            old = moments[task]
            means = decay * old[0] + (1 - decay) * means[0], decay * old[1] + (1 - decay) * means[1]
        updated[task] = means
    return updated


def deviation(moments: Moments) -> float:
    """√(E[R²] − E[R]²), at least 0.001."""
    mean, mean_square = moments
    return max(SMALLEST_DEVIATION, math.sqrt(max(0.0, mean_square - mean * mean)))


class TaskMoments(TrainerCallback, ExportableState):
    """Running E[R] and E[R²] of each problem type, for `scale_rewards` task: the same on every rank, and
    saved in trainer_state.json.
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
        """Add this step's rewards [Q, G]; return the deviation [Q] of each question's task."""
        self.moments = updated_moments(self.moments, rewards, tasks)
        return torch.tensor([deviation(self.moments[task]) for task in tasks])
