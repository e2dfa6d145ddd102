"""The protocol between the trainer and whatever samples for it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from video_r1.data.prompts import Prompt


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 768
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    token_ids: Tensor
    logprobs: Tensor
    text: str
    finish_reason: Literal["stop", "length"]


class RolloutEngine(Protocol):
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings) -> list[list[Rollout]]: ...

    def update_weights(self, model: Any) -> None: ...

    def close(self) -> None: ...
