"""Media: decoded, resized frames of a clip or an image, with real timestamps.

`read_media` (decoders.py) is the only door: a file that cannot be used raises a `MediaError` with path and
reason. Which frames are taken and how large they become is decided here; clips.py decodes videos, pictures.py
images and folders of frames.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from video_r1.data.decoding.clips import MAX_PIXELS, decode_clip
from video_r1.data.decoding.pictures import decode_frames, read_picture
from video_r1.data.sources.archives import Part, whole_file
from video_r1.data.sources.media_types import ClipRef, ShowsClips, clip_of, frame_names
from video_r1.errors import MediaError
from video_r1.settings.frames import TEMPORAL_PATCH, FrameBudget

MAX_ASPECT_RATIO = 200  # Qwen's processors refuse longer shapes
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
        """Return the media with frame `permutation[i]` in place i. The timestamps stay where they are; if
        frames are left out, each frame keeps its own.
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
    """Apply `Media.reordered` to each clip. permutation: frame numbers, counted through all clips; every
    frame stays in its own clip.
    """
    parts, first = [], 0
    for media in shown:
        inside = permutation - first
        parts.append(media.reordered(inside[(inside >= 0) & (inside < len(media.frames))]))
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
    as by `smart_resize`, with its floats. Raises ValueError if one side is more than 200 times the other.
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
        if math.prod(sides) > squares:  # in its order, whose rounding can cost a square
            scale = math.sqrt(height * width / pixels)
            sides = [max(1, math.floor(side / scale / multiple)) for side in (height, width)]
        rows, columns = sides
    else:
        rows = max(1, math.isqrt(pixels * height // (width * multiple**2)))
        columns = max(1, math.isqrt(pixels * width // (height * multiple**2)))
    return min(rows, squares) * multiple, min(columns, squares) * multiple


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize [T, 3, h, w] uint8 frames: bicubic and antialiased, as Qwen's processors do."""
    if frames.shape[-2:] == (height, width):
        return frames
    return interpolate(frames, (height, width), mode="bicubic", antialias=True)


def decode_media(source: ShowsClips, budget: FrameBudget, part: Part | list[Part] | None = None) -> Media:
    """Decode one file in this process, without limits. Raise MediaError.

    part: the bytes of another file that hold the clip, or its frames.
    """
    clip = clip_of(source)
    try:
        file = part or clip.path
        if isinstance(file, str) and clip.data_type == "video" and os.path.isdir(file):
            file = [Part(os.path.join(file, name), 0, -1, name) for name in frame_names(file)]
        elif isinstance(file, str):
            file = whole_file(file)
        if clip.data_type == "video":
            return _read_video(clip, file, budget)
        if isinstance(file, list):
            raise ValueError("is a folder, not a media file")
        frame = read_picture(file)[None]
        return fitted(Media(frame, torch.zeros(1, dtype=torch.float64), 0.0, "image"), budget)
    except Exception as error:  # decoders raise whatever they like over hostile files
        if type(error) is ValueError:  # a reason in words; FFmpeg's own errors are subclasses
            reason = str(error)
        elif isinstance(error, MemoryError) or "allocate memory" in str(error):
            reason = "takes more memory to decode than is allowed"
        else:
            reason = f"cannot be decoded ({type(error).__name__}: {error})"
        line = " ".join("".join(c if c.isprintable() else " " for c in reason).split())
        short = line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"
        raise MediaError(clip.path, short) from error


def _read_video(clip: ClipRef, file: Part | list[Part], budget: FrameBudget) -> Media:
    size: tuple[int, int] | None = None
    chosen: list[list[int]] = []  # frame indices for each frame count

    def finish(frame: Tensor) -> Tensor:
        nonlocal size
        if size is None:
            height, width = frame.shape[-2:]
            size = fitted_size(height, width, budget.frame_pixels, budget.size_multiple, budget.least_pixels)
        # torch resizes channels-last bytes fastest, which is what `frame` is; the result is made contiguous
        return resize(frame[None], *size)[0].contiguous()

    def choose(total: int, fps: float) -> list[int]:
        if total < TEMPORAL_PATCH:
            end = "its end" if clip.end is None else f"{clip.end:g} s"
            window = "" if clip.start is clip.end is None else f" between {clip.start or 0:g} s and {end}"
            frames = f"{total} frame{'s' * (total != 1)}{window}"
            raise ValueError(f"has {frames}, at least {TEMPORAL_PATCH} needed")
        counts = budget.frame_counts or (budget.max_frames,)
        chosen[:] = [frame_indices(total, fps, replace(budget, max_frames=count)) for count in counts]
        return sorted(set().union(*chosen))

    if isinstance(file, list):
        decoded = decode_frames(file, clip, choose, finish)
    else:
        decoded = decode_clip(file, clip, choose, finish)
    place = {index: number for number, index in enumerate(sorted(set().union(*chosen)))}
    places = [place[index] for indices in chosen for index in indices]
    timestamps = torch.tensor([decoded.times[place] for place in places], dtype=torch.float64)
    if clip.play == "reversed":
        parts = timestamps.split([len(indices) for indices in chosen])
        timestamps = torch.cat([part[0] + part[-1] - part.flip(0) for part in parts])
        places = [place[index] for indices in chosen for index in reversed(indices)]
    frames = torch.stack([decoded.frames[place] for place in places])
    return Media(frames, timestamps, decoded.duration, "video")


def fitted(media: Media, budget: FrameBudget) -> Media:
    """Return media that were not read here, resized as files are. Raises ValueError, in words, for media that
    no file could give.
    """
    frames, times = media.frames, media.timestamps
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise ValueError(f"its frames are {frames.dtype} {list(frames.shape)}, not uint8 [T, 3, H, W]")
    (height, width), multiple, count = frames.shape[-2:], budget.size_multiple, len(frames)
    if height * width > MAX_PIXELS:
        raise ValueError(f"its frames are {width}×{height} pixels; the limit is {MAX_PIXELS:,}")
    if media.kind not in ("image", "video") or (media.kind == "image" and count > 1):
        raise ValueError(f"it is of the kind {media.kind!r} and has {count} frames")
    if media.kind == "image" and budget.least_pixels is not None:
        pixels, least = budget.image_pixels, min(4 * multiple**2, budget.image_pixels)
    elif media.kind == "image":  # images are not scaled up
        pixels, least = min(budget.image_pixels, max(height, multiple) * max(width, multiple)), None
    else:
        pixels, least, ordered = budget.frame_pixels, budget.least_pixels, [-1e-6, *times.tolist()]
        if count % TEMPORAL_PATCH or count > budget.max_frames:
            raise ValueError(
                f"its clip has {count} frames; an even number up to {budget.max_frames} is needed"
            )
        if not 0 < media.duration < math.inf or len(times) != count:
            raise ValueError(f"its clip lasts {media.duration:g} seconds and has {len(times)} times")
        if not all(a < b <= media.duration for a, b in pairwise(ordered)):
            raise ValueError("the times of its frames do not ascend from 0 to its duration")
    size = fitted_size(height, width, pixels, multiple, least)
    return replace(media, frames=resize(frames.cpu(), *size).contiguous(), timestamps=times.cpu())
