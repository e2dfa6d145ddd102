"""Prompts for the tests of vLLM, and what the trainer's model says of their completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import moving_square
from torch import Tensor

from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample, load_manifest
from video_r1.data.prompts import Prompt, PromptBuilder, shuffled_order
from video_r1.data.rollouts import Rollout
from video_r1.lab.clips import write_lab
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import add_lora, size_multiple
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import FrameBudget

Rounding = tuple[float, float]
QUESTION = Sample(1, "Whither?", "video", "multiple choice", "<answer>B</answer>", "x", ("A. up", "B. left"))
COUNT = Sample(2, "How many?", "image", "numerical", "<answer>1</answer>", "x")


def clip_prompts(processor: Any) -> list[Prompt]:
    """A clip, the clip shuffled, an image, and the clip's frames at times of more than the trained size."""
    builder, side = PromptBuilder(processor), size_multiple(processor)
    frames = torch.from_numpy(moving_square(8, 2 * side, 3 * side)).permute(0, 3, 1, 2).contiguous()
    times = torch.arange(8, dtype=torch.float64) / 2
    clip = Media(frames, times, 4.0, "video")
    return [
        builder.build(QUESTION, clip),
        builder.build(QUESTION, clip, torch.tensor([2, 0, 3, 1, 7, 6, 5, 4])),
        builder.build(COUNT, Media(frames[3:4], times[:1], 0.0, "image")),
        builder.build(QUESTION, Media(frames, times * 2.8, 11.2, "video")),
    ]


def several_prompts(processor: Any) -> list[Prompt]:
    """Two clips of different sizes, the second of one time step; the first in another order; three images."""
    builder, side, clip = (
        PromptBuilder(processor),
        size_multiple(processor),
        clip_prompts(processor)[0].media[0],
    )
    times = torch.arange(2, dtype=torch.float64) / 3
    frames = torch.from_numpy(moving_square(2, 3 * side, 2 * side)).permute(0, 3, 1, 2).contiguous()
    clips = [clip, Media(frames, times, 0.6, "video")]
    question = replace(QUESTION, problem="Is <video> as <video>?", more_paths=("y",))
    images = [Media(frames[:1, :, : side * (place + 1)], times[:1], 0.0, "image") for place in range(3)]
    return [
        builder.build(question, clips),
        builder.build(question, clips, torch.tensor([2, 0, 3, 1, 7, 6, 5, 4, 8, 9])),
        builder.build(replace(COUNT, more_paths=("y", "z")), images),
    ]


def rare_prompts(processor: Any) -> list[Prompt]:
    """A clip of one time step, one whose frames are all the same, and a question without frames."""
    builder, clip = PromptBuilder(processor), clip_prompts(processor)[0].media[0]
    return [
        builder.build(QUESTION, Media(clip.frames[:2], clip.timestamps[:2], 1.0, "video")),
        builder.build(QUESTION, clip, torch.full((8,), 3), "frozen"),
        builder.build(QUESTION, clip, torch.tensor([], dtype=torch.long), "blind"),
    ]


def differences(model: Any, prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]]) -> Tensor:
    """|log π_trainer − log π_sampler| of every completion token."""
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    with torch.no_grad():
        scored = group_logprobs(model, prompts, completions).logprobs.cpu()
    return (scored - torch.cat([rollout.logprobs for group in groups for rollout in group])).abs()


def change(model: torch.nn.Module, size: float = 0.05) -> None:
    """As an update does, only larger."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * size * parameter.std(unbiased=False))


def check_weight_sync(
    engine: RolloutEngine,
    model: Any,
    prompts: Sequence[Prompt],
    peft: bool,
    rounding: Rounding = (1e-4, 1e-3),
) -> None:
    """The engine, which has the model's weights, samples from them, from stale ones after a change, and from
    the changed ones after a weight sync: all weights twice (the second can fail where the first did not), or
    those of an adapter once. rounding: of log-probs, the mean and the largest."""
    settings = SamplingSettings(n=4, max_tokens=24, seed=1)
    same = differences(model, prompts, engine.sample(prompts, settings))
    assert same.mean() < rounding[0] and same.max() < rounding[1]
    for _ in range(1 if peft else 2):
        if peft:
            model = add_lora(model, rank=4, alpha=8)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
        else:
            change(model, 0.1)
        stale = differences(model, prompts, engine.sample(prompts, settings))
        assert stale.mean() > 0.02 and stale.max() > 0.3
        engine.update_weights(model)
        fresh = differences(model, prompts, engine.sample(prompts, settings))
        assert fresh.mean() < rounding[0] and fresh.max() < rounding[1]


def ids(groups: Sequence[Sequence[Rollout]]) -> list[list[list[int]]]:
    return [[rollout.token_ids.tolist() for rollout in group] for group in groups]


def lab_prompts(folder: Path, processor: Any, count: int = 50) -> list[Prompt]:
    """Lab questions about clips and pictures, every other clip's frames shuffled."""
    write_lab(LabSettings(folder=str(folder), train=0, test=count, workers=1))
    builder, budget = PromptBuilder(processor), FrameBudget(frame_pixels=56 * 56, image_pixels=56 * 56)
    prompts = []
    for number, sample in enumerate(load_manifest(folder / "test.json")):
        media = read_media(sample, budget)
        shuffled = media.kind == "video" and number % 2
        generator = torch.Generator().manual_seed(number)
        order = shuffled_order(len(media.frames), generator) if shuffled else None
        prompts.append(builder.build(sample, media, order))
    return prompts
