"""The recorded groups of a run: a small entry of each for lists and filters, and its place in the file, from
which the group itself is read when somebody looks at it.
"""

from typing import Any

from video_r1.data.manifests.records import question_digest
from video_r1.report.groups import group_of, strip_of
from video_r1.report.run_data import as_list, as_table, finite, text, whole
from video_r1.studio.folders import Found
from video_r1.studio.manifest_index import paths_of
from video_r1.studio.tail import Tail, parse

MAX_ENTRIES = 100_000
LABEL = 80  # characters


class Recorded:
    """An index of rollouts.jsonl, as far as it was read. `life` counts how often entries have changed."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.tail = Tail(found, "rollouts.jsonl", max_line=32 << 20)
        self.life = 0
        self._forget()

    def _forget(self) -> None:
        self.life += 1
        self.entries: list[dict[str, Any]] = []
        self.places: list[tuple[int, int]] = []
        self._numbers: dict[tuple[int, str], int] = {}

    def read(self, seconds: float = 0.25) -> None:
        """Goes on with the file for about so many seconds."""
        self.tail.read(self._take, self._forget, seconds)

    def _take(self, place: int, length: int, record: dict[str, Any]) -> None:
        entry = entry_of(record)
        key = (entry["step"], entry["id"])
        if key in self._numbers:  # recorded again by a run that was resumed
            number = self._numbers[key]
            self.entries[number], self.places[number] = entry, (place, length)
            self.life += 1
        elif len(self.entries) < MAX_ENTRIES:
            self._numbers[key] = len(self.entries)
            self.entries.append(entry)
            self.places.append((place, length))

    def record(self, number: int) -> dict[str, Any] | None:
        """The line of an entry as it stands in the file; None where it is there no more."""
        if not 0 <= number < len(self.places):
            return None
        place, length = self.places[number]
        with self.found.open(self.tail.name) as file:
            file.seek(place)
            record = parse(file.read(length))
        return record if record is not None and entry_of(record) == self.entries[number] else None

    def group(self, number: int, address: str) -> dict[str, Any] | None:
        """The group of an entry for the page, and its `question` (`question_digest`); `address`: that of its
        frames.
        """
        record = self.record(number)
        if record is None:
            return None
        group = group_of(record, address if strip_of(self.found.folder, record) else None)
        question = question_digest(group["problem"], group["options"], group["answer"], paths_of(record))
        return {**group, "question": question}


def entry_of(record: dict[str, Any]) -> dict[str, Any]:
    """What lists and filters show of a group. p, pShuffled: shares right; total: mean reward of the
    completions in order; flat: these all earn the same.
    """
    ordered = [as_table(item) for item in as_list(record.get("ordered"))]
    shuffled = [as_table(item) for item in as_list(record.get("shuffled"))]
    totals = [finite(item.get("total"), _accuracy(item)) or 0.0 for item in ordered]
    p, p_shuffled = finite(record.get("p")), finite(record.get("p_shuffled"))
    return {
        "step": whole(record.get("step")),
        "id": text(record.get("problem_id", ""))[:LABEL],
        "problem": text(record.get("problem", ""))[:LABEL],
        "type": text(record.get("problem_type", ""))[:LABEL],
        "media": text(record.get("data_type", ""))[:LABEL],
        "source": text(record.get("data_source", ""))[:LABEL],
        "p": _share(ordered) if p is None else p,
        "pShuffled": _share(shuffled) if p_shuffled is None and shuffled else p_shuffled,
        "total": round(sum(totals) / len(totals), 4) if totals else 0.0,
        "flat": len({round(total, 4) for total in totals}) <= 1,
    }


def _accuracy(item: dict[str, Any]) -> float:
    return finite(as_table(item.get("rewards")).get("accuracy")) or 0.0


def _share(items: list[dict[str, Any]]) -> float | None:
    return sum(_accuracy(item) > 0.5 for item in items) / len(items) if items else None
