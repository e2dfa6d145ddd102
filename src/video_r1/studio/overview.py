"""A run in a few lines, for the list: state, step, time left, the figures that matter, a sparkline, alerts.

Of a metrics file only its end and some lines from before are read: a list of long runs is there at once.
"""

import os
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from video_r1.report.page import KEY_SERIES, duration
from video_r1.report.run_data import as_table, finite, prediction_files
from video_r1.studio.alerts import Alert, alert_of_silence, alerts_of, recent
from video_r1.studio.folders import Found, read_settings
from video_r1.studio.states import (
    Progress,
    claim_of,
    is_alive,
    is_done,
    last_written,
    progress_of,
    state_of,
)
from video_r1.studio.tail import last_lines, parse

DEMO_MARK = ".demo"  # lab.demo.MARK
READ_FILES = ("metrics.jsonl", "config.yaml", "evaluation.json", "summary.json", "rollouts.jsonl")
SPARK_POINTS = 60
SPARKS = ("reward/accuracy", "reward/total", "loss")
SHOWN = {
    "rl": ("reward/accuracy", "temporal/gap", "reward/format", "completion/length"),
    "sft": ("loss", "accuracy/token", "eval_loss"),
}
SUMMARY_BYTES = 4 << 20


class Told(NamedTuple):
    """What a run's files say, whatever the time is."""

    kind: str
    progress: Progress
    figures: list[dict[str, str]]
    spark: tuple[str, list[float]]
    alerts: list[Alert]


@lru_cache(maxsize=512)
def told(found: Found, stamp: tuple[Any, ...]) -> Told:
    """stamp: sizes and times of the files that are read, so that they are read again when they change."""
    lines = last_lines(found, "metrics.jsonl", sketched=SPARK_POINTS)
    kind = kind_of(found, lines)
    figures = training_figures(kind, lines) if kind in SHOWN else evaluation_figures(found)
    return Told(kind, progress_of(lines, read_settings(found)), figures, sparkline(lines), alerts_of(lines))


def stamp_of(found: Found) -> tuple[Any, ...]:
    stamps: list[Any] = []
    for name in READ_FILES:
        try:
            status = os.stat(found.folder / name)
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def overview(found: Found, now: float | None = None) -> dict[str, Any]:
    """What the list says of a run, as JSON values."""
    now = time.time() if now is None else now
    kind, progress, figures, (name, values), alerts = told(found, stamp_of(found))
    written = last_written(found.folder)
    silent = now - written if written is not None else 0.0
    claim = claim_of(found)
    state = state_of(claim, is_done(found, kind), progress, silent, is_alive(claim, silent))
    running = state.word == "running"
    alerts = (alert_of_silence(silent, progress.each) if running else []) + alerts
    return {
        "name": found.name,
        "kind": kind,
        "demo": (found.folder / DEMO_MARK).is_file(),
        "state": state.word,
        "why": state.why,
        "step": progress.step,
        "steps": progress.steps,
        "left": duration(progress.left) if running and progress.left is not None else None,
        "taken": None if progress.taken is None else duration(progress.taken),
        "written": written,
        "figures": figures,
        "spark": {"name": name, "values": values},
        "alerts": [alert._asdict() for alert in alerts],
    }


def kind_of(found: Found, lines: Sequence[Mapping[str, Any]]) -> str:
    """`rl`, `sft`, `evaluation` or `data`, as the report calls them."""
    if (found.folder / "rollouts.jsonl").exists() or any(
        name.startswith("reward/") for line in lines[-3:] for name in line
    ):
        return "rl"
    if (found.folder / "metrics.jsonl").exists():
        return "sft"
    return "evaluation" if prediction_files(found.folder) else "data"


def training_figures(kind: str, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Means over the last logged lines."""
    figures = []
    for name in SHOWN[kind]:
        caption, unit, decimals = KEY_SERIES[name]
        if (value := recent(lines, name)) is not None:
            figures.append({"caption": caption, "value": f"{value:.{decimals}f} {unit}".rstrip()})
    return figures


def evaluation_figures(found: Found) -> list[dict[str, str]]:
    """Accuracy in order and the temporal gap, of the most frames that an evaluation has."""
    by_frames = as_table(as_table(parse(found.text("summary.json", SUMMARY_BYTES).encode())).get("frames"))
    if not by_frames:
        return []
    frames = max(by_frames, key=lambda count: int(count) if count.isdecimal() else 0)
    table = as_table(by_frames[frames])
    accuracy = finite(as_table(table.get("ordered")).get("accuracy"))
    gap = finite(as_table(table.get("temporal_gap")).get("gap"))
    figures = {"accuracy": accuracy, "temporal gap": gap}
    return [{"caption": c, "value": f"{v:.2f}"} for c, v in figures.items() if v is not None]


def sparkline(lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]]:
    """The series that tells most, and about 60 of its values."""
    for name in SPARKS:
        values = [value for line in lines if (value := finite(line.get(name))) is not None]
        if len(values) > 1:
            every = max(1, len(values) // SPARK_POINTS)
            return name, [float(f"{value:.4g}") for value in values[::every]]
    return "", []


def listing(runs: Mapping[str, Found]) -> list[dict[str, Any]]:
    """All runs, those that run first, then by when they last wrote."""
    rows = [overview(found) for found in runs.values()]
    return sorted(rows, key=lambda row: (row["state"] != "running", -(row["written"] or 0.0), row["name"]))
