"""What else lies below the folders that were given: manifests, and checkpoints that can be asked.

A folder of a hundred thousand clips must not hold up the page: of each folder only so many names are read,
and of a file that may be a manifest only its beginning.
"""

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from video_r1.studio.folders import DEPTH, Found, Library, Listing, Refused

LOOKED_SECONDS = 10.0  # for which what was found is good
NAMES_OF_A_FOLDER = 3000
NAMES = 60_000  # of all folders
HEAD = 1 << 16  # bytes of a file by which a manifest is told
IN_A_ROW = (b'"problem_id"', b'"problem"', b'"solution"', b'"path"')
NO_MANIFESTS = ("rollouts.jsonl", "metrics.jsonl", "predictions", "quarantine", "answers", "part-", ".")
PACKAGED = "the lab's base"


class Manifest(NamedTuple):
    """A manifest file: its name in the page, and the folder that it and its media lie in."""

    name: str
    found: Found
    file: str

    @property
    def path(self) -> Path:
        return self.found.folder / self.file


class Finder:
    """Looks for manifests and checkpoints below the folders of a library, again every ten seconds."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._listing = Listing(self._look, LOOKED_SECONDS)
        self._heads: dict[tuple[Path, int, int], bool] = {}

    def manifests(self) -> dict[str, Manifest]:
        """By name."""
        return self._listing.now()[0]

    def checkpoints(self) -> dict[str, Path]:
        """By name, those that were written last first, then the base that ships with the package."""
        return self._listing.now()[1]

    def _look(self) -> tuple[dict[str, Manifest], dict[str, Path]]:
        manifests: dict[str, Manifest] = {}
        written: dict[str, tuple[float, Path]] = {}
        for root in self.library.roots:
            for folder, names in _folders(root):
                found = Found(self.library.name(root, folder), folder, root)
                if "config.json" in names and any(name.endswith(".safetensors") for name in names):
                    written[found.name] = (os.stat(folder).st_mtime, folder)
                for file in filter(self._may_be, names):
                    if self._is_manifest(found, file):
                        name = self.library.name(root, folder / file)
                        manifests[name] = Manifest(name, found, file)
        last_first = sorted(written.items(), key=lambda item: (-item[1][0], item[0]))
        checkpoints = {name: folder for name, (_, folder) in last_first}
        base = Path(str(files("video_r1"))) / "lab" / "base"
        if (base / "config.json").is_file() and base not in checkpoints.values():
            checkpoints[PACKAGED] = base
        return manifests, checkpoints

    def looks_again(self) -> None:
        """What was just written is found with the next question."""
        self._listing.anew()

    @staticmethod
    def _may_be(name: str) -> bool:
        return name.endswith((".json", ".jsonl")) and not name.startswith(NO_MANIFESTS)

    def _is_manifest(self, found: Found, file: str) -> bool:
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


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders from `root` on and the names of files in each, links left out."""
    waiting, left = [(root, DEPTH)], NAMES
    while waiting and left > 0:
        folder, depth = waiting.pop(0)
        names: list[str] = []
        inside: list[Path] = []
        try:
            with os.scandir(folder) as listing:
                for count, entry in enumerate(listing):
                    if count >= NAMES_OF_A_FOLDER:
                        break
                    if entry.is_dir(follow_symlinks=False):
                        if depth > 0 and not entry.name.startswith((".", "frames")):
                            inside.append(folder / entry.name)
                    elif entry.is_file(follow_symlinks=False):
                        names.append(entry.name)
        except OSError:  # another's folder, or gone
            continue
        waiting += [(each, depth - 1) for each in sorted(inside)]
        left -= len(names)
        yield folder, sorted(names)
