"""Updates that are not finite are skipped."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from video_r1.errors import VideoR1Error
from video_r1.files import append_line, tolerated
from video_r1.processes import gather
from video_r1.training.run_folder import keep_until

logger = logging.getLogger(__name__)


class UpdateGuard(TrainerCallback):
    """Skips updates whose loss or gradient is not finite; training stops after `limit` of them in a row.

    `skipped_updates.jsonl` in the run folder lists the questions of the micro-batches with such a loss (on
    any rank), or all of the step's if only the gradient is not finite. All ranks decide alike.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.record = folder / "skipped_updates.jsonl"
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self.step_ids: list[str | int] = []
        self.culprits: list[str | int] = []

    def watch(self, loss: Tensor, problem_ids: Sequence[str | int]) -> None:
        self.step_ids += problem_ids
        if not math.isfinite(loss.item()):
            self.culprits += problem_ids

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        lines = keep_until(self.record, state.global_step) if state.is_world_process_zero else []
        steps = gather([line["step"] for line in lines])[0]
        self.skipped, self.in_a_row = len(steps), 0
        while steps and steps.pop() == state.global_step - self.in_a_row:
            self.in_a_row += 1

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        deepspeed = isinstance(optimizer, DeepSpeedOptimizerWrapper)  # its backward pass ends with its step
        # float16's loss scaling produces infinite gradients regularly and skips these updates itself
        finite = args.fp16 or (not optimizer.step_was_skipped if deepspeed else gradients_are_finite(model))
        parts = gather((self.culprits, finite, self.step_ids))
        culprits = [question for part, _, _ in parts for question in part]
        questions = culprits or [question for *_, part in parts for question in part]
        self.step_ids, self.culprits = [], []
        if not culprits and all(finite for _, finite, _ in parts):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        # An optimizer does not touch parameters without gradient: weights, moments and weight decay.
        model.zero_grad(set_to_none=True)
        what, step = "loss" if culprits else "gradient", state.global_step + 1
        logger.warning("step %d: the %s is not finite; the update is skipped", step, what)
        if state.is_world_process_zero:
            with tolerated(self.record.name):
                line = {"step": step, "not_finite": what, "problem_ids": questions}
                append_line(self.record, line)
        if deepspeed and not optimizer.step_was_skipped:
            raise VideoR1Error(
                f"the {what} of step {step} was not finite, and DeepSpeed took the step anyway: the weights "
                "are spoiled. Start again from the last checkpoint, with ZeRO-2 or ZeRO-3 of "
                "DeepSpeed 0.19.8 or later, which skip such steps"
            )
        if self.in_a_row >= self.limit:
            raise VideoR1Error(
                f"the {what} was not finite in {self.in_a_row} updates in a row, last with problem_id "
                f"{', '.join(map(repr, questions[:8]))}; all are in {self.record}. Lower learning_rate or "
                "max_grad_norm, or start again from an earlier checkpoint"
            )


def gradients_are_finite(model: nn.Module) -> bool:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return True
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # sharded gradients (FSDP2)
        norm = norm.full_tensor()
    return math.isfinite(norm.item())
