"""Find the file that a table names by its path, its name, or its name without extension, below one folder."""

import bisect
import difflib
import os
import posixpath
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import PurePosixPath, PureWindowsPath

from video_r1.data.making.layouts import Rejected
from video_r1.data.sources.archives import members_of
from video_r1.data.sources.media_paths import data_type_of
from video_r1.data.sources.media_types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from video_r1.data.sources.remote import is_address, on_this_machine

SUBTITLE_EXTENSIONS = (".srt", ".vtt")
MEDIA_EXTENSIONS = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
_NEIGHBOURS = 100  # names before and after a missing name that are compared with it
_SHOWN = 3
_PREFIX = re.compile(r"(?i)(?:videos?|clip|vid|v)[_-]?(?=.)")


class ClipIndex:
    """The images, videos, folders of frames and subtitles below a folder, listed once, with the images and
    videos in its tar archives. A URL cannot be listed: names below it are used as they are.

    follow_links: enter linked folders, each once. Links to files always count.
    """

    def __init__(self, root: str, follow_links: bool = False) -> None:
        self.root = root
        self.paths: set[str] = set()
        self._by_name: dict[str, list[str]] = {}
        self._folders: dict[str, list[str]] = {}  # folders of images, by name
        self._subtitles: dict[str, str] = {}  # by the clip's path without extension
        self._others: dict[str, list[str]] = {}  # files without a known extension, by name
        self._by_core: dict[str, list[str]] = {}
        self.may_miss = False  # return a name without a file as it is written
        self.missing: dict[str, None] = {}
        self.renamed: dict[str, str] = {}  # files that have another name than in the table, by that name
        folders: dict[str, None] = {}
        for path in () if is_address(root) else _files_below(root, follow_links):
            stem, ending = posixpath.splitext(path)
            if ending.lower() == ".tar":
                for member in _members(os.path.join(root, path)):
                    self._add(f"tar://{member}::{path}", posixpath.basename(member).lower())
            if ending.lower() in SUBTITLE_EXTENSIONS:
                self._subtitles[stem] = path
                self._subtitles.setdefault(posixpath.splitext(stem)[0], path)  # 7.en.srt
            if ending.lower() in MEDIA_EXTENSIONS:
                self._add(path, posixpath.basename(path).lower())
                if ending.lower() in IMAGE_EXTENSIONS and (folder := posixpath.dirname(path)):
                    folders[folder] = None
            else:
                self._others.setdefault(posixpath.basename(path).lower(), []).append(path)
        for folder in folders:
            self._folders.setdefault(posixpath.basename(folder).lower(), []).append(folder)
        self._names = sorted({*self._by_name, *self._folders})

    def _add(self, path: str, name: str) -> None:
        self.paths.add(path)
        for key in dict.fromkeys((name, posixpath.splitext(name)[0])):
            self._by_name.setdefault(key, []).append(path)
        self._by_core.setdefault(_core(posixpath.splitext(name)[0]), []).append(path)

    def subtitles_of(self, path: str) -> str | None:
        """Return the subtitles beside a clip: its name with .srt or .vtt, also with a language between."""
        return self._subtitles.get(posixpath.splitext(path)[0])

    def find(self, name: str, data_type: str | None = None, likely: str | None = None) -> str:
        """Return the path below the root of the file or folder that `name` means; a URL, or an absolute path
        outside the root, is returned as it is.

        name: a path that may lack its extension, its folders or a prefix such as v_, or have other folders
        above them. data_type: the kind of file, if known; likely: the kind to prefer. Of several matches the
        one counts that has the others in folders below its own. Raises Rejected for no match, or for several
        others.
        """
        name = on_this_machine(name)
        if is_address(name) or is_address(self.root):
            return name
        plain = PureWindowsPath(name).as_posix() if "\\" in name else name
        path = posixpath.normpath(plain.strip())
        if path in self.paths or (not os.path.isabs(path) and os.path.isfile(os.path.join(self.root, path))):
            return path
        if os.path.isabs(path) and os.path.exists(path):
            below = os.path.relpath(path, self.root)
            return path if below.startswith("..") else below
        if data_type != "image" and path in self._folders.get(posixpath.basename(path).lower(), ()):
            return path
        matches = self._named(path, self._by_name, data_type)
        matches = [match for match in matches if data_type_of(match) == likely] or matches
        if not matches and data_type != "image":
            matches = self._named(path, self._folders)
        matches = matches or self._named(path, self._others)
        if not matches:
            matches = self._named(_core(posixpath.basename(path)), self._by_core, data_type)
            if matches:
                self.renamed[name] = matches[0]
        first = min(matches, key=lambda match: match.count("/"), default="")
        above = f"{posixpath.dirname(first)}/".lstrip("/")
        if (
            matches
            and sum("/" in match[len(above) :] for match in matches if match.startswith(above))
            == len(matches) - 1
        ):
            return first  # the others are copies in folders below its own
        if matches:
            shown = ", ".join(matches[:_SHOWN]) + (", …" if len(matches) > _SHOWN else "")
            raise Rejected("several clips", f"{name!r} may be {shown}")
        if self.may_miss:
            self.missing[path] = None
            return path
        near = self._nearest(posixpath.basename(path).lower())
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise Rejected("no such clip", f"no file {name!r} below {self.root}{hint}")

    def _named(self, path: str, by_name: dict[str, list[str]], data_type: str | None = None) -> list[str]:
        """Return the files of that name and type; if several share it, those whose folders match the path
        best."""
        name = posixpath.basename(path).lower()
        stem, ending = posixpath.splitext(name)
        matches = by_name.get(name) or (by_name.get(stem, []) if ending in MEDIA_EXTENSIONS else [])
        matches = [match for match in matches if data_type in (None, data_type_of(match))]
        folders = PurePosixPath(path).parts[:-1]
        shared = [_shared_end(folders, PurePosixPath(match).parts[:-1]) for match in matches]
        return [match for match, share in zip(matches, shared, strict=True) if share == max(shared)]

    def _nearest(self, name: str) -> list[str]:
        place = bisect.bisect(self._names, name)
        around = self._names[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]
        close = difflib.get_close_matches(name, around, _SHOWN * 2, 0.7)
        first = ((self._by_name.get(near) or self._folders[near])[0] for near in close)
        return list(dict.fromkeys(first))[:_SHOWN]


def _core(stem: str) -> str:
    """Return a name without the prefix that some data sets give files, and without zeros before a number."""
    return _PREFIX.sub("", stem).lstrip("0") or "0"


def _shared_end(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Count the folders that agree, from the last one up."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _members(archive: str) -> list[str]:
    """Return the images and videos in a tar archive; none if the file is no archive."""
    if not os.path.isfile(archive):  # opening a pipe would block
        return []
    try:
        with open(archive, "rb") as file:
            members = members_of(file)
    except (OSError, ValueError):
        return []
    return [name for name in members if posixpath.splitext(name)[1].lower() in MEDIA_EXTENSIONS]


def _files_below(root: str, follow_links: bool) -> Iterator[str]:
    entered = set()
    for folder, folders, names in os.walk(root, followlinks=follow_links):
        real = os.path.realpath(folder)
        if real in entered:  # a link to a folder above it
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        below = PurePosixPath(os.path.relpath(folder, root))
        yield from (str(below / name) for name in sorted(names) if not name.startswith("."))
