"""Prompts for the tests of vLLM, and what the trainer's model says of their completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import moving_square
from torch import Tensor

from video_r1.data.media import Media
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.records import Sample
from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.engine import Rollout

QUESTION = Sample(1, "Whither?", "video", "multiple choice", "<answer>B</answer>", "x", ("A. up", "B. left"))
COUNT = Sample(2, "How many?", "image", "numerical", "<answer>1</answer>", "x")


def clip_prompts(processor: Any) -> list[Prompt]:
    """A clip, the clip shuffled, an image, and the clip's frames at times of more than the trained size."""
    builder = PromptBuilder(processor)
    frames = torch.from_numpy(moving_square(8, 56, 84)).permute(0, 3, 1, 2).contiguous()
    times = torch.arange(8, dtype=torch.float64) / 2
    clip = Media(frames, times, 4.0, "video")
    return [
        builder.build(QUESTION, clip),
        builder.build(QUESTION, clip, torch.tensor([2, 0, 3, 1, 7, 6, 5, 4])),
        builder.build(COUNT, Media(frames[3:4], times[:1], 0.0, "image")),
        builder.build(QUESTION, Media(frames, times * 2.8, 11.2, "video")),
    ]


def differences(model: Any, prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]]) -> Tensor:
    """|log π_trainer − log π_sampler| of every completion token."""
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    with torch.no_grad():
        scored = group_logprobs(model, prompts, completions).logprobs
    return (scored - torch.cat([rollout.logprobs for group in groups for rollout in group])).abs()


def change(model: torch.nn.Module, size: float = 0.05) -> None:
    """As an update does, only larger."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * size * parameter.std(unbiased=False))
