"""Manifests of any length: which there are, pages of their rows, counts of each kind, and their clips.

The server keeps a few bytes of each row, by which rows are found; a row is read from the file when needed.
"""

import json
import os
import re
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from video_r1.data.balance import constant_answers
from video_r1.data.manifests.records import Sample, check_row, question_digest
from video_r1.data.sources.media_paths import MediaPaths, data_type_of
from video_r1.data.sources.media_types import ClipRef
from video_r1.data.sources.remote import local_file
from video_r1.errors import ConfigError, ManifestError
from video_r1.report.reader import JsonArray, Tail
from video_r1.report.values import as_list, as_table, finite, parse, short_path, text
from video_r1.settings.filters import PASS_RATES, TRUE, Keep, parse_keep
from video_r1.studio.clips import frames_of, play
from video_r1.studio.folders import Library, Manifest
from video_r1.studio.requests import Answer, number

OPEN_MANIFESTS = 12  # indexes in memory
PAGE = 50  # rows of one answer
SEARCH_SECONDS = 1.0  # of one answer
TEXT = 2000  # characters of a field
MAX_ROWS = 5_000_000
MAX_NAMES = 250  # of types and sources; the others are "other"
LABEL = 80  # characters
FIELDS = {"type": "problem_type", "media": "data_type", "source": "data_source"}


class UncheckedPaths(MediaPaths):
    """Media paths without permission checks: a file that may not be read keeps the row's path."""

    def find(self, path: str) -> str:
        try:
            return super().find(path)
        except ValueError:
            return path


def paths_of(row: dict[str, Any]) -> list[str]:
    """Return the files of a row, or of a recorded group."""
    path = row.get("path", "")
    return [text(each) for each in path] if isinstance(path, list) and path else [text(path)]


class ManifestIndex:
    """An index of one manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.lock = threading.Lock()
        found, file = manifest.found, manifest.file
        with found.open(file) as opened:
            is_list = opened.read(200).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        self.tail = JsonArray(found, file) if is_list else Tail(found, file)
        self.places, self.named = (of(str(found.folder.resolve())) for of in (MediaPaths, UncheckedPaths))
        self._restart()

    def _restart(self) -> None:
        self.starts, self.sizes = array("q"), array("l")
        self.codes = {name: array("B") for name in FIELDS}
        self.names: dict[str, dict[str, int]] = {name: {} for name in FIELDS}  # values as small numbers
        self.bad = array("B")  # 1: the row has problems
        self.repeated: set[int] = set()  # rows whose problem_id stands in an earlier row
        self.rates: set[str] = set()
        self.answers: Counter[tuple[int, str]] = Counter()  # by the number of options
        self.ids = array("q")  # hashes of problem_id
        self._known: set[int] = set()

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, seconds: float = 0.25) -> None:
        self.tail.read(self._take, self._restart, seconds)

    def _take(self, place: int, size: int, row: dict[str, Any]) -> None:
        if len(self) >= MAX_ROWS:
            return
        identity = hash(str(row.get("problem_id")))
        if identity in self._known:
            self.repeated.add(len(self))
        self._known.add(identity)
        sample, problems = self.checked(row, len(self))
        self.bad.append(bool(problems))
        if sample is not None and sample.options:
            self.answers[len(sample.options), sample.answer] += 1
        self.ids.append(identity)
        self.starts.append(place)
        self.sizes.append(size)
        for name, field in FIELDS.items():
            value, numbers = row.get(field), self.names[name]
            label = text(value)[:LABEL] if value is not None else ""
            label = label if label in numbers or len(numbers) < MAX_NAMES else "other"
            self.codes[name].append(numbers.setdefault(label, len(numbers)))
        if len(self.rates) < MAX_NAMES:
            self.rates.update(rates_of(row))

    def chosen(self, wanted: dict[str, str], problems: bool = False) -> list[int]:
        """Return the numbers of the rows that fit.

        wanted: values of `type`, `media`, `source`; problems: only rows with some.
        """
        fits = np.ones(len(self), dtype=bool)
        for name, value in wanted.items():
            fits &= np.array(self.codes[name]) == self.names[name].get(value, -1)
        if problems:
            fits &= np.array(self.bad) != 0
        return np.flatnonzero(fits).tolist()

    def row(self, number: int) -> dict[str, Any] | None:
        """Return a row as it is in the file, None if there is none any more."""
        if not 0 <= number < len(self):
            return None
        return self.tail.at(self.starts[number], self.sizes[number])

    def questions(self, problem_id: str) -> Iterator[tuple[int, Sample]]:
        """Yield the good rows with this problem_id, also those whose files may not be read from here."""
        for row in np.flatnonzero(np.array(self.ids) == hash(problem_id)).tolist():
            sample, _ = check_row(self.row(row), self.named, None)
            if sample is not None and str(sample.problem_id) == problem_id:
                yield row, sample

    def checked(self, row: dict[str, Any] | None, number: int) -> tuple[Sample | None, list[str]]:
        """Return a row's sample, or None, and its problems: those of data check, short of damaged media."""
        if row is None:
            return None, ["the row is not there any more"]
        sample, problems = check_row(row, self.places)
        for path in sample.paths if sample else ():
            if not os.path.exists(local_file(path) or path):
                problems.append(f"there is no file {short_path(path)}")
        if number in self.repeated:
            problems.append("problem_id is used before; each row needs its own")
        return sample, problems

    def counts(self) -> dict[str, Any]:
        """Return the number of rows of each type, media, source and answer, and what is wrong with these."""
        counts: dict[str, Any] = {
            name: dict(zip(self.names[name], np.bincount(np.array(self.codes[name])).tolist(), strict=True))
            for name in FIELDS
        }
        counts["answer"] = {f"{letter} of {size}": n for (size, letter), n in sorted(self.answers.items())}
        constant = [] if self.tail.more else constant_answers(self.answers.elements())
        return {**counts, "warnings": [str(answer) for answer in constant if answer.stands_out]}


