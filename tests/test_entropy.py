"""The entropy bonus of a step on a real tiny model: its value, its gradient, its effect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tgrpo import plain_logits
from tgrpo_trainers import first_step, make_trainer, policy_of
from tiny_questions import read_lines


def nothing(completions: list[str], **columns: Any) -> list[float]:
    """Every completion earns the same: no group has a variance."""
    return [1.0] * len(completions)


@pytest.mark.parametrize("batch_size", [3, 1])
def test_the_bonus_is_the_mean_over_the_tokens_of_the_step(
    checkpoint: Path, manifest: Path, tmp_path: Path, batch_size: int
) -> None:
    """In groups of equal rewards too, and the same in any micro-batch."""
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, rewards=nothing, beta=0.0, entropy_coef=0.5, temperature=0.7,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=3 // batch_size,
    )  # fmt: skip
    batches, normaliser = first_step(trainer)
    groups = [group for batch in batches for group in batch["batch"].groups]

    policy = copy.deepcopy(policy_of(trainer)).double()
    entropies = []
    for group in groups:
        for rollout in group.ordered:
            scores = (plain_logits(policy, group, rollout.token_ids) / 0.7).log_softmax(-1)
            entropies.append(-(scores.exp() * scores).sum(-1))
    expected = -0.5 * torch.cat(entropies).mean()
    expected.backward()

    losses = [
        trainer.compute_loss(policy_of(trainer), batch, num_items_in_batch=normaliser) for batch in batches
    ]
    loss = torch.stack(losses).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    for (name, weight), double in zip(
        policy_of(trainer).named_parameters(), policy.parameters(), strict=True
    ):
        if double.grad is not None:
            scale = max(1e-3, double.grad.abs().max().item())
            assert (weight.grad.double() - double.grad).abs().max().item() / scale < 1e-4, name


def test_the_bonus_raises_the_entropy(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    seen = []
    for coef in (2.0, -2.0):
        folder = tmp_path / str(coef)
        make_trainer(
            checkpoint, str(manifest), folder, rewards=nothing, beta=0.0, entropy_coef=coef, max_steps=4,
            optim="sgd", learning_rate=0.05, top_entropy_quantile=0.9,
        ).train()  # fmt: skip
        seen.append(read_lines(folder / "metrics.jsonl")[-1]["policy/entropy"])
    assert seen[0] > seen[1] + 0.01
