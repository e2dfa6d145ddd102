"""A run in a few lines, for the list: state, progress, time left, main figures, a sparkline, alerts.

The trainer knows nothing of the page. Its folder has a lock file (`files.claimed`), settings, metrics and, at
the end, the model; pure functions infer the rest. Only the end of a metrics file and some earlier lines are
read, so that a list of long runs is ready at once.
"""

import os
import socket
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from video_r1.errors import first_line
from video_r1.files import Claim, is_finished, parse_claim
from video_r1.report.curves import current
from video_r1.report.page import KEY_SERIES, duration
from video_r1.report.reader import Found, last_lines
from video_r1.report.run_data import kind_of, prediction_files, read_settings
from video_r1.report.values import as_table, finite
from video_r1.studio.alerts import Lines, alert_of_silence, alerts_of, recent, values

LOST = 3600.0  # seconds without a line after which a run on another machine counts as ended
LAST_STEPS = 20  # for the mean seconds of a step
DEMO_MARK = ".demo"  # lab.demo.MARK
READ_FILES = ("metrics.jsonl", "config.yaml", "evaluation.json", "summary.json", "rollouts.jsonl")
SPARK_POINTS = 60
SPARKS = ("reward/accuracy", "teacher/kl", "reward/total", "loss")
SHOWN = {
    "rl": ("reward/accuracy", "temporal/gap", "teacher/kl", "reward/format", "completion/length"),
    "sft": ("loss", "accuracy/token", "eval_loss"),
}
UNREADABLE: dict[str, Any] = {
    "kind": "unreadable", "state": "failed", "demo": False, "figures": [], "alerts": [],
    "spark": {"name": "", "values": []}, **dict.fromkeys(("step", "steps", "left", "taken", "written")),
}  # fmt: skip


class State(NamedTuple):
    """The state of a run, and the reason."""

    word: Literal["running", "finished", "stopped", "failed"]
    why: str = ""


class Progress(NamedTuple):
    """Progress of a run: done and planned steps, seconds so far and of one step, validations that stopped it
    early. None: unknown.
    """

    step: int | None = None
    steps: int | None = None
    taken: float | None = None
    each: float | None = None
    stopped_early: float | None = None

    @property
    def left(self) -> float | None:
        if self.steps is None or self.step is None or self.each is None:
            return None
        return max(0.0, (self.steps - self.step) * self.each)


