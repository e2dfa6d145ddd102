"""A JSON lines file that is read while another process, perhaps on another machine, appends to it.

What was read is never read again. A file that was replaced, as a run that is continued replaces its own, or
cut short is read anew; half a line waits for its end; a line that is too long is left out with a note.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from video_r1.studio.folders import Found, Refused

BLOCK = 1 << 20
MAX_LINE = 8 << 20  # bytes
REMEMBERED = 64  # of the bytes last read: a file cut short and grown again has others there


class Tail:
    """One file of a run. `read` hands on its objects; `life` counts how often it was begun anew."""

    def __init__(self, found: Found, name: str, max_line: int = MAX_LINE) -> None:
        self.found, self.name, self.max_line = found, name, max_line
        self.life, self.note = 0, ""
        self._forget()

    def _forget(self) -> None:
        self.life += 1
        self.place = 0  # where the next line begins
        self.unreadable = self.too_long = 0
        self.behind = 0  # bytes that are there and not read
        self.more = False  # whether the last call ended before the file did
        self._identity: tuple[int, int] | None = None
        self._last = b""
        self._skipping = False

    def read(
        self,
        take: Callable[[int, int, dict[str, Any]], None],
        anew: Callable[[], None],
        seconds: float = 0.25,
    ) -> None:
        """Gives `take` the place, length and object of each line that is whole by now; `anew` is called
        before those of a file that was replaced. Ends after about `seconds`; the rest is `behind`.
        """
        try:
            file = self.found.open(self.name)
        except FileNotFoundError:
            if self._identity is not None:
                self._forget()
                anew()
            return
        except (OSError, Refused) as error:
            self.note = f"{self.name} is not read: {error}"
            return
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._identity is not None and (identity != self._identity or not self._goes_on(file, status)):
                self._forget()
                anew()
            self._identity, self.more = identity, False
            if status.st_size > self.place:
                self._read_on(file, take, time.monotonic() + seconds)
            self.behind = max(0, os.fstat(file.fileno()).st_size - self.place)

    def _goes_on(self, file: BinaryIO, status: os.stat_result) -> bool:
        if status.st_size < self.place:
            return False
        file.seek(self.place - len(self._last))
        return file.read(len(self._last)) == self._last

    def _read_on(
        self, file: BinaryIO, take: Callable[[int, int, dict[str, Any]], None], until: float
    ) -> None:
        began = self.place
        file.seek(began)
        rest = b""
        # However slow the disk is, a call gets as far as the end of a line.
        self.more = True
        while self.place == began or time.monotonic() < until:
            block = file.read(BLOCK)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._take_line(line, take)
            if len(rest) > self.max_line or self._skipping:
                self._skipping = True
                self._advance(rest, 0)
                rest = b""
            if len(block) < BLOCK:
                self.more = False
                break

    def _take_line(self, line: bytes, take: Callable[[int, int, dict[str, Any]], None]) -> None:
        place = self.place
        self._advance(line, 1)
        if self._skipping or len(line) > self.max_line:
            self._skipping = False
            self.too_long += 1
        elif line.strip():
            record = parse(line)
            if record is None:
                self.unreadable += 1
            else:
                take(place, len(line), record)

    def _advance(self, text: bytes, ends: int) -> None:
        self.place += len(text) + ends
        self._last = (self._last + text[-REMEMBERED:] + b"\n" * ends)[-REMEMBERED:]

    @property
    def notes(self) -> list[str]:
        """What was left out, for a reader of the page."""
        said = [self.note] if self.note else []
        for count, what in ((self.unreadable, "unreadable"), (self.too_long, "far too long")):
            if count:
                said.append(f"{self.name}: {count} {what} line{'s' if count > 1 else ''} left out")
        return said


def parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or brackets a thousand deep
        return None
    return record if isinstance(record, dict) else None


def last_lines(found: Found, name: str, window: int = 200_000, sketched: int = 0) -> list[dict[str, Any]]:
    """The objects of a file's last `window` bytes; before them `sketched` lines at even distances from the
    whole of a longer one, so that a file of any size is told of at once. Empty where it cannot be read.
    """
    try:
        with found.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            start = max(0, size - window)
            records = []
            for i in range(sketched if start else 0):
                file.seek(start * i // sketched)
                if i:
                    file.readline(MAX_LINE)
                records.append(parse(file.readline(MAX_LINE)))
            file.seek(start)
            lines = file.read(window).split(b"\n")[1 if start else 0 :]
    except (OSError, Refused):
        return []
    return [record for record in [*records, *map(parse, lines)] if record is not None]
