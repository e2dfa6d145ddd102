"""The one way of the report and the studio into files, which a stranger may have written.

No link is followed out of the given folder, only regular files are opened (a pipe would never answer), and no
file is read into memory whole. `Tail` reads JSON lines, also while another process writes them, `JsonArray`
one JSON list. Both report each object with its position and never read a byte twice, unless the file was
replaced or cut.
"""

import json
import math
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from video_r1.report.values import parse, parse_object

BLOCK = 1 << 20
MAX_LINE = 8 << 20  # bytes
WINDOW = 200_000  # bytes at the end of a file that sum it up
REMEMBERED = 64  # bytes before the position: a file that was cut and has grown again has others there

TABLE_BYTES = 4 << 20  # of a JSON object
YAML_BYTES = 200_000  # of settings, which are parsed slowly

Take = Callable[[int, int, dict[str, Any]], None]
"""Receives the position, the length (bytes) and the object of each line or element."""


class Refused(Exception):
    """A file that is not shown: it is outside the folder or not a regular file."""


@dataclass(frozen=True, slots=True)
class Found:
    """A folder. name: its path for people, and its address in the page; root: the given folder around it."""

    name: str
    folder: Path
    root: Path

    def open(self, name: str) -> BinaryIO:
        """Open a file of the folder for reading. Raises FileNotFoundError, Refused, OSError."""
        real = Path(os.path.realpath(self.folder / name))
        if not real.is_relative_to(self.root):
            raise Refused(f"{name} is a link that leads out of the folder")
        # O_NONBLOCK: opening a pipe without a writer would wait.
        handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Refused(f"{name} is not a regular file")
        return os.fdopen(handle, "rb")

    def text(self, name: str, limit: int) -> str:
        """Return the first `limit` bytes of a file as text, "" if it cannot be read."""
        try:
            with self.open(name) as file:
                return file.read(limit).decode("utf-8", "replace")
        except (OSError, Refused, ValueError):  # ValueError: a name with a zero byte
            return ""

    def table(self, name: str, notes: list[str] | None = None, limit: int = TABLE_BYTES) -> dict[str, Any]:
        """Return the object in a YAML or JSON file, {} if there is none; `notes` get the reason."""
        is_yaml = name.endswith(".yaml")
        limit = YAML_BYTES if is_yaml else limit
        try:
            with self.open(name) as file:
                content = file.read(limit + 1)
            if len(content) > limit:
                raise ValueError(f"it has more than {limit:,} bytes")
            return parse_object(content.decode("utf-8"), is_yaml)
        except FileNotFoundError:
            pass
        except (OSError, Refused, ValueError) as error:  # UnicodeError is a ValueError
            if notes is not None:
                notes.append(f"{name} cannot be read: {str(error).splitlines()[0]}")
        return {}


class Tail:
    """A JSON lines file that grows. An unfinished last line is read when it is complete."""

    units = ("line", "lines")

    def __init__(self, found: Found, name: str, max_line: int = MAX_LINE) -> None:
        self.found, self.name, self.max_line = found, name, max_line
        self.life, self.note = 0, ""  # life: how often the file was started over
        self._stamp: tuple[int, ...] | None = None
        self._restart()

    def _restart(self) -> None:
        self.life += 1
        self.place = 0  # position of the next line
        self.unreadable = self.too_long = 0
        self.behind = 0  # bytes of the file that are not read yet
        self.more = False  # whether the last call ended before the file did
        self._last = b""
        self._skipping = self._ended = False

    def read(self, take: Take, restart: Callable[[], object], seconds: float = 0.25) -> None:
        """Give new objects to `take` for about `seconds`; call `restart` first if the file was replaced.

        seconds: math.inf reads to the end, an unfinished last line too.
        """
        try:
            file = self.found.open(self.name)
        except FileNotFoundError:
            if self._stamp is not None:
                self._stamp = None
                self._restart()
                restart()
            return
        except (OSError, Refused) as error:
            self.note = f"{self.name} cannot be read: {error}"
            return
        with file:
            status = os.fstat(file.fileno())
            stamp = self._identity(status)
            if self._stamp is not None and (stamp != self._stamp or not self._continues(file, status)):
                self._restart()
                restart()
            self._stamp, self.more = stamp, False
            if status.st_size > self.place:
                self._read_on(file, take, time.monotonic() + seconds)
            self.behind = max(0, os.fstat(file.fileno()).st_size - self.place)

    def at(self, place: int, size: int) -> dict[str, Any] | None:
        """Return the object at a place, None if the file does not have it any more."""
        with self.found.open(self.name) as file:
            file.seek(place)
            return parse(file.read(size))

    def _identity(self, status: os.stat_result) -> tuple[int, ...]:
        return status.st_dev, status.st_ino

    def _continues(self, file: BinaryIO, status: os.stat_result) -> bool:
        """Return whether the bytes before the position are still those that were read."""
        file.seek(self.place - len(self._last))
        return status.st_size >= self.place and file.read(len(self._last)) == self._last

    def _read_on(self, file: BinaryIO, take: Take, until: float) -> None:
        start = self.place
        file.seek(start)
        rest = b""
        self.more = True
        while self.place == start or time.monotonic() < until:  # at least one line, even from a slow disk
            block = file.read(BLOCK)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._take_line(line, take)
            if len(rest) > self.max_line or self._skipping:
                self._skipping = True
                self._advance(rest)
                rest = b""
            if len(block) < BLOCK:
                self.more = False
                if rest and until == math.inf:
                    self._take_line(rest, take)
                break

    def _take_line(self, line: bytes, take: Take) -> None:
        place = self.place
        self._advance(line + b"\n")
        if self._skipping or len(line) > self.max_line:
            self._skipping = False
            self.too_long += 1
        elif line.strip():
            if (record := parse(line)) is None:
                self.unreadable += 1
            else:
                take(place, len(line), record)

    def _advance(self, text: bytes) -> None:
        self.place += len(text)
        self._last = (self._last + text[-REMEMBERED:])[-REMEMBERED:]

    @property
    def notes(self) -> list[str]:
        """Problems of the file, for the page."""
        counts = ((self.unreadable, "unreadable"), (self.too_long, "far too long"))
        said = [f"{self.name}: {n} {kind} {self.units[n > 1]} skipped" for n, kind in counts if n]
        return [self.note, *said] if self.note else said


