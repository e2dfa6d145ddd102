"""The series of a run in columns, and at most 1,500 points of each for a chart.

Row i of every column is one logging step. Points are means over 1, 2, 4, … neighbouring rows: complete points
never change, so that a browser asks for the new ones only.
"""

import math
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from video_r1.report.run_data import NOT_SERIES, finite, is_number

MAX_POINTS = 1500
MAX_SERIES = 400
MAX_CELLS = 10_000_000  # 80 MB; above it, neighbouring rows become one
MISSING = math.nan


class Curves:
    """Columns of metrics.jsonl. `life` counts how often rows that were sent have changed."""

    def __init__(self) -> None:
        self.life = 0
        self.clear()

    def clear(self) -> None:
        self.life += 1
        self.rows = 0
        self.merged = 1  # logged lines behind a row
        self.steps, self.times, self.tokens = array("q"), array("d"), array("d")
        self.series: dict[str, array[float]] = {}
        self.bad: dict[str, int] = {}  # number of values that were not finite

    def add(self, place: int, length: int, record: Mapping[str, Any]) -> None:
        """Add a line. A line of the same step joins its row (validation); a line of an earlier step replaces
        all rows from there on: the run was resumed from a checkpoint.
        """
        step = finite(record.get("step"))
        if step is None or not 0 <= step < 2**53:
            return
        number = int(step)
        if self.rows and number < self.steps[-1]:
            self._cut(int(np.searchsorted(np.array(self.steps), number)))
        if not self.rows or number > self.steps[-1]:
            self._begin(number, record)
        for name, value in record.items():
            if name in NOT_SERIES or not (value is None or is_number(value)):
                continue
            if name not in self.series:
                if len(self.series) >= MAX_SERIES:
                    continue
                self.series[name] = array("d", [MISSING]) * self.rows
            known = finite(value)
            if known is None:
                self.bad[name] = self.bad.get(name, 0) + 1
            else:
                self.series[name][-1] = known
        if self.rows * (len(self.series) + 3) > MAX_CELLS:
            self._halve()

    def _begin(self, step: int, record: Mapping[str, Any]) -> None:
        before = self.steps[-1] if self.rows else 0
        tokens = self.tokens[-1] if self.rows else 0.0
        self.steps.append(step)
        self.times.append(finite(record.get("time"), self.times[-1] if self.rows else 0.0) or 0.0)
        self.tokens.append(_tokens(record, step - before) + tokens)
        for column in self.series.values():
            column.append(MISSING)
        self.rows += 1

    def _cut(self, rows: int) -> None:
        self.life += 1
        self.rows = rows
        for column in (self.steps, self.times, self.tokens, *self.series.values()):
            del column[rows:]

    def _halve(self) -> None:
        self.life += 1
        self.merged *= 2
        self.rows = (self.rows + 1) // 2
        self.steps, self.times, self.tokens = (
            array(column.typecode, _last(column, 2).tolist())
            for column in (self.steps, self.times, self.tokens)
        )
        self.series = {name: array("d", _means(column, 2)) for name, column in self.series.items()}

    def points(self, have: int = 0, width: int = 0) -> dict[str, Any]:
        """Return points of a chart as JSON values; `from`: the number of the first of them.

        have, width: number of points that the reader has, and rows in each. If they are still valid, only the
        last one, which may have been incomplete, and newer ones are returned.
        """
        now = 1
        while self.rows > MAX_POINTS * now:
            now *= 2
        first = max(0, have - 1) if width == now else 0
        begin = first * now

        return {
            "life": self.life,
            "width": now,
            "averaged": now * self.merged,
            "from": first,
            "steps": _last(self.steps[begin:], now).tolist(),
            "times": _last(self.times[begin:], now).tolist(),
            "tokens": _last(self.tokens[begin:], now).tolist(),
            "series": {
                name: [
                    None if math.isnan(value) else float(f"{value:.5g}")
                    for value in _means(column[begin:], now)
                ]
                for name, column in self.series.items()
            },
            "bad": self.bad,
        }


def _tokens(record: Mapping[str, Any], steps: int) -> float:
    """Return the tokens that were sampled in these steps, or trained on in SFT; 0 if unknown."""
    speed, seconds = finite(record.get("speed/tokens_per_second")), finite(record.get("seconds/rollout"))
    if speed is None or seconds is None:
        return 0.0
    return max(0.0, speed * seconds * max(0, steps))


def _last(column: "array[Any]", width: int) -> np.ndarray:
    """Return the last value of each `width` neighbours."""
    values = np.array(column)
    ends = np.append(np.arange(width - 1, len(values) - 1, width), len(values) - 1) if len(values) else []
    return values[np.asarray(ends, dtype=int)]


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
