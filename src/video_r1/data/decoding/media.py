"""Media: decoded, resized frames of a clip or an image, with real timestamps.

`read_media` is the only door: whatever is wrong with a file comes out of it as a `MediaError` with path
and reason. It fetches what is behind an address (remote.py), and decodes in a worker process with limits on
time and memory (decoders.py). Videos are decoded in clips.py, pictures and folders of them in pictures.py;
which frames are taken and how large they become is decided here.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from video_r1.data.decoding.clips import decode_clip
from video_r1.data.decoding.pictures import decode_frames, read_picture
from video_r1.data.sources.archives import Part
from video_r1.data.sources.media_types import ClipRef, ShowsClips, clip_of, frame_names
from video_r1.errors import MediaError
from video_r1.settings.frames import TEMPORAL_PATCH, FrameBudget

# Qwen's processors refuse longer shapes.
MAX_ASPECT_RATIO = 200
_LONGEST_REASON = 300  # characters; decoders quote what they find in a file


@dataclass(frozen=True, slots=True)
class Media:
    """The frames that a model sees of one image or video."""

    frames: Tensor  # [T, 3, H, W] uint8 RGB, resized; an image has T = 1
    timestamps: Tensor  # [T] float64, seconds from the start of the window
    duration: float  # seconds of the window; 0 for an image
    kind: Literal["image", "video"]

    @property
    def fps(self) -> float:
        """Return frames kept per second of clip; 0 for an image."""
        return len(self.frames) / self.duration if self.duration else 0.0

    def reordered(self, permutation: Tensor) -> Self:
        """The same media with frame `permutation[i]` in place i. The timestamps stay where they are, unless
        some are left out: then each frame keeps its own.
        """
        all_there = len(permutation) == len(self.frames)
        times = self.timestamps if all_there else self.timestamps[permutation]
        return replace(self, frames=self.frames[permutation], timestamps=times)


Shown = Media | Sequence[Media]
"""Media of a question: one clip or image, or several in order."""


def clips_of(shown: Shown) -> tuple[Media, ...]:
    """Return the clips or images as a tuple."""
    return (shown,) if isinstance(shown, Media) else tuple(shown)


def reordered(shown: Sequence[Media], permutation: Tensor) -> tuple[Media, ...]:
    """`Media.reordered` of each. permutation: frames by number, which count on from one to the next; every
    frame stays in its own clip.
    """
    parts, first = [], 0
    for media in shown:
        own = permutation - first
        parts.append(media.reordered(own[(own >= 0) & (own < len(media.frames))]))
        first += len(media.frames)
    return tuple(parts)


def frame_indices(total_frames: int, clip_fps: float, budget: FrameBudget) -> list[int]:
    """Choose frames of a clip: `budget.fps` a second, evenly from the first to the last.

    Their number is at least min_frames and 2, at most max_frames, never more than the clip has, and rounded
    down to an even number; a clip of one frame gives none. Places are rounded to the nearest frame.
    """
    wanted = total_frames / clip_fps * budget.fps
    count = min(max(wanted, budget.min_frames, TEMPORAL_PATCH), budget.max_frames, total_frames)
    # 1e-6: 4 s × 2 fps must not become 7.999… and then 6
    count = math.floor((count + 1e-6) / TEMPORAL_PATCH) * TEMPORAL_PATCH
    return [round(place * (total_frames - 1) / (count - 1)) for place in range(count)]


def fitted_size(
    height: int, width: int, pixels: int, multiple: int, least: int | None = None
) -> tuple[int, int]:
    """Return (height, width) after resizing: multiples of `multiple`, aspect ratio kept, area up to `pixels`.

    Both sides are rounded down, as Qwen's `smart_resize` does when it shrinks, but not below one multiple;
    small frames are scaled up by the same rule. Exact: a frame that has the budget's size keeps it. least:
    small frames are scaled up to this area only, and those between the two rounded to the nearest multiples,
    as `smart_resize` does.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"is {width}×{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other, "
            "which the models do not take"
        )
    squares = pixels // multiple**2
    if least is not None:
        sides = [max(1, round(side / multiple)) for side in (height, width)]
        if math.prod(sides) * multiple**2 < least:
            scale = math.sqrt(least / (height * width))
            sides = [math.ceil(side * scale / multiple) for side in (height, width)]
        if math.prod(sides) <= squares:
            return sides[0] * multiple, sides[1] * multiple
    rows = max(1, math.isqrt(pixels * height // (width * multiple**2)))
    columns = max(1, math.isqrt(pixels * width // (height * multiple**2)))
    return min(rows, squares) * multiple, min(columns, squares) * multiple


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize [T, 3, h, w] uint8 to [T, 3, height, width] uint8: bicubic, antialiased, as Qwen's processors
    do.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return interpolate(frames, (height, width), mode="bicubic", antialias=True)


def shuffled_order(frames: int, generator: torch.Generator) -> Tensor:
    """Draw a permutation [T] int64 uniformly from all but the identity. Raise ValueError for T < 2."""
    if frames < 2:
        raise ValueError(f"{frames} frame has no order to shuffle")
    identity = torch.arange(frames)
    while torch.equal(permutation := torch.randperm(frames, generator=generator), identity):
        pass
    return permutation


def decode_media(source: ShowsClips, budget: FrameBudget, part: Part | list[Part] | None = None) -> Media:
    """Run `read_media` in this process, without its limits. part: the bytes of another file that hold the
    clip, or a list of frames. Raise MediaError.
    """
    clip = clip_of(source)
    try:
        file = part or clip.path
        if isinstance(file, str) and os.path.isdir(file) and clip.data_type == "video":
            names = frame_names(file)
            return _read_video(clip, [(name, os.path.join(file, name)) for name in names], budget)
        if isinstance(file, list) and clip.data_type == "video":
            return _read_video(clip, [(one.name, one) for one in file], budget)
        if isinstance(file, str):
            _require_file(file)
        elif isinstance(file, list):
            raise MediaError(clip.path, "is a folder, not a media file")
        elif file.size == 0:
            raise MediaError(clip.path, "the file is empty (0 bytes)")
        return _read_image(file, budget) if clip.data_type == "image" else _read_video(clip, file, budget)
    except Exception as error:  # decoders raise whatever they like over hostile files
        if isinstance(error, MediaError):
            reason = error.reason
        elif type(error) is ValueError:  # a reason in words; FFmpeg's own errors are subclasses
            reason = str(error)
        elif isinstance(error, MemoryError) or "allocate memory" in str(error):
            reason = "takes more memory to decode than is allowed"
        else:
            detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            reason = f"cannot be decoded ({detail})"
        raise MediaError(clip.path, _one_line(reason)) from error


def _one_line(reason: str) -> str:
    """Return printable characters only, shortened."""
    line = " ".join("".join(c if c.isprintable() else " " for c in reason).split())
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"


def _require_file(path: str) -> None:
    if os.path.isdir(path):
        raise MediaError(path, "is a folder, not a media file")
    if not os.path.exists(path):
        raise MediaError(path, "there is no such file")
    if not os.path.isfile(path):
        raise MediaError(path, "is not a regular file")
    if os.path.getsize(path) == 0:
        raise MediaError(path, "the file is empty (0 bytes)")
    if not os.access(path, os.R_OK):
        raise MediaError(path, "may not be read (permission denied)")


def _read_video(clip: ClipRef, file: str | Part | list[tuple[str, str | Part]], budget: FrameBudget) -> Media:
    """Decode a clip. file: for a clip that is pictures, a list of names and files."""
    size: tuple[int, int] | None = None
    chosen: list[list[int]] = []  # of each frame count

    def finish(frame: Tensor) -> Tensor:
        nonlocal size
        if size is None:
            height, width = frame.shape[-2:]
            size = fitted_size(height, width, budget.frame_pixels, budget.size_multiple, budget.least_pixels)
        # torch resizes channels-last bytes fastest, which is what `frame` is; the result is made contiguous
        return resize(frame[None], *size)[0].contiguous()

    def choose(total: int, fps: float) -> list[int]:
        if total < TEMPORAL_PATCH:
            frames = f"{total} frame{'s' * (total != 1)}{_window(clip)}"
            raise ValueError(f"has {frames}, at least {TEMPORAL_PATCH} needed")
        counts = budget.frame_counts or (budget.max_frames,)
        chosen[:] = [frame_indices(total, fps, replace(budget, max_frames=count)) for count in counts]
        return sorted(set().union(*chosen))

    if isinstance(file, list):
        decoded = decode_frames(file, clip.fps, choose, finish, clip.start, clip.end)
    else:
        decoded = decode_clip(file, choose, finish, clip.start, clip.end)
    place = {index: number for number, index in enumerate(sorted(set().union(*chosen)))}
    places = [place[index] for indices in chosen for index in indices]
    timestamps = torch.tensor([decoded.times[place] for place in places], dtype=torch.float64)
    return Media(
        torch.stack([decoded.frames[place] for place in places]), timestamps, decoded.duration, "video"
    )


def _window(clip: ClipRef) -> str:
    if clip.start is None and clip.end is None:
        return ""
    end = "its end" if clip.end is None else f"{clip.end:g} s"
    return f" between {clip.start or 0:g} s and {end}"


def _read_image(file: str | Part, budget: FrameBudget) -> Media:
    frame = read_picture(file)[None]
    (height, width), least = frame.shape[-2:], budget.size_multiple
    own_pixels = max(height, least) * max(width, least)  # images are not scaled up
    size = fitted_size(height, width, min(budget.image_pixels, own_pixels), least)
    return Media(resize(frame, *size).contiguous(), torch.zeros(1, dtype=torch.float64), 0.0, "image")
