"""The objects of a JSON list, with their places in the file: what tail.py is for JSON lines."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

from video_r1.studio.folders import Found, Refused
from video_r1.studio.tail import BLOCK, MAX_LINE

_DECODER = json.JSONDecoder()


class ListFile:
    """One file `[{…}, {…}]`, whose `read` is as that of `Tail`. A file that changes is read anew."""

    def __init__(self, found: Found, name: str) -> None:
        self.found, self.name = found, name
        self.life, self.note = 0, ""
        self._forget(None)

    def _forget(self, stamp: tuple[int, ...] | None) -> None:
        self.life += 1
        self.note = ""
        self.place = 0  # where the next object is looked for
        self.unreadable = 0
        self.behind, self.more, self._ended = 0, False, False
        self._stamp = stamp

    def read(
        self,
        take: Callable[[int, int, dict[str, Any]], None],
        anew: Callable[[], None],
        seconds: float = 0.25,
    ) -> None:
        try:
            file = self.found.open(self.name)
        except (OSError, Refused) as error:
            self.note = f"{self.name} is not read: {error}"
            return
        with file:
            status = os.fstat(file.fileno())
            stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp != self._stamp:
                if self._stamp is not None:
                    anew()
                self._forget(stamp)
            until = time.monotonic() + seconds
            # In Latin-1 every byte is a character, so that places in the text are places in the file.
            text, size = "", BLOCK
            file.seek(self.place)
            while not self._ended:
                block = file.read(size)
                text += block.decode("latin-1")
                read = self._objects(text, take, last=len(block) < size)
                text = text[read:]
                if time.monotonic() > until and read:
                    break
                size = max(BLOCK, 2 * len(text))  # a long object is parsed again with each block
            self.behind, self.more = status.st_size - self.place, not self._ended

    def _objects(self, text: str, take: Callable[[int, int, dict[str, Any]], None], last: bool) -> int:
        """Takes the objects of a piece of the file; returns how much of it was read."""
        at = 0
        while True:
            begin = at
            while begin < len(text) and text[begin] in " \t\r\n,[ï»¿":
                begin += 1
            if begin < len(text) and text[begin] == "]":
                self._ended = True
                break
            try:
                record, end = _DECODER.raw_decode(text, begin)
            except (ValueError, RecursionError) as error:
                if last or len(text) - begin > MAX_LINE:
                    self._ended = True
                    where = f"after byte {self.place + begin - at:,}"
                    self.note = f"{self.name} is no JSON {where} ({error}); nothing after it was read"
                break
            piece = text[begin:end]
            if not piece.isascii():
                record = _parsed(piece)
            if isinstance(record, dict):
                take(self.place + begin - at, end - begin, record)
            else:
                self.unreadable += 1
            self.place += end - at
            at = end
        return at

    @property
    def notes(self) -> list[str]:
        said = [self.note] if self.note else []
        if self.unreadable:
            said.append(f"{self.name}: {self.unreadable} entries that are no objects left out")
        return said


def _parsed(piece: str) -> Any:
    try:
        return json.loads(piece.encode("latin-1"))
    except (ValueError, RecursionError):  # no UTF-8
        return None
