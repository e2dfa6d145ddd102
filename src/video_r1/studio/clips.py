"""Clips for the page: files that play, members of archives, frames of folders, and sent clips."""

import os
import re
import secrets
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse

from video_r1.data.sources.archives import TAR, Part, split_member
from video_r1.data.sources.media_types import FOLDER_FPS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, frame_names
from video_r1.data.sources.remote import local_file, open_remote_cache
from video_r1.errors import MediaError
from video_r1.report.values import finite

LARGEST = 512 << 20  # bytes of one sent clip
TOGETHER = 2 << 30  # bytes of all; the oldest go
CACHE_BYTES = 50 * 10**9  # of the user's cache folder, for indexes of archives and copies of cells
_MAGIC = (
    (0, b"\xff\xd8", ".jpg"), (0, b"\x89PNG", ".png"), (0, b"GIF8", ".gif"), (8, b"WEBP", ".webp"),
    (4, b"ftyp", ".mp4"), (0, b"\x1a\x45\xdf\xa3", ".webm"),
)  # fmt: skip
_PIECE = 1 << 18
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?", re.ASCII)
_KEPT = {"cache-control": "private, max-age=600"}


def play(path: str, frame: int, wanted: str | None) -> Response:
    """Return a clip or image as a file that plays. frame: number of a folder's frame; wanted: Range header.

    Raises HTTPException for a file that is missing or that a browser cannot show.
    """
    if not split_member(path):
        if not os.path.isdir(path):
            return media_file(Path(path))
        try:
            names = frame_names(path)
        except (ValueError, OSError) as error:
            raise HTTPException(415, f"the folder cannot be shown: {error}") from error
        return media_file(Path(path, names[_checked(frame, len(names))]))
    try:
        part = _part_of(path)
    except MediaError as error:
        raise HTTPException(404, error.reason) from error
    if isinstance(part, list):
        part = part[_checked(frame, len(part))]
    kind, begin, end = _kind(part.name), 0, part.size
    if match := _RANGE.fullmatch(wanted or ""):
        first, last = match.groups()
        begin = int(first) if first else max(0, part.size - int(last or 0))
        end = min(int(last) + 1, part.size) if first and last else part.size
        if begin >= end:
            raise HTTPException(416, f"the clip has {part.size} bytes")

    def pieces() -> Iterator[bytes]:
        with open(part.path, "rb") as file:
            file.seek(part.offset + begin)
            for at in range(begin, end, _PIECE):
                yield file.read(min(_PIECE, end - at))

    headers = {**_KEPT, "accept-ranges": "bytes", "content-length": str(end - begin)}
    if match:
        headers["content-range"] = f"bytes {begin}-{end - 1}/{part.size}"
    return StreamingResponse(pieces(), 206 if match else 200, headers, kind)


def media_file(path: Path) -> Response:
    """Return a picture or video that a browser can show, nothing else. Raises HTTPException."""
    kind = _kind(path.name)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise HTTPException(404, "the clip is not a regular file")
    except OSError as error:
        raise HTTPException(404, f"there is no file {path.name[:200]}") from error
    return FileResponse(path, media_type=kind, headers=_KEPT)


def frames_of(path: str, row: dict[str, Any]) -> dict[str, float] | None:
    """Return the number of frames (`count`) and their rate (`fps`) of a folder of frames, None of a file.

    Raises ValueError for a folder that cannot be used.
    """
    count = 0
    if os.path.isdir(path):
        count = len(frame_names(path))
    elif path.startswith(TAR) and local_file(path) and not os.path.splitext(path.partition("::")[0])[1]:
        try:
            parts = _part_of(path)
        except MediaError as error:
            raise ValueError(error.reason) from error
        count = len(parts) if isinstance(parts, list) else 0
    return {"count": count, "fps": finite(row.get("fps")) or FOLDER_FPS} if count else None


def _part_of(path: str) -> Part | list[Part]:
    """Return the bytes of an archive's member, or of the copy of a table's cell. Raises MediaError."""
    cache = open_remote_cache(None, CACHE_BYTES)
    if path.startswith(TAR):
        return cache.part(path)
    with cache.file(path) as copy, open(copy, "rb") as file:
        head = file.read(12)
        ending = next((ending for at, magic, ending in _MAGIC if head[at:].startswith(magic)), "")
        return Part(copy, 0, file.seek(0, os.SEEK_END), f"cell{ending}")


def _checked(number: int, count: int) -> int:
    if not 0 <= number < count:
        raise HTTPException(404, f"there is no frame {number}, only {count}")
    return number


def _kind(name: str) -> str:
    """Return the media type of a file that a browser shows. Raises HTTPException 415."""
    kind = guess_type(name)[0] or ""
    if not kind.startswith(("video/", "image/")) or kind == "image/svg+xml":
        raise HTTPException(415, f"{Path(name).suffix[:20]} is no video or image that a browser shows")
    return kind


class Uploads:
    """Clips that a browser sent, in a temporary folder. The page asks for them by name, never by path."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="video-r1-studio-")
        self._sizes: dict[str, int] = {}
        self._arriving: set[str] = set()

    def path(self, name: str) -> Path:
        """Return the file of a clip. Raises HTTPException 404."""
        if name not in self._sizes or name in self._arriving:
            raise HTTPException(404, "this clip was removed: choose it again")
        return Path(self._folder.name, name)

    async def take(self, filename: str, parts: AsyncIterator[bytes]) -> str:
        """Write a file as it arrives and return its name. Raises HTTPException 413, 415."""
        ending = Path(filename).suffix.lower()
        if ending not in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
            raise HTTPException(415, f"{filename[:100]!r} is no video or image by its name")
        stem = re.sub(r"[^A-Za-z0-9-]+", "-", Path(filename).stem)[:40].strip("-") or "clip"
        name = f"{stem}-{secrets.token_hex(4)}{ending}"
        path = Path(self._folder.name, name)
        self._sizes[name] = 0
        self._arriving.add(name)
        try:
            with path.open("wb") as file:
                async for part in parts:
                    self._sizes[name] += len(part)
                    if self._sizes[name] > LARGEST:
                        raise HTTPException(413, f"the file has more than {LARGEST >> 20} MB")
                    self._make_room()
                    file.write(part)
        except BaseException:
            self._remove(name)
            raise
        finally:
            self._arriving.discard(name)
        return name

    def _make_room(self) -> None:
        """Remove the oldest whole clips. Raises HTTPException 413 if those that arrive are too large."""
        while sum(self._sizes.values()) > TOGETHER:
            oldest = next((name for name in self._sizes if name not in self._arriving), None)
            if oldest is None:
                raise HTTPException(413, f"the clips that are being sent have more than {TOGETHER >> 30} GB")
            self._remove(oldest)

    def _remove(self, name: str) -> None:
        del self._sizes[name]
        Path(self._folder.name, name).unlink(missing_ok=True)

    def close(self) -> None:
        self._folder.cleanup()
