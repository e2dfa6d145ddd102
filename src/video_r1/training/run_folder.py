"""config.yaml and metrics.jsonl of a run folder, and the lines that a resumed run removes."""

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from video_r1.files import append_line, json_lines, replace_text, tolerated, warn_once, whole_lines
from video_r1.recipe import Recipe, save_resolved
from video_r1.settings.base import Settings
from video_r1.training.checkpoints import best_checkpoint
from video_r1.training.metrics import SKIPPED_GROUPS


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