def rates_of(row: dict[str, Any]) -> dict[str, float]:
    """Return the known pass rates of a row."""
    rates = {str(name)[:LABEL]: finite(rate) for name, rate in as_table(row.get(PASS_RATES)).items()}
    return {name: rate for name, rate in rates.items() if rate is not None}


class Manifests:
    """Indexes of the manifests that somebody looks at."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._open = lru_cache(OPEN_MANIFESTS)(ManifestIndex)

    def index(self, name: str | None) -> ManifestIndex:
        """Return the index of a manifest. Raises HTTPException 404, 400."""
        manifest = self.library.manifests().get(name or "")
        if manifest is None:
            raise HTTPException(404, "there is no such manifest below the folders: it was moved or removed")
        try:
            return self._open(manifest)
        except ManifestError as error:
            raise HTTPException(400, str(error)) from error

    def indexes(self, seconds: float = 0.5) -> list[ManifestIndex]:
        """Return the indexes of all manifests; each call reads a little more of them."""
        indexes = [self.index(name) for name in list(self.library.manifests())[:OPEN_MANIFESTS]]
        for index in indexes:
            with index.lock:
                index.read(seconds)
        return indexes

    def sample(self, name: str | None, row: int) -> Sample:
        """Return a checked row. Raises HTTPException 404, and 422 for a row that cannot be used."""
        index = self.index(name)
        with index.lock:
            index.read(0.0)
            while row >= len(index) and index.tail.more:
                index.read()
            sample, problems = index.checked(index.row(row), row)
        if sample is None:
            raise HTTPException(422, f"row {row + 1} cannot be used: {'; '.join(problems)}"[:1000])
        return sample


def rows(request: Request) -> Answer:
    """Answer 50 rows that fit, from number `at` on, and how far the index is.

    Filters: `manifest`, `type`, `media`, `source`, `problems`; with `keep` (on pass rates) and `words` (in
    any field) rows are searched for, and `at` is the row where the search continues.
    """
    asked = request.query_params
    wanted = {name: asked[name] for name in FIELDS if name in asked}
    words, at = asked.get("words", "").strip(), max(0, number(asked, "at"))
    try:
        keep = parse_keep(asked["keep"]) if asked.get("keep", "").strip() else None
    except ConfigError as error:
        raise HTTPException(400, str(error)) from error
    index = request.app.state.manifests.index(asked.get("manifest"))
    with index.lock:
        index.read()
        found = index.chosen(wanted, asked.get("problems") == "1")
        total, following = len(found), at + PAGE if at + PAGE < len(found) else None
        if words or keep:
            found, following = _search(index, [row for row in found if row >= at], words, keep)
            total = None
        else:
            found = found[at : at + PAGE]
        return Answer({
            "life": index.tail.life, "rows": len(index), "more": index.tail.more, "notes": index.tail.notes,
            "behind": index.tail.behind, "bad": index.bad.count(1), "rates": sorted(index.rates),
            "total": total, "next": following, "shown": [_shown(index, row) for row in found],
            "counts": index.counts(),
        })  # fmt: skip


def _search(
    index: ManifestIndex, chosen: list[int], words: str, keep: Keep | None
) -> tuple[list[int], int | None]:
    """Return at most a page of rows that have the words and are kept, and where the search continues."""
    # A row's characters may be escaped or not.
    forms = {json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1]}
    escaped = b"|".join(re.escape(form.encode("utf-8", "replace")) for form in forms)
    pattern = re.compile(escaped, re.IGNORECASE)
    until, found = time.monotonic() + SEARCH_SECONDS, []
    with index.manifest.found.open(index.manifest.file) as file:
        for row in chosen:
            file.seek(index.starts[row])
            line = file.read(index.sizes[row])
            if pattern.search(line) and (keep is None or keep.truth(rates_of(parse(line) or {})) == TRUE):
                found.append(row)
            if len(found) == PAGE or time.monotonic() > until:
                return found, row + 1
    return found, None


def _shown(index: ManifestIndex, number: int) -> dict[str, Any]:
    """Return a row for the page, every field in its expected type."""
    row = index.row(number) or {}
    sample, problems = index.checked(row, number)
    paths = paths_of(row)
    files: list[dict[str, float] | None] = [None] * len(paths)
    if sample is not None and not problems:
        try:
            files = [frames_of(path, row) for path in sample.paths]
        except ValueError as error:
            problems = [str(error)]
    fields = {"id": "problem_id", "problem": "problem", **FIELDS}
    return {
        "row": number,
        **{name: text(row.get(field, ""))[:TEXT] for name, field in fields.items()},
        "options": [text(option)[:TEXT] for option in as_list(row.get("options"))[:50]],
        "answer": text(row.get("solution", ""))[:TEXT].removeprefix("<answer>").removesuffix("</answer>"),
        "process": text(row.get("process") or "")[:TEXT],
        "path": ", ".join(map(short_path, paths))[:TEXT],
        "files": files,
        "start": finite(row.get("start")),
        "end": finite(row.get("end")),
        "play": text(row.get("play") or "")[:TEXT],
        "rates": rates_of(row),
        "problems": [problem[:TEXT] for problem in problems],
    }


def row_of(
    indexes: Sequence[ManifestIndex], problem_id: str, answer: str, question: str
) -> dict[str, Any] | None:
    """Return the row of a manifest with this question, for a page that shows its clip.

    Rows whose files exist come first. `others`: number of further rows that match and show something else.
    question: a digest (`question_digest`); "" if unknown: only the name and the answer are compared.
    """
    matching: dict[bool, dict[object, tuple[ManifestIndex, int, Sample]]] = {True: {}, False: {}}
    for index in indexes:
        with index.lock:
            for row, sample in index.questions(problem_id):
                facts = (sample.problem, sample.options, sample.answer, sample.paths)
                own = question_digest(*facts)
                if sample.answer == answer and question in ("", own):
                    folder, files = index.manifest.path.parent, filter(None, map(local_file, sample.paths))
                    plays = all(os.path.exists(os.path.join(folder, file)) for file in files)
                    shown = (sample.files, *facts) if plays else own
                    matching[plays].setdefault(shown, (index, row, sample))
    if not (found := matching[True] or matching[False]):
        return None
    index, row, sample = next(iter(found.values()))
    with index.lock:
        fields = index.row(row) or {}
    try:
        paths = paths_of(fields) if sample.paths else []
        clips = [frames_of(index.places.find(path), fields) for path in paths]
    except ValueError:  # the page says that it does not play
        clips = [None] * len(sample.paths)
    return {
        "manifest": index.manifest.name, "row": row, "problem": sample.problem[:TEXT],
        "options": [option[:TEXT] for option in sample.options[:26]], "media": sample.data_type,
        "start": sample.start, "end": sample.end, "play": sample.play, "files": clips,
        "others": len(found) - 1,
    }  # fmt: skip


def asked_clip(request: Request) -> ClipRef:
    """Return a row's file (`file`: its number), or one that a browser sent. Raises HTTPException."""
    asked = request.query_params
    if "upload" in asked:
        path = str(request.app.state.uploads.path(asked["upload"]))
        return ClipRef(path, data_type_of(path))
    files = request.app.state.manifests.sample(asked.get("manifest"), number(asked, "row")).files
    if not 0 <= number(asked, "file") < len(files):
        raise HTTPException(404, f"the row has {len(files)} files")
    return files[number(asked, "file")]


def clip(request: Request) -> Response:
    """Answer a clip as a file that plays (with Range). frame: number of a frame in a folder of frames."""
    path = asked_clip(request).path
    return play(path, number(request.query_params, "frame"), request.headers.get("range"))


ROUTES = [
    Route("/api/rows", rows),
    Route("/api/clip", clip),
]
