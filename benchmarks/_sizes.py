"""Models and questions of the benchmarks: Qwen2.5-VL with random weights in several shapes, random pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from video_r1.data.media import Media
from video_r1.data.prompts import Prompt

PATCH, MERGE, FRAMES_IN_PATCH = 14, 2, 2
VISION_START, VISION_END, VIDEO, IMAGE = 0, 1, 2, 3
FIRST_TEXT_ID = 4


@dataclass(frozen=True, slots=True)
class Size:
    """A model shape and its clips. `frame`: patches down and across; `text`: tokens around the clip."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_feed_forward: int
    frames: int
    frame: tuple[int, int]
    text: int
    tied: bool = True


SIZES = {
    "lab": Size(640, 128, 4, 4, 2, 384, 128, 2, 4, 256, frames=8, frame=(4, 4), text=50),
    "small": Size(4096, 384, 8, 6, 2, 1024, 256, 4, 4, 768, frames=16, frame=(16, 16), text=56),
    "300m": Size(16384, 1024, 24, 16, 4, 2816, 512, 8, 8, 1024, frames=8, frame=(8, 8), text=64),
    "3b": Size(151936, 2048, 36, 16, 2, 11008, 1280, 32, 16, 3420, frames=16, frame=(16, 32), text=100),
    "7b": Size(
        152064, 3584, 28, 28, 4, 18944, 1280, 32, 16, 3420, frames=16, frame=(16, 32), text=100, tied=False
    ),
}


def build_model(size: Size, device: torch.device, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights with seed 0."""
    head = size.hidden // size.heads
    sections = [head // 8, head * 3 // 16, head // 2 - head // 8 - head * 3 // 16]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": size.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "num_heads": size.vision_heads,
            "intermediate_size": size.vision_feed_forward,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [i for i in range(size.vision_layers) if i % 8 == 7] or [0],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=size.tied,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        video_token_id=VIDEO,
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return Qwen2_5_VLForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(default)


def question(size: Size, generator: torch.Generator) -> Prompt:
    """Half of the text, a clip of random pixels at 2 frames a second, the other half."""
    times, (down, across) = size.frames // FRAMES_IN_PATCH, size.frame
    pixels = torch.randn(times * down * across, 3 * FRAMES_IN_PATCH * PATCH**2, generator=generator)
    tokens = torch.full((times * down * across // MERGE**2,), VIDEO)
    before, after = (text(size, n, generator) for n in (size.text // 2, size.text - size.text // 2))
    ids = torch.cat([before, torch.tensor([VISION_START]), tokens, torch.tensor([VISION_END]), after])
    features = {
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[times, down, across]]),
        "second_per_grid_ts": torch.tensor([1.0]),
        "mm_token_type_ids": torch.where(ids == VIDEO, 2, 0)[None],
    }
    frame = torch.zeros(size.frames, 3, 2, 2, dtype=torch.uint8)
    media = Media(frame, torch.arange(size.frames).double() / 2, size.frames / 2, "video")
    return Prompt(ids, features, media, None, [])


def text(size: Size, length: int, generator: torch.Generator) -> Tensor:
    """[length] random ids of ordinary tokens."""
    return torch.randint(FIRST_TEXT_ID, size.vocabulary, (length,), generator=generator)
