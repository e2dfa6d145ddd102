"""Trainers on the tiny model for the tests of T-GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_questions import training_arguments
from torch import Tensor
from transformers import TrainerCallback

from video_r1.training.tgrpo import TGRPOConfig, TGRPOTrainer


def many_tokens(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that a random model earns in different amounts: there is something to learn."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def make_trainer(
    checkpoint: Any, manifest: Any, folder: Path, rewards: Any = many_tokens, peft: Any = None,
    callbacks: list[TrainerCallback] | None = None, evaluated: Any = None, **changes: Any,
) -> TGRPOTrainer:  # fmt: skip
    defaults = {
        "num_generations": 4,
        "max_completion_length": 10,
        "length_reward": 0.0,
        "preflight_questions": 0,
        "temporal_rule": "margin",  # samples, scores and pays: what a trainer does by any rule
    }
    args = TGRPOConfig(**training_arguments(folder, **{**defaults, **changes}))
    if rewards is many_tokens and args.paid_rule != "off":
        rewards = ["accuracy", "temporal", many_tokens]
    return TGRPOTrainer(
        str(checkpoint) if isinstance(checkpoint, Path) else checkpoint,
        rewards,
        args,
        manifest,
        evaluated,
        peft_config=peft,
        callbacks=callbacks,
    )


def weights(trainer: TGRPOTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy_of(trainer).state_dict().items()}


def first_step(trainer: TGRPOTrainer) -> tuple[list[dict[str, Any]], float]:
    """The micro-batches and the normaliser of the first optimizer step, without training."""
    batches = iter(trainer.get_train_dataloader())
    return trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, "cpu")


def policy_of(trainer: TGRPOTrainer) -> Any:
    """The model that is trained."""
    return trainer.model
