"""What a run set aside: groups without variance (left_out.jsonl) and questions whose media could not be used
(quarantine.jsonl), a page at a time, the last first. Of each line the server keeps its place and a few bytes.
"""

from array import array
from functools import partial
from typing import Any

import numpy as np

from video_r1.report.run_data import finite, short_path, text, whole
from video_r1.studio.folders import Found, Refused
from video_r1.studio.tail import Tail, parse

REASONS = ("replaced", "tried", "no variance", "media")
FILES = ("left_out.jsonl", "quarantine.jsonl")
PAGE = 50
MOST = 400_000  # lines of a file that are listed, 17 bytes each; then the older half goes
MAX_LINE = 1 << 20  # bytes
CELL, LONG = 100, 500  # characters


class LeftOut:
    """An index of the two files of a run, as far as they were read."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.tails = [Tail(found, name, MAX_LINE) for name in FILES]
        self.places = [array("q"), array("q")]
        self.steps = [array("q"), array("q")]
        self.reasons = [array("b"), array("b")]
        self.dropped = 0

    def read(self, seconds: float = 0.25) -> None:
        """Goes on with the files for about so many seconds."""
        for n, tail in enumerate(self.tails):
            tail.read(partial(self._take, n), partial(self._forget, n), seconds)

    def _forget(self, n: int) -> None:
        for column in (self.places, self.steps, self.reasons):
            del column[n][:]

    def _take(self, n: int, place: int, length: int, record: dict[str, Any]) -> None:
        if len(self.places[n]) >= MOST:
            self.dropped += MOST // 2
            for column in (self.places, self.steps, self.reasons):
                del column[n][: MOST // 2]
        self.places[n].append(place)
        self.steps[n].append(min(max(0, whole(record.get("step"))), 2**60))
        self.reasons[n].append(REASONS.index(reason_of(n, record)))

    def page(self, reason: str, at: int) -> dict[str, Any]:
        """Rows from number `at` on of those with a reason ("" for any), the last step first, and how many
        there are of each reason.
        """
        reasons = np.concatenate([np.frombuffer(column, np.int8) for column in self.reasons])
        steps = np.concatenate([np.frombuffer(column, np.int64) for column in self.steps])
        files = np.repeat([0, 1], [len(column) for column in self.places])
        places = np.concatenate([np.frombuffer(column, np.int64) for column in self.places])
        chosen = np.arange(len(reasons))
        if reason in REASONS:
            chosen = np.flatnonzero(reasons == REASONS.index(reason))
        chosen = chosen[np.argsort(-steps[chosen], kind="stable")]
        shown = chosen[max(0, at) : max(0, at) + PAGE]
        counts = np.bincount(reasons, minlength=len(REASONS)).tolist()
        notes = [note for tail in self.tails for note in tail.notes]
        if self.dropped:
            notes.append(f"the {self.dropped:,} oldest are not listed: {FILES[0]} has them")
        return {
            "counts": dict(zip(REASONS, counts, strict=True)),
            "total": len(chosen),
            "rows": [self._row(int(files[i]), int(places[i])) for i in shown],
            "more": any(tail.more for tail in self.tails),
            "notes": notes,
        }

    def _row(self, n: int, place: int) -> dict[str, Any]:
        """What the page shows of a line; nothing of one that is there no more."""
        try:
            with self.found.open(FILES[n]) as file:
                file.seek(place)
                record = parse(file.readline(MAX_LINE)) or {}
        except (OSError, Refused):
            record = {}
        return row_of(n, record)


def reason_of(n: int, record: dict[str, Any]) -> str:
    """The reason of a line of one of FILES."""
    said = record.get("reason")
    if n == 1:
        return "media"
    return said if isinstance(said, str) and said in REASONS else "no variance"


def row_of(n: int, record: dict[str, Any]) -> dict[str, Any]:
    """A line with every field in its expected type: a page never trusts a file."""
    taken = record.get("replaced_by")
    return {
        "step": None if finite(record.get("step")) is None else whole(record.get("step")),
        "id": text(record.get("problem_id", ""))[:CELL],
        "problem": text(record.get("problem", ""))[:LONG] or short_path(text(record.get("path", "")))[:LONG],
        "type": text(record.get("problem_type", ""))[:CELL],
        "source": text(record.get("data_source") or "")[:CELL],
        "accuracy": finite(record.get("accuracy")),
        "contrast": finite(record.get("p_shuffled")),
        "reward": finite(record.get("reward")),
        "round": whole(record.get("round")),
        "reason": reason_of(n, record),
        "why": text(record.get("reason", ""))[:LONG] if n == 1 else "",
        "by": None if taken is None else text(taken)[:CELL],
    }
