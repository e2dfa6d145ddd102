"""The journal: every answer of the teacher as a line of JSON, kept through an interruption at any moment.

The first line holds the settings that the answers depend on; answers to other settings are never mixed with
them. Lines are appended whole and waited for until the disk has them; a last line that was cut off is dropped
when the journal is opened again. A later line about a question replaces an earlier one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from video_r1.errors import RequestError
from video_r1.files import differences, replacing


class Journal:
    """One question a line: `problem_id` and either `completions` or `failed` and `reason`.

    path: the file; settings: JSON values by name. Raises RequestError when the file holds answers to other
    settings, is no journal, is being written by another process, or cannot be opened.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._file = _opened(path)
        self._places: dict[str, int] = {}
        self._failed: set[str] = set()
        try:
            self._read(settings)
        except BaseException:  # whatever it was: nobody else has the file to close it
            self._file.close()
            raise

    def _read(self, settings: Mapping[str, Any]) -> None:
        """Finds the place of every line, or begins the file."""
        header = None
        place = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):  # cut off while it was written
                self._file.truncate(place)
                break
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or ("settings" if header is None else "problem_id") not in entry:
                raise RequestError(
                    f"{self.path}, line {number} is none of an annotation's journal; move the file away, or "
                    "choose another --out"
                )
            if header is None:
                header = entry["settings"]
                _refuse_other_settings(self.path, header, settings)
            else:
                self._note(entry, place)
            place += len(line)
        self._file.seek(0, os.SEEK_END)
        if header is None:
            self._write([{"settings": settings}])

    def _note(self, entry: Mapping[str, Any], place: int) -> None:
        name = str(entry["problem_id"])
        self._places[name] = place
        (self._failed.add if "failed" in entry else self._failed.discard)(name)

    def __contains__(self, problem_id: object) -> bool:
        return str(problem_id) in self._places

    def is_answered(self, problem_id: str | int) -> bool:
        """Whether the last entry of a question has completions."""
        return problem_id in self and str(problem_id) not in self._failed

    def __getitem__(self, problem_id: str | int) -> dict[str, Any]:
        """The last entry of a question. KeyError when there is none."""
        self._file.seek(self._places[str(problem_id)])
        return json.loads(self._file.readline())

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries and returns when the disk has them."""
        entries = list(entries)
        for entry, place in zip(entries, self._write(entries), strict=True):
            self._note(entry, place)

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> list[int]:
        place = self._file.seek(0, os.SEEK_END)
        places, lines = [], []
        for entry in entries:
            lines.append(json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            places.append(place)
            place += len(lines[-1])
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        return places

    def close(self) -> None:
        """Closes the file, which lets another process open it."""
        self._file.close()


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """As `replacing`. Raises RequestError when the folder cannot be written."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    """The file, open for reading and appending and locked against other processes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - it stays open as long as the journal
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RequestError(f"{path} is being written by another process; wait for it, or stop it") from error
    file.seek(0)
    return file


def _refuse_other_settings(path: Path, before: Any, settings: Mapping[str, Any]) -> None:
    changed = differences(before, settings)
    if changed:
        said = ", ".join(f"{name} {there!r} and now {here!r}" for name, (there, here) in changed.items())
        raise RequestError(
            f"{path} holds an annotation with other settings ({said}); continue with the same ones, choose "
            "another --out, or move the file away"
        )
