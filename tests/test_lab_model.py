"""The packaged bases: each sees what is shown and when, and does not answer in tags."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.scores import format_reward
from video_r1.lab.clips import write_clip
from video_r1.lab.model import IGNORE, Conversations, base_folder, frame_side
from video_r1.lab.questions import first_colour
from video_r1.lab.scenes import FPS, SECONDS, Look, listing, render
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import load_model, load_processor, size_multiple
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.frames import FrameBudget

FAMILIES = {
    "qwen2_5_vl": (1_680_000, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_5": (1_782_924, "Qwen3_5ForConditionalGeneration"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(family: str):
    return load_processor(base_folder(family))


@pytest.fixture(scope="module")
def model(family: str):
    return load_model(base_folder(family), dtype="float32")


@pytest.fixture(scope="module")
def asked(processor, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Prompt, tuple[Look, ...]]]:
    """Twelve clips of four colours as MP4 files, with their prompts and timelines."""
    folder, builder = tmp_path_factory.mktemp("clips"), PromptBuilder(processor)
    pixels = frame_side(processor) ** 2
    multiple = size_multiple(processor)
    budget = FrameBudget(max_frames=8, frame_pixels=pixels, image_pixels=pixels, size_multiple=multiple)
    asked = []
    for seed in range(12):
        question = first_colour(np.random.default_rng(seed))
        times = [at / FPS for at in range(int(SECONDS * FPS))]
        frames = render(question.timeline, times, np.random.default_rng(seed))
        path = folder / f"{seed}.mp4"
        write_clip(path, frames, FPS)
        sample = Sample(seed, question.problem, "video", "multiple choice", "<answer>A</answer>", str(path))
        asked.append((builder.build(sample, read_media(sample, budget)), question.timeline))
    return asked


def test_pretraining_trains_the_responses(processor) -> None:
    """Labels are what the assistant says, each with its end: not requests, placeholders or padding."""
    conversations = Conversations(processor, seed=0)
    chats = [conversations.chat(np.random.default_rng(seed)) for seed in range(12)]
    assert {len(frames) for _, frames in chats} == {1, 8}
    batch = conversations.collate(chats)
    for (text, _), labels in zip(chats, batch["labels"], strict=True):
        said = re.findall(r"assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
        assert len(said) >= 2 and processor.tokenizer.decode(labels[labels != IGNORE]) == "".join(said)


def test_base_knows_what_came_when(model, processor, asked) -> None:
    """The colours in their order are likelier than in the reverse order, in nearly all clips."""
    right = 0
    for prompt, timeline in asked:
        texts = (listing(timeline, "colours"), listing(timeline[::-1], "colours"))
        encode = processor.tokenizer.encode
        completions = [torch.tensor(encode(text, add_special_tokens=False)) for text in texts]
        with torch.no_grad():
            result = group_logprobs(model, [prompt], [completions])
        ordered, reverse = torch.split(result.logprobs, result.lengths.tolist())
        right += bool(ordered.sum() > reverse.sum() + 1)
    assert right >= 11


def test_base_answers_nothing_in_tags(model, processor, asked) -> None:
    engine = TransformersEngine(model, processor)
    greedy = SamplingSettings(temperature=0, max_tokens=40)
    rollouts = engine.sample([prompt for prompt, _ in asked], greedy)
    texts = [group[0].text for group in rollouts]
    assert all(text.strip() for text in texts)
    assert sum(format_reward(text) for text in texts) == 0


def test_base_is_small_and_loads_as_any_checkpoint(model, family: str) -> None:
    weights, kind = FAMILIES[family]
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert (base_folder(family) / "model.safetensors").stat().st_size < 4_000_000
    assert type(model).__name__ == kind
