"""A run's groups: those recorded with their completions (rollouts.jsonl), and those that taught it nothing.

The server keeps the position of each line and a few words for lists and filters; a group is read from the
file when somebody looks at it.
"""

from collections import Counter
from functools import partial
from typing import Any

from video_r1.data.manifests.records import question_digest
from video_r1.report.run_data import as_list, as_table, finite, group_of, short_path, strip_of, text, whole
from video_r1.studio.folders import Found, Refused
from video_r1.studio.manifests import FIELDS, paths_of
from video_r1.studio.tail import Tail, parse

MAX_ENTRIES = 100_000
LABEL = 80  # characters
LABELS = {"id": "problem_id", "problem": "problem", **FIELDS}
REASONS = ("replaced", "tried", "no variance", "media")
SKIPPED_FILES = ("left_out.jsonl", "quarantine.jsonl")
PAGE = 50
MOST = 100_000  # listed lines of a file, about 100 bytes each; then the older half goes
MAX_LINE = 1 << 20  # bytes
CELL, LONG = 100, 500  # characters


class RecordedGroups:
    """An index of rollouts.jsonl. `life` counts how often entries have changed."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.tail = Tail(found, "rollouts.jsonl", max_line=32 << 20)
        self.life = 0
        self._restart()

    def _restart(self) -> None:
        self.life += 1
        self.entries: list[dict[str, Any]] = []
        self.places: list[tuple[int, int]] = []
        self._numbers: dict[tuple[int, str], int] = {}

    def read(self) -> None:
        self.tail.read(self._take, self._restart)

    def _take(self, place: int, length: int, record: dict[str, Any]) -> None:
        entry = entry_of(record)
        key = (entry["step"], entry["id"])
        if key in self._numbers:  # recorded again by a resumed run
            number = self._numbers[key]
            self.entries[number], self.places[number] = entry, (place, length)
            self.life += 1
        elif len(self.entries) < MAX_ENTRIES:
            self._numbers[key] = len(self.entries)
            self.entries.append(entry)
            self.places.append((place, length))

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the line of an entry, None if the file does not have it any more."""
        if not 0 <= number < len(self.places):
            return None
        place, length = self.places[number]
        with self.found.open(self.tail.name) as file:
            file.seek(place)
            record = parse(file.read(length))
        return record if record is not None and entry_of(record) == self.entries[number] else None

    def group(self, number: int, address: str) -> dict[str, Any] | None:
        """Return a group for the page, with its `question` (a digest); address: of its frames."""
        record = self.record(number)
        if record is None:
            return None
        group = group_of(record, address if strip_of(self.found.folder, record) else None)
        question = question_digest(group["problem"], group["options"], group["answer"], paths_of(record))
        return {**group, "question": question}


def entry_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what lists and filters show of a group.

    p, pShuffled: shares of right completions; total: mean reward in order; flat: all in order earn the same.
    """
    ordered = [as_table(item) for item in as_list(record.get("ordered"))]
    shuffled = [as_table(item) for item in as_list(record.get("shuffled"))]
    totals = [finite(item.get("total"), _accuracy(item)) or 0.0 for item in ordered]
    return {
        "step": whole(record.get("step")),
        **{name: text(record.get(field, ""))[:LABEL] for name, field in LABELS.items()},
        "p": finite(record.get("p"), _share(ordered)),
        "pShuffled": finite(record.get("p_shuffled"), _share(shuffled)),
        "total": round(sum(totals) / len(totals), 4) if totals else 0.0,
        "flat": len({round(total, 4) for total in totals}) <= 1,
    }


def _accuracy(item: dict[str, Any]) -> float:
    return finite(as_table(item.get("rewards")).get("accuracy")) or 0.0


def _share(items: list[dict[str, Any]]) -> float | None:
    return sum(_accuracy(item) > 0.5 for item in items) / len(items) if items else None


class SkippedGroups:
    """An index of groups without variance (left_out.jsonl) and of unusable media (quarantine.jsonl)."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.tails = [Tail(found, name, MAX_LINE) for name in SKIPPED_FILES]
        # (step, reason, file, position) of each line, by file.
        self.lines: list[list[tuple[int, str, int, int]]] = [[], []]
        self.dropped = 0

    def read(self) -> None:
        for file, tail in enumerate(self.tails):
            tail.read(partial(self._take, file), self.lines[file].clear)

    def _take(self, file: int, place: int, length: int, record: dict[str, Any]) -> None:
        if len(self.lines[file]) >= MOST:
            self.dropped += MOST // 2
            del self.lines[file][: MOST // 2]
        step = max(0, whole(record.get("step")))
        self.lines[file].append((step, reason_of(file, record), file, place))

    def page(self, reason: str, at: int) -> dict[str, Any]:
        """Return 50 rows from number `at` on, the last step first, and the number of rows by reason.

        reason: one of REASONS, or "" for any.
        """
        lines = [line for file in self.lines for line in file]
        chosen = [line for line in lines if line[1] == reason or reason not in REASONS]
        chosen.sort(key=lambda line: -line[0])
        counts = Counter(line[1] for line in lines)
        notes = [note for tail in self.tails for note in tail.notes]
        if self.dropped:
            notes.append(f"the {self.dropped:,} oldest are not listed: {SKIPPED_FILES[0]} has them")
        return {
            "counts": {name: counts[name] for name in REASONS},
            "total": len(chosen),
            "rows": [self._row(file, place) for _, _, file, place in chosen[max(0, at) :][:PAGE]],
            "more": any(tail.more for tail in self.tails),
            "notes": notes,
        }

    def _row(self, file: int, place: int) -> dict[str, Any]:
        """Return a line for the page, every field in its expected type: a page never trusts a file."""
        try:
            with self.found.open(SKIPPED_FILES[file]) as opened:
                opened.seek(place)
                record = parse(opened.readline(MAX_LINE)) or {}
        except (OSError, Refused):
            record = {}
        taken = record.get("replaced_by")
        path = short_path(text(record.get("path", "")))
        fields = {"type": "problem_type", "source": "data_source"}
        numbers = {"accuracy": "accuracy", "contrast": "p_shuffled", "reward": "reward"}
        return {
            **{name: text(record.get(field) or "")[:CELL] for name, field in fields.items()},
            **{name: finite(record.get(field)) for name, field in numbers.items()},
            "step": None if finite(record.get("step")) is None else whole(record.get("step")),
            "id": text(record.get("problem_id", ""))[:CELL],
            "problem": (text(record.get("problem", "")) or path)[:LONG],
            "round": whole(record.get("round")),
            "reason": reason_of(file, record),
            "why": text(record.get("reason", ""))[:LONG] if file == 1 else "",
            "by": None if taken is None else text(taken)[:CELL],
        }


def reason_of(file: int, record: dict[str, Any]) -> str:
    """Return the reason of a line of one of SKIPPED_FILES."""
    said = record.get("reason")
    if file == 1:
        return "media"
    return said if isinstance(said, str) and said in REASONS else "no variance"
