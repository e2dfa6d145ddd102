"""What a run folder says of its run: running, finished, stopped or failed, why, and how far it has come.

The trainer knows nothing of this page. Its folder has a lock file (`files.claimed`), settings, metrics and,
at the end, the model; pure functions tell the rest from these.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from video_r1.files import Claim, is_finished, parse_claim
from video_r1.report.run_data import finite, prediction_files
from video_r1.studio.folders import Found

Word = Literal["running", "finished", "stopped", "failed"]
LOST = 3600.0  # seconds without a line after which a run on another machine counts as ended
LAST_STEPS = 20  # over which a step's seconds are averaged


@dataclass(frozen=True, slots=True)
class State:
    word: Word
    why: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """step, steps: done and wanted. taken, each: seconds so far and of a step. None: not known."""

    step: int | None = None
    steps: int | None = None
    taken: float | None = None
    each: float | None = None

    @property
    def left(self) -> float | None:
        if self.steps is None or self.step is None or self.each is None:
            return None
        return max(0.0, (self.steps - self.step) * self.each)


def claim_of(found: Found) -> Claim:
    return parse_claim(found.text(".lock", 2000))


def state_of(claim: Claim, done: bool, progress: Progress, silent: float, alive: bool | None) -> State:
    """The state of a run or an evaluation.

    done: its model, or its summary, was written. silent: seconds since it last wrote. alive: whether the
    process of the claim is there; None of one on another machine, which cannot be asked.
    """
    slow = max(LOST, 10 * (progress.each or 0.0))
    after = f" after step {progress.step:,}" if progress.step is not None else ""
    if claim.process is not None:
        if alive or (alive is None and silent < slow):
            return State("running", "" if alive else f"on {claim.host}")
        if done:
            return State("finished")
        who = f"process {claim.process} on {claim.host}"
        if alive is None:
            return State("failed", f"{who} has written nothing for {silent / 3600:.1f} h{after}")
        return State("failed", f"{who} was killed{after}: the system may have been out of memory")
    if claim.ended == "failed":
        return State("failed", claim.why)
    if claim.ended == "stopped":
        return State("stopped", claim.why)
    if done:
        return State("finished")
    return State("stopped", f"it ended{after}, before its model was saved; the same command goes on")


def is_alive(claim: Claim, silent: float) -> bool | None:
    """Whether the claim's process is there; None of another machine's. One that has just written is alive: it
    may be in a container of the same name.
    """
    if claim.process is None or claim.host != socket.gethostname():
        return None
    try:
        os.kill(claim.process, 0)
    except (ProcessLookupError, OverflowError):
        return silent < 60
    except PermissionError:
        pass
    return True


def progress_of(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, str]) -> Progress:
    """How far a training run has come, by its last lines of metrics.jsonl (at least two for a rate)."""
    steps = [
        (int(step), finite(line.get("time")))
        for line in lines
        if (step := finite(line.get("step"))) is not None
    ]
    if not steps:
        return Progress(steps=_wanted(settings, None, None))
    step, taken = steps[-1]
    timed = [(number, time) for number, time in steps if time is not None and number > step - LAST_STEPS - 1]
    each = None
    if len(timed) > 1 and timed[-1][0] > timed[0][0]:
        each = max(0.0, (timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0]))
    epoch = next((value for line in reversed(lines) if (value := finite(line.get("epoch")))), None)
    return Progress(step, _wanted(settings, step, epoch), taken, each)


def _wanted(settings: Mapping[str, str], step: int | None, epoch: float | None) -> int | None:
    """Steps in all: max_steps, or as many as the epochs come to at this step's rate."""
    try:
        if (wanted := int(settings.get("max_steps", "-1"))) > 0:
            return wanted
        epochs = float(settings.get("num_train_epochs", "nan"))
    except (ValueError, OverflowError):
        return None
    if not step or not epoch or not 0 < epochs < 1e6:
        return None
    return min(round(step * epochs / epoch), 10**9)


def is_done(found: Found, kind: str) -> bool:
    """Whether a training run's model, or an evaluation's summary, was written."""
    return is_finished(found.folder) if kind in ("rl", "sft") else (found.folder / "summary.json").is_file()


def last_written(folder: Path) -> float | None:
    """When the newest of the files that a run writes was written: seconds since 1970, None without any."""
    names = ("metrics.jsonl", "rollouts.jsonl", "config.yaml", ".lock")
    times = []
    for path in [*(folder / name for name in names), *prediction_files(folder)]:
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)
