"""The series of a run in columns, and at most 1,500 points of each for a chart.

Row i of every column is one logging step. Points are means over 1, 2, 4, … neighbouring rows.
"""

import math
import tomllib
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from video_r1.report.values import finite, is_number

MAX_POINTS = 1500
MAX_SERIES = 400
MAX_CELLS = 10_000_000  # 80 MB; above it, neighbouring rows become one
MISSING = math.nan
NOT_SERIES = {"step", "epoch", "time", "stopped_early"}
SERIES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("series.toml").read_text("utf-8"))
RENAMED: dict[str, str] = SERIES["renamed"]  # today's names by old ones


def current(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of a run's file with today's names."""
    return {RENAMED.get(name, name): value for name, value in record.items()}


class Curves:
    """Columns of metrics.jsonl."""

    def __init__(self) -> None:
        self.merged = 1  # logged lines behind a row
        self.steps, self.times = array("q"), array("d")
        self.series: dict[str, array[float]] = {}
        self.stopped_early: float | None = None  # validations without progress that ended the run
        self.bad: dict[str, int] = {}  # number of values that were not finite

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a line. A line of the same step joins its row (validation); a line of an earlier step replaces
        all rows from there on: the run was resumed from a checkpoint.
        """
        step = finite(record.get("step"))
        if step is None or not 0 <= step < 2**53:
            return
        if self.steps and int(step) < self.steps[-1]:
            row = bisect_left(self.steps, int(step))
            for column in (self.steps, self.times, *self.series.values()):
                del column[row:]
        if not self.steps or int(step) > self.steps[-1]:
            self.steps.append(int(step))
            self.times.append(self.times[-1] if self.times else 0.0)
            for column in self.series.values():
                column.append(MISSING)
        self.times[-1] = finite(record.get("time"), self.times[-1]) or 0.0
        self.stopped_early = finite(record.get("stopped_early"))
        for name, value in current(record).items():
            if name in NOT_SERIES or not (value is None or is_number(value)):  # None: not finite
                continue
            if name not in self.series:
                if len(self.series) >= MAX_SERIES:
                    continue
                self.series[name] = array("d", [MISSING]) * len(self.steps)
            known = finite(value)
            if known is None:
                self.bad[name] = self.bad.get(name, 0) + 1
            else:
                self.series[name][-1] = known
        if len(self.steps) * (len(self.series) + 2) > MAX_CELLS:
            self.merged *= 2
            self.steps, self.times = array("q", _last(self.steps, 2)), array("d", _last(self.times, 2))
            self.series = {name: array("d", _means(column, 2)) for name, column in self.series.items()}

    def points(self) -> dict[str, Any]:
        """Return the points of all series as JSON values; a series has None where it was not logged."""
        width = 1
        while len(self.steps) > MAX_POINTS * width:
            width *= 2
        return {
            "averaged": width * self.merged,
            "steps": _last(self.steps, width),
            "times": _last(self.times, width),
            "series": {
                name: [None if math.isnan(v) else float(f"{v:.5g}") for v in _means(column, width)]
                for name, column in self.series.items()
            },
            "bad": self.bad,
            "stopped_early": self.stopped_early,
        }


def _last(column: "array[Any]", width: int) -> list[Any]:
    """Return the last value of each `width` neighbours."""
    return [column[min(end, len(column)) - 1] for end in range(width, len(column) + width, width)]


def _means(column: "array[float]", width: int) -> list[float]:
    """Return the mean of each `width` neighbours, over known values."""
    values = np.array(column)
    if width == 1 or not len(values):
        return values.tolist()
    starts = np.arange(0, len(values), width)
    known = ~np.isnan(values)
    counts = np.add.reduceat(known.astype(float), starts)
    with np.errstate(over="ignore"):
        sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), MISSING), where=counts > 0)
    return np.where(np.isfinite(means), means, MISSING).tolist()
