"""Progress at the terminal, and the seconds and memory of each step."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from video_r1.console import Progress
from video_r1.training.metrics import Meter


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


def take_peak_memory() -> float:
    """GiB: the GPU's peak allocation since the last call, or else the process's peak memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