class JsonArray(Tail):
    """A file `[{…}, {…}]`. A file that changes is read again from its start."""

    units = ("entry", "entries")

    def _identity(self, status: os.stat_result) -> tuple[int, ...]:
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def _restart(self) -> None:
        super()._restart()
        self.note = ""

    def _continues(self, file: BinaryIO, status: os.stat_result) -> bool:
        return True

    def _read_on(self, file: BinaryIO, take: Take, until: float) -> None:
        # In Latin-1 every byte is one character: positions in the text are positions in the file.
        text, size, read = "", BLOCK, False
        file.seek(self.place)
        while not self._ended and not (read and time.monotonic() > until):
            block = file.read(size)
            text += block.decode("latin-1")
            at = self._take_objects(text, take, whole=len(block) < size)
            text, read = text[at:], at > 0
            size = max(BLOCK, 2 * len(text))  # a long object is parsed again with each block
        self.more = not self._ended

    def _take_objects(self, text: str, take: Take, whole: bool) -> int:
        """Take the objects of a piece of the file; return how many characters were used."""
        at = 0
        while True:
            begin = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("]", begin):
                self._ended = True
                return at
            try:
                record, end = _DECODER.raw_decode(text, begin)
            except (ValueError, RecursionError) as error:
                if whole or len(text) - begin > MAX_LINE:
                    self._ended = True
                    where = f"after byte {self.place + begin - at:,}"
                    self.note = f"{self.name} is not JSON {where} ({error}); the rest was not read"
                return at
            if not text[begin:end].isascii():
                record = parse(text[begin:end].encode("latin-1"))
            if isinstance(record, dict):
                take(self.place + begin - at, end - begin, record)
            else:
                self.unreadable += 1
            self.place += end - at
            at = end


_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[ \t\r\n,\[ï»¿]*")  # and the byte order mark


def read_whole(found: Found, name: str, take: Take, notes: list[str]) -> Tail:
    """Give each object of a JSON lines file to `take`; `notes` get what is skipped."""
    tail = Tail(found, name, max_line=32 << 20)
    tail.read(take, lambda: None, math.inf)
    notes += tail.notes
    return tail


def last_lines(found: Found, name: str, sketched: int = 0) -> list[dict[str, Any]]:
    """Return the objects in the last 200 kB of a JSON lines file; [] if it cannot be read.

    Before them come `sketched` lines at even distances from the start, if the file is longer: a summary of a
    file of any size is ready at once.
    """
    try:
        with found.open(name) as file:
            start = max(0, os.fstat(file.fileno()).st_size - WINDOW)
            records = []
            for i in range(sketched if start else 0):
                file.seek(start * i // sketched)
                if i:
                    file.readline(MAX_LINE)
                records.append(parse(file.readline(MAX_LINE)))
            file.seek(start)
            lines = file.read(WINDOW).split(b"\n")[1 if start else 0 :]
    except (OSError, Refused):
        return []
    return [record for record in [*records, *map(parse, lines)] if record is not None]
