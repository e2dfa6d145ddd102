"""Runs, manifests and checkpoints below the given folders.

A run is known by its name in a listing that this process made, never by a path that a browser sends. Of a
folder with many thousand clips only some names are read.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from video_r1.report.reader import Found, Refused
from video_r1.report.run_data import find_run_folders
from video_r1.report.values import as_table

DEPTH = 5  # levels of folders below a given one
INDEX_BYTES = 8 << 20  # of an index of weights
RUNS_SECONDS = 2.0  # how long a listing of runs is good
FILES_SECONDS = 10.0  # the same of manifests and checkpoints
LISTINGS = 10  # a listing is good for at least so many times as long as it took
NAMES_OF_A_FOLDER = 3000
NAMES = 60_000  # of all folders
HEAD = 1 << 16  # bytes of a file by which a manifest is recognised
IN_A_ROW = (b'"problem_id"', b'"problem"', b'"solution"', b'"path"')
NO_MANIFESTS = ("rollouts.jsonl", "metrics.jsonl", "predictions", "quarantine", "answers", "part-", ".")
PACKAGED = "the lab's base"
T = TypeVar("T")


class Manifest(NamedTuple):
    """A manifest file: its name in the page, and the folder of the manifest and its media."""

    name: str
    found: Found
    file: str

    @property
    def path(self) -> Path:
        return self.found.folder / self.file


class Listing(Generic[T]):
    """The result of `look`, renewed after `seconds` or ten times as long as looking took.

    While one thread looks, the others get the previous result; they wait only if there is none.
    """

    def __init__(self, look: Callable[[], T], seconds: float) -> None:
        self._look, self._seconds = look, seconds
        self._lock = threading.Lock()
        self._found: list[T] = []  # one result, once there is one
        self.renew()

    def now(self) -> T:
        if self._lock.acquire(blocking=not self._found):
            try:
                if (start := time.monotonic()) >= self._renewed_at:
                    self._found = [self._look()]
                    now = time.monotonic()
                    self._renewed_at = now + max(self._seconds, LISTINGS * (now - start))
            finally:
                self._lock.release()
        return self._found[0]

    def renew(self) -> None:
        """Look again at the next call."""
        self._renewed_at = 0.0


class Library:
    """The runs, manifests and checkpoints below some folders."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self.roots = [Path(os.path.realpath(root)) for root in roots]
        self._runs = Listing(self._look_for_runs, RUNS_SECONDS)
        self.files = Listing(self._look_for_files, FILES_SECONDS)  # manifests and checkpoints
        self._heads: dict[tuple[Path, int, int], bool] = {}

    def runs(self) -> dict[str, Found]:
        """Return all run folders, by name."""
        return self._runs.now()

    def manifests(self) -> dict[str, Manifest]:
        return self.files.now()[0]

    def checkpoints(self) -> dict[str, Path]:
        """Return checkpoint folders by name, the newest first, then the base that ships with the package."""
        return self.files.now()[1]

    def _look_for_runs(self) -> dict[str, Found]:
        found: dict[Path, Found] = {}
        for root in self.roots:
            for folder in find_run_folders(root, DEPTH) if root.is_dir() else []:
                if folder not in found:  # a given folder may be inside another one
                    found[folder] = Found(self._name(root, folder), folder, root)
        return {run.name: run for run in found.values()}

    def _look_for_files(self) -> tuple[dict[str, Manifest], dict[str, Path]]:
        manifests: dict[str, Manifest] = {}
        written: dict[str, tuple[float, Path]] = {}
        for root in self.roots:
            for folder, names in _folders(root):
                found = Found(self._name(root, folder), folder, root)
                if _is_whole(found, names):
                    written[found.name] = (os.stat(folder / "config.json").st_mtime, folder)
                for file in names:
                    if self._is_manifest(found, file):
                        name = self._name(root, folder / file)
                        manifests[name] = Manifest(name, found, file)
        newest_first = sorted(written.items(), key=lambda item: (-item[1][0], item[0]))
        checkpoints = {name: folder for name, (_, folder) in newest_first}
        base = Path(str(files("video_r1"))) / "lab" / "base"
        if (base / "config.json").is_file() and base not in checkpoints.values():
            checkpoints[PACKAGED] = base
        return manifests, checkpoints

    def _is_manifest(self, found: Found, file: str) -> bool:
        if not file.endswith((".json", ".jsonl")) or file.startswith(NO_MANIFESTS):
            return False
        try:
            status = os.stat(found.folder / file)
            key = (found.folder / file, status.st_mtime_ns, status.st_size)
            if key not in self._heads:
                with found.open(file) as opened:
                    head = opened.read(HEAD)
                self._heads[key] = all(word in head for word in IN_A_ROW)
            return self._heads[key]
        except (OSError, Refused):
            return False

    def _name(self, root: Path, folder: Path) -> str:
        """Return the page's name of a folder or file below one of the given folders."""
        below = folder.relative_to(root).as_posix()
        own = root.name if sum(other.name == root.name for other in self.roots) == 1 else str(root)
        if below == ".":
            return own
        return below if len(self.roots) == 1 else f"{own}/{below}"


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders from `root` on, each with the names of its files. Links are skipped."""
    waiting, left = [(root, DEPTH)], NAMES
    while waiting and left > 0:
        folder, depth = waiting.pop(0)
        names: list[str] = []
        inside: list[Path] = []
        try:
            with os.scandir(folder) as listing:
                for _, entry in zip(range(NAMES_OF_A_FOLDER), listing, strict=False):
                    if entry.is_dir(follow_symlinks=False):
                        if depth > 0 and not entry.name.startswith((".", "frames")):
                            inside.append(folder / entry.name)
                    elif entry.is_file(follow_symlinks=False):
                        names.append(entry.name)
        except OSError:  # not readable, or gone
            continue
        waiting += [(each, depth - 1) for each in sorted(inside)]
        left -= len(names)
        yield folder, sorted(names)


def _is_whole(found: Found, names: Sequence[str]) -> bool:
    """Return whether a folder has a checkpoint with all its weights. names: its files."""
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        return False
    index = found.table("model.safetensors.index.json", limit=INDEX_BYTES)
    return all(name in names for name in as_table(index.get("weight_map")).values())
