"""Advantages: how much better each completion is than its group. Pure functions; Q questions, G completions.

    A = (R − mean) ÷ (std + eps)

The mean is the group's; `scale_rewards` says what the standard deviation is taken over. A temporal rule may
change the result (rewards/temporal.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from video_r1.settings.training import AdvantageScale

SCALED_BOUND = 5.0  # a larger |A| by the task's deviation is replaced by A with the group's own deviation
SMALLEST_DEVIATION = 1e-3  # of a task's rewards
Moments = tuple[float, float]
"""E[R] and E[R²] of a task."""


def group_advantages(
    rewards: Tensor,
    scale: AdvantageScale = "group",
    eps: float = 1e-4,
    task_deviations: Tensor | None = None,
) -> Tensor:
    """Return A = (R − mean) ÷ (std + eps), [Q, G] of the dtype of rewards [Q, G]; the mean is each group's.

    A group of equal rewards has 0 throughout. scale: what the standard deviation is taken over. `group`: the
    group's own G rewards (GRPO, arXiv 2402.03300); `batch`: all Q·G rewards; `none`: no division (Dr. GRPO,
    arXiv 2503.20783); `task`: task_deviations [Q], running deviations of each question's problem type
    (EMA-GRPO, the code of OneThinker, arXiv 2512.03043), but the group's own if an |A| exceeds 5.
    It is the sample standard deviation (÷ (n − 1)), as in TRL and in Video-R1's code. Raises ValueError.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; [questions, responses] is needed")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # The mean of equal numbers can be off by a rounding error, which ÷ eps would make visible.
    centred = centred.masked_fill(without_variance(rewards)[:, None], 0.0)
    if scale == "none":
        return centred
    # One response has no deviation (its sample standard deviation is 0 ÷ 0); its advantage is 0 anyway.
    own = rewards.std(dim=1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(rewards)
    if scale == "group":
        std = own
    elif scale == "batch":
        std = rewards.std() if rewards.numel() > 1 else torch.zeros_like(rewards)
    elif scale == "task" and task_deviations is not None:
        std = task_deviations.to(rewards)[:, None]
        beyond = (centred / (std + eps)).abs().amax(dim=1, keepdim=True) > SCALED_BOUND
        std = torch.where(beyond, own, std)
    else:
        raise ValueError(f"unknown scale {scale!r}; it is group, batch, none, or task with its deviations")
    return centred / (std + eps)


def without_variance(rewards: Tensor) -> Tensor:
    """[Q, G] → [Q] bool: True for groups that teach nothing because all their rewards are equal."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def updated_moments(
    moments: Mapping[str, Moments], rewards: Tensor, tasks: Sequence[str], decay: float = 0.99
) -> dict[str, Moments]:
    """Update E[R] and E[R²] of every task: E ← decay·E + (1 − decay)·mean over the step's completions.

    rewards: [Q, G] of all ranks; tasks: the problem type of each question. A new task starts with the step's
    means; a task without questions in this step is unchanged (the code of OneThinker, arXiv 2512.03043). The
    sums are exact, so the result does not depend on the order of the questions.
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
