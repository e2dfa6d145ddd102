"""A manifest of any length: a few bytes of each row in memory, by which rows are found. A row itself is read
from the file when somebody looks at it.
"""

import json
import re
import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from video_r1.data.manifests.records import Sample, check_row
from video_r1.data.sources.media_paths import MediaPaths
from video_r1.report.run_data import as_table, finite, text
from video_r1.settings.filters import PASS_RATES, TRUE, Keep
from video_r1.studio.finding import Manifest
from video_r1.studio.listed import ListFile
from video_r1.studio.tail import Tail, parse

MAX_ROWS = 5_000_000
MAX_NAMES = 250  # of types, sources and rates; the others are "other"
LABEL = 80  # characters
MISSING = float("nan")
COLUMNS = ("type", "media", "source")
FIELDS = {"type": "problem_type", "media": "data_type", "source": "data_source"}


class Names:
    """Texts as small numbers."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.numbers: dict[str, int] = {}

    def number(self, value: object) -> int:
        name = text(value)[:LABEL] if value is not None else ""
        if name not in self.numbers:
            if len(self.names) >= MAX_NAMES:
                name = "other"
            self.numbers.setdefault(name, len(self.names))
            if self.numbers[name] == len(self.names):
                self.names.append(name)
        return self.numbers[name]


class NamedPlaces(MediaPaths):
    """Of files that may not be read the path as the row says it."""

    def find(self, path: str) -> str:
        try:
            return super().find(path)
        except ValueError:
            return path


def paths_of(row: dict[str, Any]) -> list[str]:
    """The files of a row, or of a recorded group."""
    path = row.get("path", "")
    return [text(one) for one in path] if isinstance(path, list) and path else [text(path)]


class ManifestIndex:
    """An index of one manifest, as far as it was read. `life` counts how often its rows have changed."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.lock = threading.Lock()
        found, file = manifest.found, manifest.file
        self.tail = Tail(found, file) if _has_lines(manifest) else ListFile(found, file)
        self.places, self.named = (of(str(found.folder.resolve())) for of in (MediaPaths, NamedPlaces))
        self.life = 0
        self._forget()

    def _forget(self) -> None:
        self.life += 1
        self.starts, self.sizes = array("q"), array("l")
        self.codes = {name: array("B") for name in COLUMNS}
        self.names = {name: Names() for name in COLUMNS}
        self.bad = array("B")  # whether data check complains of the row
        self.lengths = array("l")  # characters of the question
        self.rates: dict[str, array[float]] = {}
        self.ids = array("q")  # hashes of the questions' names
        self._known: set[int] = set()

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, seconds: float = 0.25) -> None:
        """Goes on with the file for about so many seconds."""
        self.tail.read(self._take, self._forget, seconds)

    def _take(self, place: int, size: int, row: dict[str, Any]) -> None:
        if len(self) >= MAX_ROWS:
            return
        identity = hash(str(row.get("problem_id")))
        _, problems = check_row(row, self.places, 2)
        self.bad.append(bool(problems) or identity in self._known)
        self._known.add(identity)
        self.ids.append(identity)
        self.starts.append(place)
        self.sizes.append(size)
        for name in COLUMNS:
            self.codes[name].append(self.names[name].number(row.get(FIELDS[name])))
        self.lengths.append(len(text(row.get("problem", ""))))
        for name, rate in as_table(row.get(PASS_RATES)).items():
            if name not in self.rates and len(self.rates) < MAX_NAMES:
                self.rates[name] = array("f", [MISSING]) * (len(self) - 1)
            if name in self.rates:
                value = finite(rate)
                self.rates[name].append(MISSING if value is None else value)
        for column in self.rates.values():
            if len(column) < len(self):
                column.append(MISSING)

    def chosen(self, wanted: dict[str, str], problems: bool = False, keep: Keep | None = None) -> np.ndarray:
        """Numbers of the rows that fit. wanted: a name of `type`, `media`, `source`; problems: only rows with
        some; keep: on their pass rates.
        """
        fits = np.ones(len(self), dtype=bool)
        for name, value in wanted.items():
            code = self.names[name].numbers.get(value, -1)
            fits &= np.array(self.codes[name]) == code
        if problems:
            fits &= np.array(self.bad) != 0
        rows = np.flatnonzero(fits)
        if keep is not None:
            columns = {name: np.array(column)[rows].tolist() for name, column in self.rates.items()}
            kept = [
                keep.truth({name: _known(column[i]) for name, column in columns.items()}) == TRUE
                for i in range(len(rows))
            ]
            rows = rows[np.array(kept, dtype=bool)]
        return rows

    def lines(self, rows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """The bytes of rows, in their order. Raises OSError, Refused."""
        with self.manifest.found.open(self.manifest.file) as file:
            for row in rows:
                file.seek(self.starts[row])
                yield row, file.read(self.sizes[row])

    def row(self, number: int) -> dict[str, Any] | None:
        """A row as it stands in the file; None where there is none any more."""
        if not 0 <= number < len(self):
            return None
        ((_, line),) = self.lines([number])
        return parse(line)

    def questions(self, problem_id: str) -> Iterator[tuple[int, Sample]]:
        """The good rows with that name, each as a sample; also where its files may not be read from here."""
        for number in np.flatnonzero(np.array(self.ids) == hash(problem_id)).tolist():
            sample, _ = check_row(self.row(number), self.named, 0)
            if sample is not None and str(sample.problem_id) == problem_id:
                yield number, sample

    def sample(self, number: int) -> tuple[Sample | None, list[str]]:
        """A row as a checked sample, or None and what is wrong with it."""
        row = self.row(number)
        if row is None:
            return None, ["the row is not there any more"]
        sample, problems = check_row(row, self.places, 2)
        if self.bad[number] and not problems:
            problems = ["problem_id is used before; each row needs its own"]
        return sample, problems

    def counts(self) -> dict[str, Any]:
        """How many rows there are of each type, media and source, and of each length of question."""
        counted = {
            name: {
                self.names[name].names[code]: int(count)
                for code, count in enumerate(np.bincount(np.array(self.codes[name], dtype=np.int64)))
                if count
            }
            for name in COLUMNS
        }
        edges = [0, 25, 50, 75, 100, 150, 200, 300, 500, 1000]
        found, _ = np.histogram(np.array(self.lengths), [*edges, np.inf])
        return {**counted, "lengths": dict(zip(map(str, edges), map(int, found), strict=True))}


def pattern_of(words: str) -> re.Pattern[bytes]:
    """Finds the words in a row as it is written, whether its characters are escaped or not."""
    forms = {json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]}
    return re.compile(b"|".join(re.escape(form.encode("utf-8", "replace")) for form in forms), re.IGNORECASE)


def _has_lines(manifest: Manifest) -> bool:
    with manifest.found.open(manifest.file) as file:
        return not file.read(200).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _known(value: float) -> float | None:
    return None if value != value else value
