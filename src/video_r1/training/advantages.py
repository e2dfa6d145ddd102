"""Advantages: how much better each response is than its group. Q questions, G responses each.

    A = w · (R − mean) ÷ (std + eps)

The mean is the group's; std is that of `scale_rewards`, and w that of the temporal rule `weight` or, for each
token, `tokens` (else 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from video_r1.rewards.shaping import KEY_TOKENS
from video_r1.settings.training import AdvantageScale

SCALED_BOUND = 5.0  # beyond which an advantage scaled by its task is scaled by its group instead
SMALLEST_DEVIATION = 1e-3  # of a task's rewards
Moments = tuple[float, float]
"""E[R] and E[R²] of a task."""


def group_advantages(
    rewards: Tensor,
    scale: AdvantageScale = "group",
    eps: float = 1e-4,
    task_deviations: Tensor | None = None,
) -> Tensor:
    """A = (R − mean) ÷ (std + eps), the mean taken in each group.

    rewards: [Q, G] float. Returns [Q, G] of the same dtype; 0 throughout a group of equal rewards.
    scale: what the standard deviation is taken over. `group`: the group's own G rewards (GRPO,
    arXiv 2402.03300); `batch`: all Q·G rewards; `none`: no division (Dr. GRPO, arXiv 2503.20783); `task`:
    task_deviations [Q], the running ones of each question's problem type (EMA-GRPO, the code of OneThinker,
    arXiv 2512.03043), but the group's own where an |A| would be above 5.
    It is the sample standard deviation (÷ (n − 1)), as in TRL and in Video-R1's code.
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


def added_apart(advantages: Tensor, bonus: Tensor) -> Tensor:
    """A + (b − mean(b)): a bonus beside advantages that are divided already.

    advantages, bonus: [Q, G]. The division can neither cancel the bonus nor blow up small differences of it
    in a group that is right throughout: it counts in its own unit.
    """
    return advantages + bonus - bonus.mean(dim=1, keepdim=True)


def updated_moments(
    moments: Mapping[str, Moments], rewards: Tensor, tasks: Sequence[str], decay: float = 0.99
) -> dict[str, Moments]:
    """E[R] and E[R²] of every task after a step: E ← decay·E + (1 − decay)·mean over the step's responses.

    rewards: [Q, G] of all processes; tasks: the problem type of each question. A task that is new starts with
    the step's means, one that the step has not asked stays as it is (the code of OneThinker, arXiv
    2512.03043). The sums are exact, so that the order of the questions has no part in them.
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


def question_weights(margins: Sequence[float | None], kappa: float) -> Tensor:
    """w = (1 + κ·max(0, p − p̃)) ÷ its mean over the videos: questions that need the frame order count more.

    margins: p − p̃ of each question of the step, in all processes; None for an image, which weighs 1. Returns
    [Q] float32, of mean 1. It multiplies advantages after their normalisation, which cannot cancel it.
    """
    raw = [None if margin is None else 1.0 + kappa * max(0.0, margin) for margin in margins]
    videos = [weight for weight in raw if weight is not None]
    mean = math.fsum(videos) / len(videos) if videos else 1.0
    return torch.tensor([1.0 if weight is None else weight / mean for weight in raw], dtype=torch.float32)


def token_weights(drops: Tensor, kappa: float) -> Tensor:
    """w_t = (1 + κ·key_t) ÷ its mean over the response: tokens that need the frame order count more.

    drops: [L] float, d_t = log π(o_t | V) − log π(o_t | Ṽ) of one response (logprob_contrast.py). key_t is 1
    where |d_t| is among the largest fifth (⌈L/5⌉ tokens and those that equal the least of them), else 0.
    Returns [L] of mean 1: a response counts the same whatever its length. Video-KTR (arXiv 2601.19686) trains
    the largest fifth alone, κ → ∞, joined with those of masked frames and of entropy.
    """
    change = drops.abs()
    least = change.sort(descending=True).values[: -(-len(drops) // KEY_TOKENS)][-1:]
    raw = 1.0 + kappa * (change >= least).to(drops.dtype)
    return raw / raw.mean()


def without_variance(rewards: Tensor) -> Tensor:
    """Which groups teach nothing because all their rewards are equal: [Q, G] → [Q] bool."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)
