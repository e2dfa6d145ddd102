"""Frame budget: how many frames of a video the model sees, and the limits of decoding. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from video_r1.errors import ConfigError

Contrast = Literal["shuffled", "reversed", "frozen", "single", "dropped", "blind"]
"""Clip that the clip in its own frame order is compared with (data/prompts.py)."""
ContrastUnit = Literal["frame", "patch"]
"""Unit that a contrast permutes: single frames, or the pairs that make temporal patches."""
Order = Literal[
    "ordered", "shuffled", "reversed", "frozen", "single", "dropped", "blind", "elsewhere", "no-look"
]
"""The clip's own order, each contrast, and its own order with looks that show another stretch (elsewhere) or
without tools, but with the frames that looks would have shown (no-look)."""
LOOK_CONTROLS: tuple[Order, ...] = ("elsewhere", "no-look")
CONTROLS: tuple[Order, ...] = ("ordered", "shuffled", "reversed", "frozen", "single", "blind")
"""Orders of `eval --controls`: each removes more of the clip than the one before it."""

# Two consecutive frames make one temporal patch in every Qwen vision model.
TEMPORAL_PATCH = 2


@dataclass(frozen=True, slots=True)
class FrameBudget:
    """The number of frames kept of a video, the size of frames and images, and the limits of decoding.

    Areas are in pixels; a model's visual tokens are area ÷ size_multiple² (for video per two frames).
    """

    fps: float = 2.0  # frames per second of clip to aim for
    min_frames: int = 4  # fewer if the clip is shorter
    max_frames: int = 16
    frame_pixels: int = 128 * 28 * 28  # largest area of a video frame; smaller frames are scaled up to it
    image_pixels: int = 256 * 28 * 28  # largest area of an image; smaller images are not scaled up
    size_multiple: int = 28  # both sides are multiples of it: patch × merge of the model
    # Read once for each of these max_frames, the frames concatenated (see read_media_at).
    frame_counts: tuple[int, ...] = ()
    # Smaller frames are scaled up to this area instead of frame_pixels, and images to four squares; between
    # the limits, sides are rounded to the nearest multiples.
    least_pixels: int | None = None
    # Limits of one file, beyond which it is unusable. They do not change the frames.
    seconds: float = field(default=120.0, compare=False)  # 0: decode in this process, without limits
    memory: int = field(default=4 << 30, compare=False)  # bytes that a worker process may allocate
    # Folder for copies of remote files (None: the user's cache folder), and its largest size in bytes.
    remote_cache: str | None = field(default=None, compare=False)
    remote_bytes: int = field(default=50 * 10**9, compare=False)

    def __post_init__(self) -> None:
        if self.max_frames < TEMPORAL_PATCH or self.min_frames < 1:
            raise ConfigError(
                f"max_frames is {self.max_frames} and min_frames {self.min_frames}; a video needs at "
                f"least {TEMPORAL_PATCH} frames"
            )
        for name in ("frame_pixels", "image_pixels"):
            if getattr(self, name) < self.size_multiple**2:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, below one square of size_multiple "
                    f"({self.size_multiple}² = {self.size_multiple**2})"
                )
