"""Prompts: the only templates, and a Sample's model inputs in one frame order."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from video_r1.data.media import Media


@dataclass(frozen=True, slots=True)
class Prompt:
    input_ids: Tensor
    features: dict[str, Tensor]
    media: Media
    permutation: Tensor | None
    messages: list[dict[str, Any]]

    @property
    def order(self) -> str:
        return "ordered" if self.permutation is None else "shuffled"