def listing(runs: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Return the rows of all runs: running ones first, then by the time of their last line."""
    rows = []
    for found in runs.values():
        try:
            rows.append(overview(found))
        except Exception as error:  # a stranger's files may break any reader: the other runs are shown
            why = f"its files cannot be read: {type(error).__name__}: {first_line(error)[:200]}"
            rows.append(UNREADABLE | {"name": found.name, "why": why})
    return sorted(rows, key=lambda row: (row["state"] != "running", -(row["written"] or 0.0), row["name"]))


def overview(found: Found, now: float | None = None) -> dict[str, Any]:
    """Return a run's row of the list as JSON values."""
    written = last_written(found)
    silent = (time.time() if now is None else now) - written if written is not None else 0.0
    progress, facts, saves = contents(found, tuple(_stamp(found, name) for name in READ_FILES))
    trains, lock = facts["kind"] in SHOWN, found.text(".lock", 2000)
    done = is_finished(found.folder) if trains else (found.folder / "summary.json").is_file()
    if not saves:  # no model shows the end: an empty lock file does, or the last step
        at_end = progress.step is not None and progress.step == progress.steps
        done = done or at_end or (not lock and (found.folder / ".lock").is_file())
    claim = parse_claim(lock)
    end = f"its {'model was saved' if trains else 'summary was written'}; the same command continues it"
    end = end if saves else "its last step, without checkpoints"
    state = state_of(claim, done, progress, silent, is_alive(claim, silent), end)
    running = state.word == "running"
    silence = [alert_of_silence(silent, progress.each)] if running else []
    return {
        **facts, "name": found.name, "demo": (found.folder / DEMO_MARK).is_file(),
        "state": state.word, "why": state.why, "step": progress.step, "steps": progress.steps,
        "left": duration(progress.left) if running and progress.left is not None else None,
        "taken": None if progress.taken is None else duration(progress.taken), "written": written,
        "alerts": [alert._asdict() for alert in (*silence, *facts["alerts"]) if alert],
    }  # fmt: skip


@lru_cache(maxsize=512)
def contents(found: Found, stamps: tuple[Any, ...]) -> tuple[Progress, dict[str, Any], bool]:
    """Return what a run's files say, and whether it saves checkpoints. Read again when `stamps` change."""
    lines = [current(line) for line in last_lines(found, "metrics.jsonl", SPARK_POINTS)]
    settings = read_settings(found)
    kind = kind_of(found.folder, (name for line in lines[-3:] for name in line), settings)
    figures = training_figures(kind, lines) if kind in SHOWN else evaluation_figures(found)
    facts = {"kind": kind, "figures": figures, "spark": sparkline(lines), "alerts": alerts_of(lines)}
    return progress_of(lines, settings), facts, settings.get("save_strategy") not in ("no", "false")


def _stamp(found: Found, name: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(found.folder / name)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def last_written(found: Found) -> float | None:
    """Return when the run last wrote a file: seconds since 1970, None without files."""
    names = ("metrics.jsonl", "rollouts.jsonl", "config.yaml", ".lock")
    files = [*names, *(path.name for path in prediction_files(found.folder))]
    return max((stamp[2] / 1e9 for name in files if (stamp := _stamp(found, name))), default=None)


def state_of(
    claim: Claim, done: bool, progress: Progress, silent: float, alive: bool | None, end: str
) -> State:  # fmt: skip
    """Return the state of a run or an evaluation.

    done: it reached its end; end: that end in words, and what to do before it. silent: seconds since it last
    wrote. alive: whether the process of the claim exists; None on another machine, which cannot be asked.
    """
    slow = max(LOST, 10 * (progress.each or 0.0))
    after = f" after step {progress.step:,}" if progress.step is not None else ""
    count = progress.stopped_early
    early = f"early,{after}: {count:.0f} validations in a row brought no better model" if count else ""
    finished = State("finished", early)
    if claim.process is not None:
        if alive or (alive is None and silent < slow):
            return State("running", "" if alive else f"on {claim.host}")
        if done:
            return finished
        who = f"process {claim.process} on {claim.host}"
        if alive is None:
            return State("failed", f"{who} has written nothing for {silent / 3600:.1f} h{after}")
        return State("failed", f"{who} was killed{after}: the system may have been out of memory")
    if claim.ended:
        return State("failed" if claim.ended == "failed" else "stopped", claim.why)
    if done:
        return finished
    return State("stopped", f"it ended{after} before {end}")


def is_alive(claim: Claim, silent: float) -> bool | None:
    """Return whether the claim's process exists, None if it is on another machine.

    A process that has just written is alive: it may run in a container with this host name.
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


def progress_of(lines: Lines, settings: Mapping[str, str]) -> Progress:
    """Return the progress of a training run. lines: the last ones of metrics.jsonl (two for a rate)."""
    steps = [
        (int(step), finite(line.get("time")))
        for line in lines
        if (step := finite(line.get("step"))) is not None
    ]
    if not steps:
        return Progress(steps=_planned(settings, None, None))
    step, taken = steps[-1]
    timed = [(number, time) for number, time in steps if time is not None and number > step - LAST_STEPS - 1]
    each = None
    if len(timed) > 1 and timed[-1][0] > timed[0][0]:
        each = max(0.0, (timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0]))
    epoch = next((value for line in reversed(lines) if (value := finite(line.get("epoch")))), None)
    return Progress(
        step, _planned(settings, step, epoch), taken, each, finite(lines[-1].get("stopped_early"))
    )


def _planned(settings: Mapping[str, str], step: int | None, epoch: float | None) -> int | None:
    """Return max_steps, or the steps of num_train_epochs at the rate so far."""
    try:
        if (wanted := int(settings.get("max_steps", "-1"))) > 0:
            return wanted
        epochs = float(settings.get("num_train_epochs", "nan"))
    except (ValueError, OverflowError):
        return None
    if not step or not epoch or not 0 < epochs < 1e6:
        return None
    return min(round(step * epochs / epoch), 10**9)


def training_figures(kind: str, lines: Lines) -> list[dict[str, str]]:
    """Return the main figures: means over the last logged lines."""
    figures = []
    for name in SHOWN[kind]:
        caption, unit, decimals = KEY_SERIES[name]
        if (value := recent(lines, name)) is not None:
            figures.append({"caption": caption, "value": f"{value:z.{decimals}f} {unit}".rstrip()})
    return figures


def evaluation_figures(found: Found) -> list[dict[str, str]]:
    """Return accuracies in order, over all and over videos, and gaps with an evaluation's most frames."""
    by_frames = as_table(found.table("summary.json").get("frames"))
    counts = [count for count in by_frames if len(count) < 10 and count.isdecimal()]
    table = as_table(by_frames[max(counts, key=int)]) if counts else {}
    media = as_table(table.get("by_modality"))
    of = {} if list(media) == ["video"] else {"all questions": table}
    of["videos"] = as_table(media.get("video"))
    figures = {f"accuracy, {k}": finite(as_table(t.get("ordered")).get("accuracy")) for k, t in of.items()}
    for name in ("temporal_gap", "look_gap"):
        figures[name.replace("_", " ")] = finite(as_table(table.get(name)).get("gap"))
    return [{"caption": c, "value": f"{v:z.2f}"} for c, v in figures.items() if v is not None]


def sparkline(lines: Lines) -> dict[str, Any]:
    """Return the name of the most telling series, and about 60 of its values."""
    for name in SPARKS:
        if len(found := values(lines, name)) > 1:
            every = max(1, len(found) // SPARK_POINTS)
            return {"name": name, "values": [float(f"{value:.4g}") for value in found[::every]]}
    return {"name": "", "values": []}
