"""A run's groups recorded with their completions (rollouts.jsonl).

The server keeps the position of each line and a few words for lists and filters; a group is read from the
file when somebody looks at it.
"""

from typing import Any

from video_r1.data.manifests.records import question_digest
from video_r1.report.curves import current
from video_r1.report.reader import Found, Tail
from video_r1.report.run_data import group_of, strip_of
from video_r1.report.values import as_list, as_table, finite, text, whole
from video_r1.studio.manifests import FIELDS, paths_of

MAX_ENTRIES = 100_000
LABEL = 80  # characters
LABELS = {"id": "problem_id", "problem": "problem", **FIELDS}


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
        record = self.tail.at(*self.places[number])
        return record if record is not None and entry_of(record) == self.entries[number] else None

    def group(self, number: int, address: str) -> dict[str, Any] | None:
        """Return a group for the page, with its `question` (a digest); address: of its frames."""
        record = self.record(number)
        if record is None:
            return None
        group = group_of(record, address if strip_of(self.found.folder, record) else None, self.found.folder)
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
        "pShuffled": finite(current(record).get("p_contrast"), _share(shuffled)),
        "total": round(sum(totals) / len(totals), 4) if totals else 0.0,
        "flat": len({round(total, 4) for total in totals}) <= 1,
    }


def _accuracy(item: dict[str, Any]) -> float:
    return finite(as_table(item.get("rewards")).get("accuracy")) or 0.0


def _share(items: list[dict[str, Any]]) -> float | None:
    return sum(_accuracy(item) > 0.5 for item in items) / len(items) if items else None
