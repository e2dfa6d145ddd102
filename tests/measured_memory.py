"""A small Qwen2.5-VL, a question for it, and the most bytes of tensors that live while some work is done."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from video_r1.data.decoding.media import Media
from video_r1.data.prompts import Prompt

VIDEO = 2
TEXT = 40
COMPLETIONS = [[torch.arange(100, 148) + g for g in range(8)]]


def model_of(hidden: int, layers: int, vocabulary: int) -> Any:
    head = 32
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": hidden // head,
            "num_key_value_heads": hidden // head // 2, "max_position_embeddings": 2048,
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 3, "hidden_size": hidden // 2, "num_heads": 2, "intermediate_size": hidden,
            "out_hidden_size": hidden, "fullatt_block_indexes": [2], "window_size": 112,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=True, vision_start_token_id=0, vision_end_token_id=1, video_token_id=VIDEO,
        image_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


NO_END = SimpleNamespace(
    get_vocab=dict, eos_token_id=None, batch_decode=lambda rows, skip_special_tokens: [""] * len(rows)
)


def question() -> Prompt:
    times, down, across = 4, 8, 8
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(4, 200, (TEXT,), generator=generator)
    visual = torch.full((times * down * across // 4,), VIDEO)
    ids = torch.cat([text[:20], torch.tensor([0]), visual, torch.tensor([1]), text[22:]])
    features = {
        "pixel_values_videos": torch.randn(times * down * across, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([[times, down, across]]),
        "second_per_grid_ts": torch.tensor([1.0]),
        "mm_token_type_ids": torch.where(ids == VIDEO, 2, 0)[None],
    }
    media = Media(torch.zeros(8, 3, 2, 2, dtype=torch.uint8), torch.arange(8).double() / 2, 4.0, "video")
    return Prompt(ids, features, (media,), None, [])


def most_at_once(work: Callable[[], object]) -> int:
    """Bytes of tensor memory beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    live = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak


def tensor_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
