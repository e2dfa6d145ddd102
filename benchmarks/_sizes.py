"""Models and questions of the benchmarks: random weights in several shapes, random pixels."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from benchmarks._command import benchmark_parser
from video_r1.data.decoding.media import Media
from video_r1.data.prompts import Prompt

FAMILIES = ("qwen2_5_vl", "qwen3_5")
PATCH, LATER_PATCH = 14, 16  # pixels: Qwen2.5-VL, Qwen3.5
MERGE, FRAMES_IN_PATCH = 2, 2
TIMESTAMP = 4  # tokens of text before each temporal patch of Qwen3.5, taken from those around the clip
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


def group_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark of a group: model, completions, rounds and device."""
    parser = benchmark_parser(about)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def build_model(size: Size, device: torch.device, dtype: torch.dtype, family: str = "qwen2_5_vl") -> Any:
    """Random weights with seed 0."""
    kind, config = {
        "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, qwen2_5_vl),
        "qwen3_5": (Qwen3_5ForConditionalGeneration, qwen3_5),
    }[family]
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = kind(config(size))
        finally:
            torch.set_default_dtype(default)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):  # states that fade slowly: with the first values, transformers' own rule,
            weight.data.uniform_(0.01, 2).log_()  # which adds up logarithms in float32, is off by 3e-3
    return model


def qwen2_5_vl(size: Size) -> PreTrainedConfig:
    head = size.hidden // size.heads
    sections = [head // 8, head * 3 // 16, head // 2 - head // 8 - head * 3 // 16]
    return Qwen2_5_VLConfig(
        text_config=text_settings(size)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}},
        vision_config=vision_settings(size)
        | {
            "fullatt_block_indexes": [i for i in range(size.vision_layers) if i % 8 == 7] or [0],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        **settings(size),
    )


def qwen3_5(size: Size) -> PreTrainedConfig:
    """Three of four layers with a state, whose heads are as wide as those of attention."""
    head = size.hidden // size.heads
    third = head // 8 // 3
    rope = {"mrope_interleaved": True, "mrope_section": [head // 8 - 2 * third, third, third]}
    return Qwen3_5Config(
        text_config=text_settings(size)
        | {
            "head_dim": head,
            "linear_num_key_heads": size.heads // 2,
            "linear_num_value_heads": size.heads,
            "linear_key_head_dim": head,
            "linear_value_head_dim": head,
            "rope_parameters": rope
            | {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        },
        vision_config=vision_settings(size) | {"num_position_embeddings": 2304},
        **settings(size),
    )


def vision_settings(size: Size) -> dict[str, Any]:
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "num_heads": size.vision_heads,
        "intermediate_size": size.vision_feed_forward,
        "out_hidden_size": size.hidden,
    }


def text_settings(size: Size) -> dict[str, Any]:
    return {
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
    }


def settings(size: Size) -> dict[str, Any]:
    return {
        "tie_word_embeddings": size.tied,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "video_token_id": VIDEO,
        "image_token_id": IMAGE,
    }


def question(size: Size, generator: torch.Generator, family: str = "qwen2_5_vl") -> Prompt:
    """Half of the text, a clip of random pixels at 2 frames a second, the other half."""
    times, (down, across) = size.frames // FRAMES_IN_PATCH, size.frame
    side = PATCH if family == "qwen2_5_vl" else LATER_PATCH
    pixels = torch.randn(times * down * across, 3 * FRAMES_IN_PATCH * side**2, generator=generator)
    start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
    of_a_time = torch.full((down * across // MERGE**2,), VIDEO)
    words, clip = size.text, torch.cat([start, of_a_time.repeat(times), end])
    features = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[times, down, across]])}
    if family == "qwen2_5_vl":
        features["second_per_grid_ts"] = torch.tensor([1.0])
    else:
        marked = [(text(size, TIMESTAMP, generator), start, of_a_time, end) for _ in range(times)]
        clip = torch.cat([part for parts in marked for part in parts])
        words = max(2, words + 2 - times * (TIMESTAMP + 2))
    before, after = (text(size, n, generator) for n in (words // 2, words - words // 2))
    ids = torch.cat([before, clip, after])
    features["mm_token_type_ids"] = torch.where(ids == VIDEO, 2, 0)[None]
    frame = torch.zeros(size.frames, 3, 2, 2, dtype=torch.uint8)
    media = Media(frame, torch.arange(size.frames).double() / 2, size.frames / 2, "video")
    return Prompt(ids, features, (media,), None, [])


def text(size: Size, length: int, generator: torch.Generator) -> Tensor:
    """[length] random ids of ordinary tokens."""
    return torch.randint(FIRST_TEXT_ID, size.vocabulary, (length,), generator=generator)
