"""The group in one row against the expanded batch: every completion alone behind its own copy of the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from video_r1.data.media import Media
from video_r1.data.prompts import Prompt
from video_r1.models.group_forward import group_logprobs

torch.set_num_threads(1)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VISION_START, VISION_END, IMAGE, VIDEO = 90, 91, 92, 93
PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of the real architecture: 3 layers, 2 key and 4 query heads, weights large enough to matter."""
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": PATCH[family], "initializer_range": 0.1}
    if family == "qwen2_vl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        config: Any = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    elif family == "qwen2_5_vl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision |= {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "tokens_per_second": 2,
        }
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    else:
        text |= {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        text["rope_parameters"]["mrope_section"] = [2, 1, 1]
        vision |= {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def visual(family: str, kind: str, grid: tuple[int, int, int], seconds: float = 1.0) -> tuple[list[int], dict]:
    """Placeholder ids and features of one image or video of grid (time, height, width) in patches."""
    frames, height, width = grid
    patches = torch.randn(frames * height * width, 3 * 2 * PATCH[family] ** 2)
    tokens = height * width // 4
    if kind == "image":
        ids = [VISION_START, *[IMAGE] * tokens, VISION_END]
        return ids, {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}
    features = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}
    if family == "qwen3_vl":  # a text timestamp, then the frame
        ids = [x for t in range(frames) for x in (10 + t, VISION_START, *[VIDEO] * tokens, VISION_END)]
    else:
        ids = [VISION_START, *[VIDEO] * (frames * tokens), VISION_END]
    if family == "qwen2_5_vl":
        features["second_per_grid_ts"] = torch.tensor([seconds])
    return ids, features


def make_prompt(family: str, *parts: int | tuple) -> Prompt:
    """A prompt of text (an int: that many random tokens) and visuals (arguments of `visual`), in order."""
    ids: list[int] = []
    features: dict[str, Tensor] = {}
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 90, (part,)).tolist()
            continue
        tokens, found = visual(family, *part)
        ids += tokens
        for name, value in found.items():
            features[name] = torch.cat([features[name], value]) if name in features else value
    tokens = torch.tensor(ids)
    features["mm_token_type_ids"] = ((tokens == IMAGE) + 2 * (tokens == VIDEO)).int()[None]
    media = Media(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.float64), 0.0, "image")
    return Prompt(tokens, features, media, None, [])


def tokens_of(*lengths: int) -> list[Tensor]:
    return [torch.randint(0, 90, (length,)) for length in lengths]


def expanded_logprobs(
    model: PreTrainedModel, prompt: Prompt, completions: list[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] by the model's own forward on the group as a right-padded batch."""
    groups, prompt_length = len(completions), len(prompt.input_ids)
    longest = max(len(tokens) for tokens in completions)
    ids = torch.zeros(groups, prompt_length + longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(completions):
        sequence = torch.cat([prompt.input_ids, tokens])
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    features = {
        name: value.repeat(groups, *[1] * (value.ndim - 1))
        for name, value in prompt.features.items()
        if name != "mm_token_type_ids"
    }
    kinds = (ids == IMAGE) + 2 * (ids == VIDEO)
    logits = model(ids, attention_mask=mask, mm_token_type_ids=kinds.int(), **features).logits
    scores = torch.log_softmax(logits[:, prompt_length - 1 : -1].float() / temperature, -1)
    chosen = scores.gather(2, ids[:, prompt_length:, None])[..., 0]
    entropy = -(scores.exp() * scores).sum(-1)
    kept = mask[:, prompt_length:].bool()
    return chosen[kept], entropy[kept]


def gradients(model: torch.nn.Module, logprobs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], reference: dict[str, Tensor], relative: float = 1e-4) -> None:
    assert ours.keys() == reference.keys()
    largest = max(float(g.norm()) for g in reference.values())
    for name, expected in reference.items():
        error = float((ours[name] - expected).norm())
        assert error <= relative * float(expected.norm()) + 1e-7 * largest, name


VIDEO_A = ("video", (3, 4, 4))
VIDEO_B = ("video", (2, 2, 6))
IMAGE_A = ("image", (1, 4, 6))
BATCHES = {
    "video, ragged": [((5, VIDEO_A, 7), (4, 1, 9, 3))],
    "group of one": [((3, VIDEO_A, 2), (6,))],
    "image": [((2, IMAGE_A, 4), (5, 5, 5))],
    "text only": [((11,), (3, 6))],
    "several groups, videos, images and text mixed": [
        ((5, VIDEO_A, 7), (4, 8)),
        ((2, IMAGE_A, 3), (7, 2, 5)),
        ((9,), (3,)),
        ((1, VIDEO_B, 6), (1, 1, 12)),
    ],
    "image and video in one prompt": [((2, VIDEO_B, 3, IMAGE_A, 1, VIDEO_A, 2), (4, 6, 2))],
    "short prompt, long completions of several buckets": [((2, IMAGE_A, 1), (70, 3, 140, 66, 1, 64, 65))],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", BATCHES)
def test_equals_the_expanded_batch(family: str, case: str) -> None:
    model = tiny_model(family)
    prompts = [make_prompt(family, *parts) for parts, _ in BATCHES[case]]
    completions = [tokens_of(*lengths) for _, lengths in BATCHES[case]]
    reference = [expanded_logprobs(model, p, c, 0.7) for p, c in zip(prompts, completions, strict=True)]
    expected = torch.cat([logprobs for logprobs, _ in reference])
    weights = torch.randn(len(expected))
    expected_gradients = gradients(model, expected, weights)

    result = group_logprobs(model, prompts, completions, temperature=0.7, with_entropy=True)

    assert result.lengths.tolist() == [len(tokens) for group in completions for tokens in group]
    torch.testing.assert_close(result.logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.entropy, torch.cat([e for _, e in reference]), atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, result.logprobs, weights), expected_gradients)
