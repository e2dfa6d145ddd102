"""The entropy bonus of a step on a real tiny model: its value, its gradient, its effect."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from test_tgrpo import assert_same_step, plain_logits
from tgrpo_trainers import first_step, make_trainer, policy_of
from torch import Tensor

from video_r1.data.rollouts import Group


def nothing(completions: list[str], **columns: Any) -> list[float]:
    """Every completion earns the same: no group has a variance."""
    return [1.0] * len(completions)


def plain_entropies(model: Any, groups: Sequence[Group], temperature: float) -> Tensor:
    """float64 [N], of the groups' tokens, one completion after the other."""
    entropies = []
    for group in groups:
        for rollout in group.ordered:
            scores = (plain_logits(model, group, rollout.token_ids) / temperature).log_softmax(-1)
            entropies.append(-(scores.exp() * scores).sum(-1))
    return torch.cat(entropies)


def test_the_bonus_is_the_mean_over_the_tokens_of_the_step(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    """In groups of equal rewards too, and the same in any micro-batch."""
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, rewards=nothing, beta=0.0, entropy_coef=0.5, temperature=0.7,
        per_device_train_batch_size=1, gradient_accumulation_steps=3,
    )  # fmt: skip
    batches, normaliser = first_step(trainer)
    groups = [group for batch in batches for group in batch["batch"].groups]

    policy = copy.deepcopy(policy_of(trainer)).double()
    expected = -0.5 * plain_entropies(policy, groups, 0.7).mean()
    assert_same_step(trainer, batches, normaliser, policy, expected)
