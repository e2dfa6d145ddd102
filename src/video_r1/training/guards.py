"""What both trainers need around their steps: progress, updates that are skipped instead of spoiling weights,
and records and trackers that may fail without ending the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from video_r1.errors import ConfigError, VideoR1Error
from video_r1.files import append_line
from video_r1.processes import gather
from video_r1.progress import Progress
from video_r1.training.metrics import keep_until, tolerated, warn_once

logger = logging.getLogger(__name__)


class UpdateGuard(TrainerCallback):
    """Leaves out an update whose loss or gradient is not finite, and writes down its questions.

    The questions go to `skipped_updates.jsonl` in the run folder: those of the micro-batches with such a loss
    (of any process), or all of the step's where only the gradient shows it. After `limit` such updates in a
    row training stops with VideoR1Error. All processes decide alike.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.record = folder / "skipped_updates.jsonl"
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

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        """Takes up the counts of the run that is continued."""
        lines = keep_until(self.record, state.global_step) if state.is_world_process_zero else []
        steps = gather([line["step"] for line in lines])[0]
        self.skipped, self.in_a_row = len(steps), 0
        while steps and steps.pop() == state.global_step - self.in_a_row:
            self.in_a_row += 1

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        deepspeed = isinstance(optimizer, DeepSpeedOptimizerWrapper)  # its backward pass ends with its step
        # float16's loss scaling makes infinite gradients as a matter of course and skips these updates itself
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
        # An optimizer leaves parameters without gradient alone: weights, moments and weight decay.
        model.zero_grad(set_to_none=True)
        what, step = "loss" if culprits else "gradient", state.global_step + 1
        logger.warning("step %d: the %s is not finite; the update is skipped", step, what)
        if state.is_world_process_zero:
            with tolerated(self.record.name):
                line = {"step": step, "not_finite": what, "problem_ids": questions}
                append_line(self.record, line)
        if deepspeed and not optimizer.step_was_skipped:
            raise VideoR1Error(
                f"the {what} of step {step} was not finite, and DeepSpeed has taken the step all the same: "
                "the weights are spoiled. Start again from the last checkpoint, with ZeRO-2 or ZeRO-3 of "
                "DeepSpeed 0.19.8 or later, which leave out such steps"
            )
        if self.in_a_row >= self.limit:
            raise VideoR1Error(
                f"the {what} was not finite in {self.in_a_row} updates in a row, last with problem_id "
                f"{', '.join(map(repr, questions[:8]))}; all are in {self.record}. Lower learning_rate or "
                "max_grad_norm, or start again from an earlier checkpoint"
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


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError when a tracker of `report_to` is unknown or not installed."""
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"report_to: {error}") from error
    for name in names:
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or set it to none")


def let_trackers_fail(callbacks: Sequence[TrainerCallback], names: Sequence[str]) -> None:
    """Makes trackers whose server or disk fails during the run warn once instead of ending it.

    A tracker that cannot even start ends it, with VideoR1Error: its settings are wrong, most likely.
    """
    kinds = tuple(get_reporting_integration_callbacks(names))
    for tracker in callbacks:
        if isinstance(tracker, kinds):
            for event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
                setattr(tracker, event, _may_fail(getattr(tracker, event), event, type(tracker).__name__))


def _may_fail(method: Callable[..., Any], event: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # a tracker's client raises whatever its network and its disk do to it
            reason = f"{name}: {type(error).__name__}: {error}"
            if event == "on_train_begin":
                raise VideoR1Error(f"report_to: {reason}; set up the tracker or set it to none") from error
            warn_once(f"{reason}; training goes on without it")
            return None

    return call


class StepProgress(TrainerCallback):
    """A bar with time left on a terminal, plain lines elsewhere; with some of the logged series, by the names
    that they have there, as far as they are logged.
    """

    def __init__(self, description: str, series: Mapping[str, str]) -> None:
        self.description = description
        self.series = series
        self.figures: dict[str, str] = {}
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = Progress(state.max_steps, self.description, "steps", done=state.global_step, slow=True)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **rest: Any) -> None:
        for name, series in self.series.items():
            if series in (logs or {}):
                decimals = ".2f" if series.startswith(("reward/", "temporal/")) else ".3g"
                self.figures[name] = f"{logs[series]:{decimals}}"

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if self.bar is not None:
            self.bar.update(1, **self.figures)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
