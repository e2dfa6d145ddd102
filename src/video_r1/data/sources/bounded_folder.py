"""A folder of files of bounded size that many processes share: the least recently used are deleted.

    <folder>/ab/ab12….<suffix>   an entry; with `.partial` in its name: a draft, which does not count
    <folder>/.size               bytes of all entries; its lock is held while an entry comes or goes

An entry is written as a draft and renamed, so that a reader sees all of it or nothing. An entry that a reader
holds by a shared lock (`flock`) is not removed.
"""

import fcntl
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from video_r1.errors import ConfigError
from video_r1.files import lock

logger = logging.getLogger(__name__)
PARTIAL = ".partial"
_KEEP = 0.9  # of the limit, once room has to be made
_STALE_SECONDS = 3600  # a draft that has not changed for so long has no writer any more


class BoundedFolder:
    """Entries of at most `limit` bytes together; `setting` is its name in messages. Thread-safe.

    Raises ConfigError when the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, limit: int, setting: str) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self.setting = setting
        self.warned: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".size").touch()
        except OSError as error:
            raise ConfigError(f"{setting} {folder}: cannot be written to ({error.strerror})") from error

    def place(self, name: str) -> Path:
        """Return the path of the entry of that name, whether it exists or not."""
        return self.folder / name[:2] / name

    def admit(self, draft: Path, entry: Path) -> bool:
        """Rename a finished draft to its entry; remove the least recently used entries to make room.

        Return whether there was room: the draft may exceed the limit, or all others be in use. Raises
        OSError.
        """
        size = draft.stat().st_size
        if size > self.limit:
            self.warn_once(f"files of %d bytes are larger than {self.setting}_gb, and are not kept", size)
            return False
        with (self.folder / ".size").open("r+") as file:
            lock(file, fcntl.LOCK_EX)  # against other processes and threads
            text = file.read()
            total = size + (int(text) if text.isdigit() else self.limit)
            if total > self.limit:
                total = size + self._make_room(self.limit - size)
            if total > self.limit:
                return False
            draft.replace(entry)
            file.seek(0)
            file.truncate()
            file.write(str(total))
        return True

    def store(self, entry: Path, content: bytes) -> None:
        """Write an entry. A failure gives one warning: the entry is only a copy."""
        draft = self.draft_of(entry)
        try:
            entry.parent.mkdir(exist_ok=True)
            draft.write_bytes(content)
            self.admit(draft, entry)
        except OSError as error:
            self.warn_once("an entry cannot be written (%s)", error)
        finally:
            draft.unlink(missing_ok=True)

    def draft_of(self, entry: Path) -> Path:
        """Return this thread's draft of an entry, with the same extension."""
        return entry.with_suffix(f".{os.getpid()}-{threading.get_ident()}{PARTIAL}{entry.suffix}")

    def used(self, entry: Path) -> None:
        """Note that an entry was used just now, which keeps it longer."""
        with suppress(PermissionError):  # another user's
            os.utime(entry)

    def warn_once(self, message: str, *values: object) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(f"{self.setting} {self.folder}: {message}", *values)

    def _make_room(self, room: float) -> int:
        """Remove the least recently used entries if there are more than `room` bytes; return the bytes
        left.
        """
        entries = []
        for path in self.folder.glob("??/*"):
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            if PARTIAL not in path.name:
                entries.append((facts.st_mtime_ns, facts.st_size, path))
            elif time.time() - facts.st_mtime > _STALE_SECONDS:
                _remove_unused(path)
        total = sum(size for _, size, _ in entries)
        goal = min(room, self.limit * _KEEP) if total > room else total
        for _, size, path in sorted(entries):
            if total <= goal:
                break
            if _remove_unused(path):
                total -= size
        return total


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process holds a lock on it. Return whether it is gone."""
    try:
        with path.open("r+b") as file:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except (BlockingIOError, PermissionError):  # in use, or another's
        return False
    return True


def locked(path: Path, how: int) -> BinaryIO | None:
    """Return the open file, locked until it is closed; None if it does not exist."""
    try:
        file = path.open("rb" if how == fcntl.LOCK_SH else "r+b")
    except FileNotFoundError:
        return None
    lock(file, how)
    try:
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except FileNotFoundError:
        pass
    file.close()  # it was removed meanwhile
    return None
