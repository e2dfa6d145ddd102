"""Callbacks of both trainers: checks, skipped updates, progress, trackers, run folder and stopping."""

import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from transformers.trainer_callback import ExportableState

from video_r1.console import Progress
from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import RolloutGroup
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.files import append_line, json_lines, replace_text, tolerated, warn_once, whole_lines
from video_r1.models.group_forward import group_logprobs
from video_r1.processes import Interrupted, gather, gather_lists, process_index, told_of_signals
from video_r1.recipe import Recipe, save_resolved
from video_r1.rollout.engine import RolloutEngine, SamplingSettings, eval_mode
from video_r1.settings.base import Settings
from video_r1.training.checkpoints import best_checkpoint, last_whole_checkpoint
from video_r1.training.metrics import SKIPPED_GROUPS, Meter
from video_r1.training.objective import Moments, deviation, updated_moments

logger = logging.getLogger(__name__)
# Mean absolute difference of log-probs. With the same weights it is about 0.01 in bfloat16, 1e-5 in float32.
SUSPICIOUS = 0.05
CHECKED_QUESTIONS, CHECKED_TOKENS = 4, 16


class StartChecks(TrainerCallback):
    """Calls `check` before the first step of a new or resumed run."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.check()


def check_rewards(groups: list[RolloutGroup]) -> None:
    """Raise VideoR1Error when no completion of any group, on any rank, earns a reward."""
    mine = [
        (float(total), rollout.finish_reason == "length", len(rollout.token_ids), rollout.text)
        for group in groups
        for rollout, total in zip(group.ordered, group.total_reward, strict=True)
    ]
    completions, _ = gather_lists(mine)
    if not completions:
        return
    totals, truncated, lengths, texts = zip(*completions, strict=True)
    share = sum(truncated) / len(completions)
    if not any(totals):
        remedy = "Run SFT first, or set prompt_template to the prompt that the model was trained with"
        if share > 0.9:
            cut = f"{share:.0%} of them were cut off at max_completion_length ({max(lengths)} tokens)"
            remedy = f"{cut}: raise it or run SFT first"
        raise VideoR1Error(
            f"none of {len(completions)} completions earns any reward, so there is nothing to learn from: no "
            f"right answer in <think>…</think><answer>…</answer> among them. {remedy}. One of them: "
            f"{texts[0][:160]!r}. (preflight_questions 0 skips this check.)"
        )


class TaskMoments(TrainerCallback, ExportableState):
    """Running E[R] and E[R²] of each problem type, for `scale_rewards` task: the same on every rank, and
    saved in trainer_state.json.
    """

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"moments": self.moments}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        callbacks: Any = state.stateful_callbacks  # of a new run or of the checkpoint
        saved = callbacks[type(self).__name__]["attributes"]["moments"]
        self.moments = {task: (mean, mean_square) for task, (mean, mean_square) in saved.items()}

    def deviations(self, rewards: Tensor, tasks: Sequence[str]) -> Tensor:
        """Add this step's rewards [Q, G]; return the deviation [Q] of each question's task."""
        self.moments = updated_moments(self.moments, rewards, tasks)
        return torch.tensor([deviation(self.moments[task]) for task in tasks])


def warn_of_difference(difference: float) -> None:
    if difference > SUSPICIOUS:
        warn_once(
            f"vLLM's log-probs differ from the trainer's by more than {SUSPICIOUS} on average (rounding: "
            "about 0.01); check that both have the same weights, number format and processor files"
        )


@torch.no_grad()
def sampler_difference(
    engine: RolloutEngine, model: nn.Module, prompts: Sequence[Prompt], temperature: float
) -> float:
    """Sync the weights; return the mean of |log π_trainer − log π_sampler| over some tokens of all ranks."""
    with eval_mode(model):
        engine.update_weights(model)
        sampling = SamplingSettings(temperature=temperature, max_tokens=CHECKED_TOKENS, seed=0)
        groups = engine.generate(prompts, sampling)
        completions = [[rollout.token_ids for rollout in group] for group in groups]
        pieces = [[rollout.pieces() for rollout in group] for group in groups]
        scored = group_logprobs(model, prompts, completions, temperature, pieces=pieces).logprobs
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group])
    parts = gather((float((scored - sampled.to(scored)).abs().sum()), len(sampled)))
    return sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))


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


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError when a tracker of `report_to` is unknown or not installed."""
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise ConfigError(f"report_to: {error}") from error
    for name in names:
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or set it to none")


def let_trackers_fail(callbacks: Sequence[TrainerCallback], names: Sequence[str]) -> None:
    """Make trackers that fail during the run warn once; one that cannot start ends it with VideoR1Error."""
    kinds = tuple(get_reporting_integration_callbacks(names))
    for tracker in callbacks:
        if isinstance(tracker, kinds):
            for event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
                setattr(tracker, event, partial(_may_fail, getattr(tracker, event), event))


