"""Members of tar archives (WebDataset's shards) where they lie: which there are, at which byte each begins.

    tar://0001.mp4::shards/000.tar ─► {"0001.mp4": (offset, size), …} ─► Part ─► read like a file of its own

The notation is fsspec's. Nothing is unpacked, and the names inside of an archive are never used as paths.
"""

import io
import os
import posixpath
import tarfile
from typing import Any, BinaryIO, NamedTuple

from video_r1.data.sources.frame_folders import in_order
from video_r1.data.sources.table_cells import SCHEME as TABLE

Members = dict[str, tuple[int, int]]
"""(first byte, bytes) of each file in an archive, by its name; (-1, 0) of what is no plain file."""
TAR = "tar://"
_PACKED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_NO_FILE = (-1, 0)
MOST_FRAMES = 5000  # of a folder in an archive: their places go to another process in one message


class Part(NamedTuple):
    """Bytes of a file that are a file themselves."""

    path: str
    offset: int
    size: int
    name: str = ""

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Window(self))


def open_file(file: str | Part) -> BinaryIO:
    return open(file, "rb") if isinstance(file, str) else file.open()


class _Window(io.RawIOBase):
    def __init__(self, part: Part) -> None:
        self._file = open(part.path, "rb", buffering=0)  # noqa: SIM115
        self._begin, self._size, self._at = part.offset, part.size, 0
        self.name = part.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"byte {base + offset} is before the first one")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._at)]  # type: ignore[arg-type]
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(view) if view else 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def split_member(path: object) -> tuple[str, str] | None:
    """(`tar://member`, archive) of `tar://member::archive`, and the same of a cell of a table
    (table_cells.py); None for anything else.
    """
    if not (isinstance(path, str) and path.startswith((TAR, TABLE)) and "::" in path):
        return None
    begin, _, archive = path.partition("::")
    return begin, archive


def members_of(file: BinaryIO) -> Members:
    """What is in an archive, by reading its headers. Raises ValueError in words where it is none."""
    head = file.read(6)
    packed = next((name for magic, name in _PACKED if head.startswith(magic)), None)
    if packed is not None:
        raise ValueError(
            f"the archive is compressed ({packed}), so that no member can be found; decompress it"
        )
    file.seek(0)
    found: Members = {}
    try:
        archive: Any
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                plain = info.isreg() and not info.issparse()
                found[posixpath.normpath(info.name)] = (info.offset_data, info.size) if plain else _NO_FILE
                archive.members = []  # of which tarfile keeps all
    except tarfile.TarError as error:
        raise ValueError(f"the archive is no tar, or cut short ({error})") from error
    return found


def member_of(found: Members, member: str) -> tuple[int, int]:
    """(first byte, bytes) of a member. Raises ValueError in words."""
    place = found.get(posixpath.normpath(member))
    if place is None:
        raise ValueError(f"there is no such file in the archive, which has {len(found):,}")
    if place == _NO_FILE:
        raise ValueError("is a folder, a link or another thing in the archive, no plain file")
    return place


def part_of(found: Members, member: str, archive: str) -> Part | list[Part]:
    """A member, or the frames of a folder in the archive, in their order. Raises ValueError in words."""
    name = posixpath.normpath(member)
    if found.get(name, _NO_FILE) == _NO_FILE:
        begin = "" if name == "." else name + "/"
        inside = {one[len(begin) :]: place for one, place in found.items() if one.startswith(begin)}
        frames = {one: place for one, place in inside.items() if not one.startswith(".")}
        if len(frames) > MOST_FRAMES:
            raise ValueError(
                f"is a folder of {len(frames):,} files; at most {MOST_FRAMES:,} are read as frames"
            )
        if frames:
            for one, place in frames.items():
                if place == _NO_FILE:
                    raise ValueError(f"is a folder with {one!r} in it, a link or a folder; keep frames alone")
            return [Part(archive, *frames[one], one) for one in in_order(list(frames))]
    return Part(archive, *member_of(found, member), member)
