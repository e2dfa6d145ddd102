"""Extensions of media files and manifests, and folders of frames: clips as numbered pictures. Torch-free.

clips/0001/1.jpg 2.jpg … 10.jpg ─► in the order of their numbers, `fps` of them a second
"""

import os
import re
from dataclasses import dataclass
from typing import Literal, Protocol

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
    ".avif", ".heic", ".heif",
)  # fmt: skip
VIDEO_EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".flv",
    ".wmv", ".3gp", ".ogv", ".vob", ".asf",
)  # fmt: skip
MANIFEST_EXTENSIONS = (".json", ".jsonl", ".ndjson", ".parquet")

FOLDER_FPS = 2.0
"""Frames a second of a folder whose row says nothing: the rate at which frames are sampled here and in the
Video-R1 code, and what Qwen's own reader (qwen-vl-utils, `sample_fps`) takes a list of frames to have."""


Play = Literal["forward", "reversed"]
"""reversed: the last frame comes first; times count on as for any clip."""


@dataclass(frozen=True, slots=True)
class ClipRef:
    """File to decode: a video, an image or a folder of frames, and its window."""

    path: str  # a file, a folder of frames, an address, or a member of an archive or table
    data_type: Literal["image", "video"] = "video"
    start: float | None = None  # seconds from the first frame; None: from the beginning
    end: float | None = None  # None: to the end
    fps: float | None = None  # frames a second of a folder of frames; None: FOLDER_FPS
    play: Play = "forward"

    @property
    def files(self) -> tuple["ClipRef", ...]:
        return (self,)


class ShowsClips(Protocol):
    """Anything with files to show: a sample, or a ClipRef."""

    @property
    def files(self) -> tuple[ClipRef, ...]: ...


def clip_of(source: ShowsClips) -> ClipRef:
    """Return the only file of a sample. Raise ValueError where it has several."""
    clip, *others = source.files
    if others:
        name = getattr(source, "problem_id", "")
        raise ValueError(f"question {name!r} has {1 + len(others)} files; read each of them")
    return clip


_NUMBER = re.compile(r"(\d+)", re.ASCII)


def frame_names(folder: str) -> list[str]:
    """Return the names of the folder's frames in order: 2.jpg before 10.jpg. Hidden files do not count.

    Raises ValueError, in words, for a folder without frames or with anything else in it.
    """
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except PermissionError as error:
        raise ValueError("may not be read (permission denied)") from error
    for entry in entries:
        if entry.is_symlink() and not os.path.realpath(entry.path).startswith(folder.rstrip("/") + "/"):
            raise ValueError(f"has the frame {entry.name!r}, a link that leads out of its folder")
    return in_order([entry.name + "/" * entry.is_dir() for entry in entries])


def in_order(names: list[str]) -> list[str]:
    """Sort the names in a folder of frames by the numbers in them; names of folders end in a slash. Raise
    ValueError, in words, for an empty folder or anything but images.
    """
    if not names:
        raise ValueError("is a folder without frames")
    for name in names:
        if os.path.splitext(name)[1].lower() not in IMAGE_EXTENSIONS or "/" in name:
            raise ValueError(f"is a folder with {name!r} in it, which is no image; keep frames alone")
    return sorted(names, key=_numbers)


def frame_stamps(folder: str) -> list[tuple[str, int, int]]:
    """Return (name, bytes, time of change) of each file."""
    with os.scandir(folder) as found:
        facts = [(entry.name, entry.stat()) for entry in found]
    return sorted((name, fact.st_size, fact.st_mtime_ns) for name, fact in facts)


def _numbers(name: str) -> tuple[list[str | int], str]:
    """Split a name into texts and numbers, for sorting; the name itself orders 1.jpg and 01.jpg."""
    parts = _NUMBER.split(name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
