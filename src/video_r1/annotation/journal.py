"""The journal: every answer of the teacher as a line of JSON, kept through an interruption at any moment.

The first line holds the settings that the answers depend on; answers to other settings are never mixed with
them. Lines are appended whole and waited for until the disk has them; a last line that was cut off is dropped
when the journal is opened again. A later line about a question replaces an earlier one.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from video_r1.errors import RequestError
from video_r1.files import json_lines, lock, whole_lines, without_links
from video_r1.fingerprint import changed, refuse_changed


class Journal:
    """One question a line: `problem_id` and either `completions` or `failed` and `reason`.

    path: the file; settings: JSON values by name. Raises RequestError when the file holds answers to other
    settings, is no journal, is being written by another process, or cannot be opened.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._places: dict[str, int] = {}
        self._failed: set[str] = set()
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", opener=without_links)  # noqa: SIM115
        try:
            try:
                lock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RequestError(
                    f"{path} is being written by another process; wait for it, or stop it"
                ) from error
            self._read(settings)
        except BaseException:  # whatever it was: nobody else has the file to close it
            self._file.close()
            raise

    def _read(self, settings: Mapping[str, Any]) -> None:
        """Finds the place of every line, or begins the file."""
        for number, place, entry in whole_lines(self._file):
            if entry is None or ("settings" if number == 1 else "problem_id") not in entry:
                raise RequestError(
                    f"{self.path}, line {number} is none of an annotation's journal; move the file away, or "
                    "choose another --out"
                )
            self._note(entry, place)
            if number == 1:
                remedy = "Continue with the same ones, choose another --out, or move the file away"
                changes = changed(entry["settings"], settings)
                refuse_changed(f"{self.path} holds an annotation", changes, remedy)
        if self._file.seek(0, os.SEEK_END) == 0:
            self.append([{"settings": settings}])

    def _note(self, entry: Mapping[str, Any], place: int) -> None:
        if "problem_id" in entry:  # the first line has the settings
            name = str(entry["problem_id"])
            self._places[name] = place
            (self._failed.add if "failed" in entry else self._failed.discard)(name)

    def __contains__(self, problem_id: object) -> bool:
        return str(problem_id) in self._places

    @property
    def names(self) -> list[str]:
        """The questions that have an entry, in the order of their first ones."""
        return list(self._places)

    def is_answered(self, problem_id: str | int) -> bool:
        """Whether the last entry of a question has completions."""
        return problem_id in self and str(problem_id) not in self._failed

    def __getitem__(self, problem_id: str | int) -> dict[str, Any]:
        """The last entry of a question. KeyError when there is none."""
        self._file.seek(self._places[str(problem_id)])
        return json.loads(self._file.readline())

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries and returns when the disk has them."""
        place = self._file.seek(0, os.SEEK_END)
        for entry in entries:
            self._note(entry, place)
            place += self._file.write(json_lines([entry]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def take_up(self, parts: Iterable[Path], settings: Mapping[str, Any], names: Sequence[str | int]) -> None:
        """Moves the entries of other journals here, in the order of `names`, and removes those files.

        Raises RequestError as a Journal of theirs does.
        """
        places = {str(name): place for place, name in enumerate(names)}
        with ExitStack() as closing_parts:
            opened = [closing_parts.enter_context(closing(Journal(part, settings))) for part in parts]
            found = [(places.get(name, len(places)), name, one) for one in opened for name in one.names]
            self.append(
                one[name]
                for _, name, one in sorted(found, key=lambda entry: entry[0])
                if not self.is_answered(name)
            )
        for one in opened:
            one.path.unlink()

    def close(self) -> None:
        """Closes the file, which lets another process open it."""
        self._file.close()


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """An OSError inside becomes a RequestError: the path cannot be written."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
