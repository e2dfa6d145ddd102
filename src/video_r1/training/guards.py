"""What both trainers need around their steps: progress, and updates that are skipped instead of spoiling
weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from video_r1.errors import VideoR1Error
from video_r1.progress import Progress, progress
from video_r1.report.recording import append_line
from video_r1.training.processes import gather

logger = logging.getLogger(__name__)


class UpdateGuard(TrainerCallback):
    """Leaves out an update whose loss or gradient is not finite, and writes down its questions.

    The questions go to `skipped_updates.jsonl` in the run folder. After `limit` such updates in a row
    training stops with VideoR1Error. All processes decide alike.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self.step_ids: list[str | int] = []
        self.culprits: list[str | int] = []

    def watch(self, loss: Tensor, problem_ids: Sequence[str | int]) -> None:
        """Note one micro-batch of the present step: its loss (scalar) and its questions."""
        self.step_ids += problem_ids
        if not math.isfinite(loss.item()):
            self.culprits += problem_ids

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        # float16's loss scaling makes infinite gradients as a matter of course and skips these updates itself
        what = "loss" if self.culprits else "gradient"
        bad = bool(self.culprits) or not (args.fp16 or gradients_are_finite(model))
        if any(gather(bad)):
            self.skipped += 1
            self.in_a_row += 1
            # An optimizer leaves parameters without gradient alone: weights, moments and weight decay.
            model.zero_grad(set_to_none=True)
            if bad:
                line = {
                    "step": state.global_step + 1,
                    "not_finite": what,
                    "problem_ids": self.culprits or self.step_ids,
                }
                append_line(self.folder / "skipped_updates.jsonl", line)
            logger.warning(
                "step %d: the %s is not finite; the update is skipped", state.global_step + 1, what
            )
        else:
            self.in_a_row = 0
        questions, self.step_ids, self.culprits = self.culprits or self.step_ids, [], []
        if self.in_a_row >= self.limit:
            raise VideoR1Error(
                f"the {what} was not finite in {self.in_a_row} updates in a row, last with problem_id "
                f"{', '.join(map(repr, questions[:8]))}; all are in {self.folder / 'skipped_updates.jsonl'}. "
                "Lower learning_rate or max_grad_norm, or start again from an earlier checkpoint"
            )


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether the norm of all gradients is a finite number; True where there are none."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return True
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # sharded gradients (FSDP2)
        norm = norm.full_tensor()
    return math.isfinite(norm.item())


class StepProgress(TrainerCallback):
    """A bar with rate and time left on a terminal, plain lines elsewhere; some of the logged series beside
    it.
    """

    def __init__(self, description: str, series: Sequence[str] = ("loss",)) -> None:
        self.description = description
        self.series = series
        self.figures: dict[str, str] = {}
        self.bar: Progress[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = progress(state.max_steps - state.global_step, self.description, "steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        found = {
            name.rpartition("/")[2]: f"{(logs or {})[name]:.3g}"
            for name in self.series
            if name in (logs or {})
        }
        self.figures |= found

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(1, **self.figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
