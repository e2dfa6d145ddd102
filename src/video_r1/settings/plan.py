"""Settings of `video-r1 plan`, beside those of the recipe that is planned."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from video_r1.settings.base import Problem, Settings, setting

UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(kw_only=True)
class PlanSettings(Settings):
    """Plan"""

    gpu_memory: str | None = setting(
        None, "memory of one GPU, such as 80GB or 24GiB (default: this machine's)"
    )
    model_config: str | None = setting(
        None, "folder or hub id whose config.json says the model's shape (default: model_name_or_path)"
    )
    stage: Literal["rl", "sft"] | None = setting(None, "what the recipe is for (default: by its settings)")
    processes: int | None = setting(None, "GPUs that train (default: the accelerate file's, or 1)", above=0)
    accelerate_config: str | None = setting(None, "the file that accelerate launch is given")
    text_tokens: int = setting(
        300, "tokens of a prompt without its frames: question, options, instruction", above=0
    )

    max_response_length: int = setting(2048, "longest response in tokens, of a recipe for sft", above=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.gpu_memory is not None and parse_bytes(self.gpu_memory) is None:
            yield "gpu_memory", f"is {self.gpu_memory!r}; write a number and a unit, such as 80GB or 24GiB"


def parse_bytes(text: str) -> int | None:
    """ "80GB" (10⁹), "24GiB" (2³⁰) or "512MiB" in bytes; None when it is not of that form or 0."""
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2].upper() not in UNITS:
        return None
    try:
        return int(float(found[1]) * UNITS[found[2].upper()]) or None
    except ValueError:
        return None
