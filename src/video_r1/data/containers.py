"""How long a video file says it is: FFmpeg reads a file that was cut off up to the cut without a word."""

from __future__ import annotations

import os
from pathlib import Path

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = 0x18538067


def missing_bytes(path: str | Path) -> int:
    """Bytes by which a Matroska, WebM or AVI file is shorter than it declares; 0 when it declares nothing.

    MP4 needs no such check: its index lists every frame, which is compared with the frames that are read.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    declared = 0
    if head.startswith(_EBML):
        declared = _matroska_size(head)
    elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        size = int.from_bytes(head[4:8], "little")
        declared = 8 + size if size != 0xFFFFFFFF else 0
    return max(0, declared - os.path.getsize(path))


def _matroska_size(head: bytes) -> int:
    """End of the segment after the EBML header (RFC 8794); 0 when its size is unknown (a live recording)."""
    header_size, place = _variable_size(head, 4)
    place += header_size or 0
    if int.from_bytes(head[place : place + 4]) != _SEGMENT:
        return 0
    size, place = _variable_size(head, place + 4)
    return place + size if size is not None else 0


def _variable_size(data: bytes, place: int) -> tuple[int | None, int]:
    """An EBML size (None: unknown) and the place after it. The zeros of its first byte give its length."""
    if place >= len(data) or data[place] == 0:
        return None, place + 1
    length = 9 - data[place].bit_length()
    marker = 1 << (7 * length)
    value = int.from_bytes(data[place : place + length]) - marker
    return (None if value == marker - 1 else value), place + length