def _may_fail(method: Callable[..., Any], event: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return method(*args, **kwargs)
    except Exception as error:  # a tracker's client raises any error of its network and disk
        name = type(getattr(method, "__self__", method)).__name__
        reason = f"{name}: {type(error).__name__}: {error}"
        if event == "on_train_begin":
            raise VideoR1Error(f"report_to: {reason}; set up the tracker or set it to none") from error
        warn_once(f"{reason}; training continues without it")
        return None


class StepProgress(TrainerCallback):
    """Progress with time left and some of the logged series (displayed name to series)."""

    def __init__(self, description: str, series: Mapping[str, str]) -> None:
        self.description = description
        self.series = series
        self.figures: dict[str, str] = {}
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = Progress(state.max_steps, self.description, "steps", done=state.global_step)

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


def take_peak_memory() -> float:
    """GiB: the GPU's peak allocation since the last call, or else the process's peak memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class StepSeconds(TrainerCallback):
    """Measures `seconds/update` (without sampling) and `memory/peak_gib` (of the rank that needs most)."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.start = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.meter.steps += 1
        self.meter.total("seconds/update", time.perf_counter() - self.start)
        self.meter.peak("memory/peak_gib", take_peak_memory())


class RunFolder(TrainerCallback):
    """Writes config.yaml and metrics.jsonl. A resumed run removes the lines of later steps, finds its best
    checkpoint in the folder, which may have moved, and does not validate at its start.
    """

    def __init__(self, folder: Path, settings: Recipe | Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.start = time.time()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.global_step > 0:
            args.eval_on_start = False
            if best := best_checkpoint(self.folder, state.best_global_step):
                state.best_model_checkpoint = str(best)
        if not state.is_world_process_zero:
            return
        warn_once.cache_clear()  # each run of a process warns again
        save_resolved(self.settings, self.folder)
        # A new run validates before its first step again (eval_on_start).
        last = state.global_step or -1
        metrics = keep_until(self.folder / "metrics.jsonl", last)
        keep_until(self.folder / "rollouts.jsonl", last)
        keep_until(self.folder / SKIPPED_GROUPS, last)
        self.start = time.time() - (metrics[-1].get("time", 0.0) if metrics else 0.0)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # a run below logging_steps has a line too

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **rest: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time() - self.start, 3)}
        numbers = {n: v for n, v in logs.items() if n != "epoch" and isinstance(v, (int, float))}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with tolerated("metrics.jsonl"):
            append_line(self.folder / "metrics.jsonl", line)


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove broken lines and those of steps after `step` from a JSON-lines file; return the others."""
    if not path.exists():
        return []
    with path.open("r+b") as file:
        kept = [line for _, _, line in whole_lines(file) if line is not None and line.get("step", 0) <= step]
    replace_text(path, json_lines(kept).decode())
    return kept


SAME_PRESS = 1.0  # seconds; a launcher passes on the Ctrl-C that the terminal has sent to all processes


class StopWhenAsked(TrainerCallback):
    """On Ctrl-C or SIGTERM, ends training with a checkpoint after the current step, on all ranks after the
    same step even if only one rank got the signal. A second Ctrl-C ends it at once.

    every: a checkpoint is possible after this many steps (num_iterations: updates on the same rollouts).
    """

    def __init__(self, folder: Path, every: int = 1) -> None:
        self.folder = folder
        self.every = every
        self.number: int | None = None
        self.asked_at = 0.0
        self.stopping = self.saved = False

    @contextmanager
    def listening(self, ended: Callable[[], Any]) -> Iterator[None]:
        """Handle signals during training; raise Interrupted if it was stopped. `ended` informs trackers."""
        self.number, self.stopping, self.saved = None, False, False
        with told_of_signals(self.ask):
            try:
                yield
            except Interrupted:
                if self.saved:
                    ended()
                raise
            if self.stopping:  # without a checkpoint, with save_strategy best for example
                raise self.interrupted()

    def ask(self, number: int) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self.asked_at = number, now
            say(
                f"{signal.Signals(number).name}: finishing this step, then saving a checkpoint; press Ctrl-C "
                "again to stop at once"
            )
        elif number == signal.SIGINT and now - self.asked_at >= SAME_PRESS * ("LOCAL_RANK" in os.environ):
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        checkpoint = last_whole_checkpoint(self.folder)
        saved = f"{checkpoint} is the last checkpoint" if checkpoint else "there is no checkpoint yet"
        return Interrupted(self.number or signal.SIGTERM, saved)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        told = [number for number in gather(self.number) if number is not None]
        if told and state.global_step % self.every == 0:
            self.number, self.stopping = max(told), True
            control.should_log = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if self.stopping:
            self.saved = True
            raise self.interrupted()


def say(text: str) -> None:
    """Write a line to standard error from a signal handler, which may have interrupted a print."""
    if process_index() == 0:
        os.write(2, f"\nvideo-r1: {text}\n".encode())
