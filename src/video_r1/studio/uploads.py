"""Clips that a browser has sent: files in a folder of the server's own, which goes with the server."""

import re
import secrets
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.exceptions import HTTPException

from video_r1.data.sources.media_types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

LARGEST = 512 << 20  # bytes of one
TOGETHER = 2 << 30  # bytes of all; the first go


class Uploads:
    """By name: what the page asks for is never a path."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="video-r1-studio-")
        self._sizes: dict[str, int] = {}

    def path(self, name: str) -> Path:
        """Raises HTTPException 404."""
        if name not in self._sizes:
            raise HTTPException(404, "this clip is not here any more: choose it once more")
        return Path(self._folder.name, name)

    async def take(self, filename: str, parts: AsyncIterator[bytes]) -> str:
        """Writes a file as it comes and returns its name. Raises HTTPException 413, 415."""
        ending = Path(filename).suffix.lower()
        if ending not in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
            raise HTTPException(415, f"{filename[:100]!r} is no video or image by its name")
        stem = re.sub(r"[^A-Za-z0-9-]+", "-", Path(filename).stem)[:40].strip("-") or "clip"
        name = f"{stem}-{secrets.token_hex(4)}{ending}"
        path = Path(self._folder.name, name)
        size = 0
        try:
            with path.open("wb") as file:
                async for part in parts:
                    size += len(part)
                    if size > LARGEST:
                        raise HTTPException(413, f"the file has more than {LARGEST >> 20} MB")
                    file.write(part)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._sizes[name] = size
        while sum(self._sizes.values()) > TOGETHER and len(self._sizes) > 1:
            first = next(iter(self._sizes))
            del self._sizes[first]
            Path(self._folder.name, first).unlink(missing_ok=True)
        return name

    def close(self) -> None:
        self._folder.cleanup()
