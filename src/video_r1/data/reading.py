"""A question with its prompts, ready to be sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from video_r1.data.media import Media, shuffled_order
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.records import Sample


@dataclass(frozen=True, slots=True)
class Question:
    """A sample with its prompts. `shuffled` is None where nothing is sampled with shuffled frames.

    `seed` fixes its completions, whichever questions it is sampled with.
    """

    sample: Sample
    ordered: Prompt
    shuffled: Prompt | None
    seed: int


def build_question(
    sample: Sample, media: Media, builder: PromptBuilder, generator: torch.Generator, with_shuffled: bool
) -> Question:
    """Both prompts of a sample. Only videos of two frames or more have a shuffled one. Raises PromptError."""
    seed = int(torch.randint(2**62, (), generator=generator))
    shuffled = None
    if with_shuffled and media.kind == "video" and len(media.frames) > 1:
        shuffled = builder.build(sample, media, shuffled_order(len(media.frames), generator))
    return Question(sample, builder.build(sample, media), shuffled, seed)
