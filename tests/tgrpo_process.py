"""Rank of test_tgrpo_processes.py: trains some steps and saves the weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from selected_questions import mostly_equal, odd_sums
from tgrpo_trainers import make_trainer, weights

from video_r1.rewards import scoring

torch.set_num_threads(1)


def main(folder: Path, processes: int, scale: str, rule: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # a test calls it in its own process, too
        if scale == "selected":
            patch.setattr(scoring, "answer_scores", odd_sums)
        train(folder, processes, scale, rule)


def train(folder: Path, processes: int, scale: str, rule: str) -> None:
    changes: dict[str, Any] = {"scale_rewards": scale}
    if scale == "selected":  # over the end of an epoch, which is two steps
        changes = {
            "dynamic_sampling": 2,
            "max_steps": 3,
            "rewards": mostly_equal,
        }
    trainer = make_trainer(
        folder / "model", str(folder / "manifest.json"), folder / f"run{processes}", optim="sgd",
        learning_rate=0.01, per_device_train_batch_size=4 // processes, temporal_rule=rule,
        **{"max_steps": 2, **changes},
        evaluated=str(folder / "manifest.json"), eval_strategy="steps", eval_steps=2,
        ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), folder / f"weights{processes}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
