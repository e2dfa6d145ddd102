"""Media: decoded, resized frames of a clip or an image."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FrameBudget:
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 16
    frame_pixels: int = 128 * 28 * 28
    image_pixels: int = 512 * 28 * 28
    size_multiple: int = 28


@dataclass(frozen=True, slots=True)
class Media:
    frames: Tensor
    timestamps: Tensor
    duration: float
    kind: Literal["image", "video"]

    @property
    def fps(self) -> float:
        return len(self.frames) / self.duration if self.duration else 0.0

    def reordered(self, permutation: Tensor) -> "Media":
        return Media(self.frames[permutation], self.timestamps, self.duration, self.kind)
