"""Advantages: how much better each response is than its group. Q questions, G responses each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, scale: AdvantageScale = "group", eps: float = 1e-4) -> Tensor:
    """A = (R − mean) ÷ (std + eps), the mean taken in each group.

    rewards: [Q, G] float. Returns [Q, G] of the same dtype; 0 throughout a group of equal rewards.
    scale: what the standard deviation is taken over. `group`: the group's own G rewards (GRPO,
    arXiv 2402.03300); `batch`: all Q·G rewards; `none`: no division (Dr. GRPO, arXiv 2503.20783).
    It is the sample standard deviation (÷ (n − 1)), as in TRL and in Video-R1's code.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; [questions, responses] is needed")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # The mean of equal numbers can be off by a rounding error, which ÷ eps would make visible.
    centred = centred.masked_fill(without_variance(rewards)[:, None], 0.0)
    if scale == "none":
        return centred
    if scale == "group":
        # One response has no deviation (its sample standard deviation is 0 ÷ 0); its advantage is 0 anyway.
        std = rewards.std(dim=1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(rewards)
    elif scale == "batch":
        std = rewards.std() if rewards.numel() > 1 else torch.zeros_like(rewards)
    else:
        raise ValueError(f"unknown scale {scale!r}; it is group, batch or none")
    return centred / (std + eps)


def without_variance(rewards: Tensor) -> Tensor:
    """Which groups teach nothing because all their rewards are equal: [Q, G] → [Q] bool."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)
