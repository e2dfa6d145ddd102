"""Which run folders there are below the folders that were given, and the one way into their files.

Whoever wrote a run folder may be a stranger. So a run is known by its place in a listing that this process
made, never by a path that a browser sends; no link is followed out of the folder that was given; and nothing
is opened that is not a regular file (a pipe would never answer).
"""

import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import yaml

from video_r1.report.run_data import as_table, find_run_folders, flat

DEPTH = 5  # of run folders below a folder that was given
SETTINGS_BYTES = 200_000  # of a config.yaml that is read
LISTING_SECONDS = 2.0  # for which a listing of runs is good,
LISTINGS = 10  # or for so many times as long as it took
T = TypeVar("T")


class Refused(Exception):
    """A file that is not shown: it lies elsewhere, is no plain file, or is too large."""


@dataclass(frozen=True, slots=True)
class Found:
    """A run folder. `name` is its path as a person would say it, and its address in the page; `root` the
    folder that was given, which no file of it may leave."""

    name: str
    folder: Path
    root: Path

    def open(self, name: str) -> BinaryIO:
        """A file of the run for reading. Raises FileNotFoundError, Refused, OSError."""
        real = Path(os.path.realpath(self.folder / name))
        if not real.is_relative_to(self.root):
            raise Refused(f"{name} is a link that leads out of the folder")
        # Without waiting: opening a pipe that nobody writes to would.
        handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Refused(f"{name} is no plain file")
        return os.fdopen(handle, "rb")

    def text(self, name: str, limit: int = SETTINGS_BYTES) -> str:
        """The file's text; empty where there is none or it is not shown, at most `limit` bytes."""
        try:
            with self.open(name) as file:
                return file.read(limit).decode("utf-8", "replace")
        except (OSError, Refused, ValueError):  # ValueError: a name with a zero byte
            return ""


class Listing(Generic[T]):
    """What `look` found, looked for again when that is `seconds` old, or ten times as old as looking took.

    While one thread looks, the others have what was found before; they wait where there is nothing yet, or
    where it is not what they have just written.
    """

    def __init__(self, look: Callable[[], T], seconds: float) -> None:
        self._look, self._seconds = look, seconds
        self._lock = threading.Lock()
        self._again = 0.0  # when it is looked for again
        self._found: T | None = None

    def now(self) -> T:
        found = self._found
        if not self._lock.acquire(blocking=found is None):
            assert found is not None
            return found
        try:
            found = self._found
            if found is None or time.monotonic() >= self._again:
                began = time.monotonic()
                self._found = found = self._look()
                ended = time.monotonic()
                self._again = ended + max(self._seconds, LISTINGS * (ended - began))
            return found
        finally:
            self._lock.release()

    def anew(self) -> None:
        """Who asks next is given what is there by then."""
        with self._lock:
            self._found = None


class Library:
    """The runs below some folders."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self.roots = [Path(os.path.realpath(root)) for root in roots]
        self._listing = Listing(self._look, LISTING_SECONDS)

    def runs(self) -> dict[str, Found]:
        """All run folders, by name."""
        return self._listing.now()

    def _look(self) -> dict[str, Found]:
        found: dict[Path, Found] = {}
        for root in self.roots:
            for folder in find_run_folders(root, DEPTH) if root.is_dir() else []:
                if folder not in found:  # one of the given folders may lie in another
                    found[folder] = Found(self.name(root, folder), folder, root)
        return {one.name: one for one in found.values()}

    def name(self, root: Path, folder: Path) -> str:
        """How the page calls what lies below one of the folders."""
        below = folder.relative_to(root).as_posix()
        own = root.name if sum(other.name == root.name for other in self.roots) == 1 else str(root)
        if below == ".":
            return own
        return below if len(self.roots) == 1 else f"{own}/{below}"


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_settings(found: Found) -> dict[str, str]:
    """The settings of config.yaml, or of an evaluation: nested names joined by dots, credentials left out."""
    text = found.text("config.yaml") or found.text("evaluation.json")
    try:
        # A few lines of aliases may stand for more than a machine holds.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _LOADER)):
            return {}
        return dict(flat(as_table(yaml.load(text, _LOADER))))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
