"""How much of a video or an image the model sees, and what reading it may cost. Torch-free."""

import math
from dataclasses import dataclass, field
from typing import Literal

from video_r1.errors import ConfigError

Contrast = Literal["shuffled", "reversed", "frozen", "single", "dropped", "blind"]
"""What a clip in its own frame order is compared with (data/prompts.py)."""
ContrastUnit = Literal["frame", "patch"]
"""What a contrast permutes: single frames, or the pairs that make temporal patches."""
Order = Literal["ordered", "shuffled", "reversed", "frozen", "single", "dropped", "blind"]
"""The clip's own order, and each contrast."""
CONTROLS: tuple[Order, ...] = ("ordered", "shuffled", "reversed", "frozen", "single", "blind")
"""What `eval --controls` asks: each takes more of the clip away than the one before it."""

# Two consecutive frames make one temporal patch in every Qwen vision model.
TEMPORAL_PATCH = 2

_LEAST_MEMORY = 64 << 20


@dataclass(frozen=True, slots=True)
class FrameBudget:
    """How many frames of a video are kept, how large frames and images become, and what reading may cost.

    Areas are in pixels; a model's visual tokens are area ÷ size_multiple² (for video per two frames).
    """

    fps: float = 2.0  # frames per second of clip to aim for
    min_frames: int = 4  # as long as the clip has that many
    max_frames: int = 16
    frame_pixels: int = 128 * 28 * 28  # largest area of a video frame; smaller frames are scaled up to it
    image_pixels: int = 256 * 28 * 28  # largest area of an image; smaller images are not scaled up
    size_multiple: int = 28  # both sides are multiples of it: patch × merge of the model
    # As if read with each of these max_frames in turn, the frames one after the other (see read_media_at).
    frame_counts: tuple[int, ...] = ()
    least_pixels: int | None = None  # smaller frames are scaled up to this area in place of frame_pixels
    # The limits of one file, after which it counts as unusable. They do not change what is read.
    seconds: float = field(default=120.0, compare=False)  # 0: decode in this process, without any limit
    memory: int = field(default=4 << 30, compare=False)  # bytes of a worker process, above those of its start
    # Where copies of remote files are kept (None: in the user's cache folder), and how many bytes of them.
    remote_cache: str | None = field(default=None, compare=False)
    remote_bytes: int = field(default=50 * 10**9, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"fps is {self.fps}; it must be above 0")
        if self.max_frames < TEMPORAL_PATCH or self.min_frames < 1:
            raise ConfigError(
                f"max_frames is {self.max_frames} and min_frames {self.min_frames}; a video needs at "
                f"least {TEMPORAL_PATCH} frames"
            )
        if not 0 <= self.seconds < math.inf or self.memory < _LEAST_MEMORY:
            raise ConfigError(
                f"a file may take {self.seconds} seconds and {self.memory:,} bytes; give 0 seconds (no "
                f"limits) or more, and at least {_LEAST_MEMORY:,} bytes"
            )
        if self.least_pixels is not None and not 0 < self.least_pixels <= self.frame_pixels:
            raise ConfigError(
                f"least_pixels is {self.least_pixels}; it must be above 0 and at most frame_pixels "
                f"({self.frame_pixels})"
            )
        for name in ("frame_pixels", "image_pixels"):
            if getattr(self, name) < self.size_multiple**2:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, below one square of size_multiple "
                    f"({self.size_multiple}² = {self.size_multiple**2})"
                )
