"""Real clips and images for the tests, and the samples that ask about them."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
import torch
from PIL import Image

from video_r1.data.manifests.records import Sample
from video_r1.settings.frames import FrameBudget

SIDE = 56
SMALL = FrameBudget(frame_pixels=SIDE * SIDE, image_pixels=SIDE * SIDE)


def sample(path: Path | str, data_type: Any = "video", start: float | None = None, end: float | None = None):
    return Sample(1, "What?", data_type, "free-form", "<answer>x</answer>", str(path), start=start, end=end)


def picture(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """[height, width, 3]: a picture that differs from those of all other numbers, with movement."""
    draw = np.random.default_rng(number)
    pixels = np.full((height, width, 3), 40, np.uint8)
    pixels[:, :, 0] = (np.arange(width) * 3 + number * 5) % 256
    place = (number * 3) % (width - 16)
    patch = pixels[8:24, place : place + 16]
    patch[:] = draw.integers(0, 256, patch.shape)
    return pixels


def write_video(
    path: Path,
    frames: int,
    codec: str = "libx264",
    fps: int = 25,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    size: tuple[int, int] = (SIDE, SIDE),
    matrix: list[int] | None = None,
    metadata: dict[str, str] | None = None,
    first: int = 0,
) -> Path:
    """A clip of the pictures from number `first` on."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        container.metadata.update(metadata or {})
        stream: Any = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if matrix:
            stream.set_display_matrix(matrix)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(first + number, *size), format="rgb24")
            frame.pts = pts[number] if pts else number
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded_frames(path: Path) -> list[torch.Tensor]:
    """Every frame of a file, [3, H, W], decoded from first to last with nothing left out."""
    with av.open(str(path)) as container:
        return [
            torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1) for f in container.decode(video=0)
        ]


def saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def noise(side: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
