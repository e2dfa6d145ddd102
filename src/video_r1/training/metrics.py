"""The series that a run writes: gathered between two logging steps, for trackers and metrics.jsonl."""

from __future__ import annotations

import functools
import logging
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.files import append_line, json_lines, replace_text, whole_lines
from video_r1.models.group_forward import GroupLogprobs
from video_r1.processes import gather, process_count
from video_r1.recipe import Recipe, save_resolved
from video_r1.rewards.shaping import has_self_reflection
from video_r1.settings.base import Settings
from video_r1.training.advantages import without_variance
from video_r1.training.objective import PolicyLoss

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.jsonl"  # groups of a run folder that its steps learnt nothing from
VISIBLE_CHANGE = 0.01  # of an advantage, whose deviation in its group is 1


class Meter:
    """Gathers series over some steps and all processes: quotients of two sums or norms, sums, peaks."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)  # only quotients have one
        self.peaks: dict[str, float] = {}
        self.roots: set[str] = set()  # quotients whose root is logged
        self.steps = 0  # optimizer steps, counted by StepSeconds

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add to a quotient: `value` is a sum over `count` things."""
        self.sums[name] += float(value)
        self.counts[name] += float(count)

    def norms(self, name: str, vector: Tensor, reference: Tensor) -> None:
        """Add to a quotient of two norms, ‖vector‖ ÷ ‖reference‖, over all that is added."""
        self.add(name, float(vector.square().sum()), float(reference.square().sum()))
        self.roots.add(name)

    def total(self, name: str, value: float) -> None:
        """Add to a series whose logged value is a sum."""
        self.sums[name] += float(value)

    def peak(self, name: str, value: float) -> None:
        """Add to a series whose logged value is the largest."""
        self.peaks[name] = max(value, self.peaks.get(name, value))

    @contextmanager
    def seconds(self, phase: str) -> Iterator[None]:
        """Adds the seconds spent inside to `seconds/<phase>`."""
        start = time.perf_counter()
        yield
        self.total(f"seconds/{phase}", time.perf_counter() - start)

    def speeds(self, groups: Sequence[Sequence[Rollout]], seconds: float) -> None:
        """Adds rollouts and tokens a second, summed over processes."""
        share = seconds / process_count()
        rollouts = [rollout for group in groups for rollout in group]
        self.add("speed/rollouts_per_second", len(rollouts), share)
        self.add("speed/tokens_per_second", sum(len(rollout.token_ids) for rollout in rollouts), share)

    def drain(self) -> dict[str, float]:
        """The series since the last call, over all processes; seconds are per optimizer step. Starts anew."""
        steps = max(1, self.steps)
        parts = gather((self.sums, self.counts, self.peaks, self.roots))
        self.__init__()
        for sums, counts, peaks, roots in parts:
            self.roots |= roots
            for name, value in sums.items():
                self.sums[name] += value
            for name, count in counts.items():
                self.counts[name] += count
            for name, peak in peaks.items():
                self.peak(name, peak)
        series: dict[str, float] = {}
        for name, value in sorted(self.sums.items()):
            if name.startswith("seconds/"):
                series[name] = value / len(parts) / steps
            elif name not in self.counts:
                series[name] = value
            elif self.counts[name] > 0:
                quotient = value / self.counts[name]
                series[name] = math.sqrt(quotient) if name in self.roots else quotient
        series |= sorted(self.peaks.items())
        self.__init__()
        return series


def describe_groups(meter: Meter, groups: Sequence[RolloutGroup], phrases: Sequence[str]) -> None:
    """Adds what one step's groups say to the meter: rewards, their deviations inside a group, temporal
    gap, completions, flat groups.
    """
    for group in groups:
        sample = group.sample
        for term, values in {**group.rewards, "total": group.total_reward}.items():
            # A user's function may leave a completion without a reward (nan).
            total, given = float(values.nansum()), int(values.isfinite().sum())
            for name in (term, f"{term}/{sample.problem_type}", f"{term}/{sample.data_type}"):
                meter.add(f"reward/{name}", total, given)
            if given > 1:
                meter.add(f"reward_std/{term}", float(values[values.isfinite()].std()))
        if group.p_shuffled is not None:
            meter.add("temporal/p", group.p)
            meter.add("temporal/p_shuffled", group.p_shuffled)
            meter.add("temporal/gap", group.p - group.p_shuffled)
            meter.add("temporal/share_ordered_better", group.p > group.p_shuffled)
        if group.drops is not None:
            meter.add("temporal/drop", float(group.drops.sum()), len(group.drops))
        if group.shuffled_prompt is not None:
            describe_credit(meter, group)
        for rollout in group.ordered:
            meter.add("completion/length", len(rollout.token_ids))
            meter.add("completion/truncated", rollout.finish_reason == "length")
            meter.add("completion/self_reflection", has_self_reflection(rollout.text, phrases))
        meter.add("groups/no_variance", bool(without_variance(group.total_reward[None])))


def describe_credit(meter: Meter, group: RolloutGroup) -> None:
    """Adds what the temporal term has done to a video's advantages A: ‖A − A without it‖ ÷ ‖A without it‖,
    and whether it has changed one of a group that it pays. Where it weighs tokens, A is that of each token.
    """
    if group.base_advantages is None:
        return
    advantages, without, weights = group.advantages, group.base_advantages, group.token_weights
    if weights is not None:
        lengths = torch.tensor([len(each) for each in weights])
        advantages, without = (values.repeat_interleave(lengths) for values in (advantages, without))
        advantages = torch.cat(weights) * advantages
    change = advantages - without
    meter.norms("temporal/credit", change, without)
    bonus = group.rewards.get("temporal")
    paid = bool(bonus.any()) if bonus is not None else (group.margin or 0.0) > 0
    if paid or weights is not None:
        meter.add("temporal/credit_groups", float(change.abs().max()) > VISIBLE_CHANGE)


def describe_update(meter: Meter, policy: GroupLogprobs, result: PolicyLoss) -> None:
    """Adds one micro-batch's means over completion tokens to the meter: clipping, KL and entropy."""
    tokens = len(policy.logprobs)
    assert policy.entropy is not None
    meter.add("policy/clip_ratio", float(result.clip_ratio) * tokens, tokens)
    meter.add("policy/kl", float(result.kl) * tokens, tokens)
    meter.add("policy/entropy", float(policy.entropy.detach().sum()), tokens)


def take_peak_memory() -> float:
    """GiB: the most allocated on a GPU since the last call; without one, the most the process has had."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class StepSeconds(TrainerCallback):
    """Measures `seconds/update`, the passes forward and back and the optimizer without sampling; and
    `memory/peak_gib`, the peak of a whole step in the process that needs most.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.start = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        self.meter.steps += 1
        self.meter.total("seconds/update", time.perf_counter() - self.start)
        self.meter.peak("memory/peak_gib", take_peak_memory())


@contextmanager
def tolerated(record: str) -> Iterator[None]:
    """Where the disk refuses what is written inside, a warning says so, and the run goes on without it."""
    try:
        yield
    except OSError as error:
        warn_once(f"{record} cannot be written ({error.strerror or error}); training goes on without it")


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


class RunFolder(TrainerCallback):
    """Writes config.yaml and metrics.jsonl (one line a logging step) into the run folder.

    A run that is resumed continues the file: lines after the step it resumes from are taken out first. When
    the disk refuses a line, the run goes on and says so once.
    """

    def __init__(self, folder: Path, settings: Recipe | Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.start = time.time()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if not state.is_world_process_zero:
            return
        warn_once.cache_clear()  # every run of a process says it anew
        save_resolved(self.settings, self.folder)
        # A run that begins anew validates before its first step again (eval_on_start).
        last = state.global_step or -1
        metrics = keep_until(self.folder / "metrics.jsonl", last)
        keep_until(self.folder / "rollouts.jsonl", last)
        keep_until(self.folder / LEFT_OUT, last)
        self.start = time.time() - (metrics[-1].get("time", 0.0) if metrics else 0.0)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **rest: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time() - self.start, 3)}
        for name, value in logs.items():
            if name != "epoch" and isinstance(value, (int, float)):
                line[name] = value if math.isfinite(value) else None
        with tolerated("metrics.jsonl"):
            append_line(self.folder / "metrics.jsonl", line)


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrites a JSON-lines file with only its whole lines of steps up to `step`; returns these lines."""
    if not path.exists():
        return []
    with path.open("r+b") as file:
        kept = [line for _, _, line in whole_lines(file) if line is not None and line.get("step", 0) <= step]
    replace_text(path, json_lines(kept).decode())
    return kept
