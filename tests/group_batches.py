"""Prompts of the model families by hand, and the expanded batch: the group as transformers runs it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import has_timestamps, tiny_model, tiny_tokenizer
from torch import Tensor

from video_r1.data.decoding.media import Media
from video_r1.data.prompts import Prompt

TOKENIZER = tiny_tokenizer()
SPECIAL: list[int] = TOKENIZER.convert_tokens_to_ids(  # pyright: ignore[reportAssignmentType]
    [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
)
VISION_START, VISION_END, IMAGE, VIDEO = SPECIAL
TEXT = 300  # ids below it are text


def build(family: str) -> Any:
    """A tiny model whose log-probabilities are of a usual size, about -6."""
    model = tiny_model(family, TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight /= 4
    return model


def visual(
    family: str, kind: str, grid: tuple[int, int, int], seconds: float = 1.0
) -> tuple[list[int], dict[str, Tensor]]:
    """Placeholder ids and features of one image or video of grid (time, height, width) in patches."""
    frames, height, width = grid
    patches = torch.randn(frames * height * width, 3 * 2 * (16 if has_timestamps(family) else 14) ** 2)
    tokens = height * width // 4
    if kind == "image":
        ids = [VISION_START, *[IMAGE] * tokens, VISION_END]
        return ids, {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}
    features = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}
    if has_timestamps(family):  # a text timestamp, then the frame
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
            ids += torch.randint(0, TEXT, (part,)).tolist()
            continue
        tokens, found = visual(family, *part)
        ids += tokens
        for name, value in found.items():
            features[name] = torch.cat([features[name], value]) if name in features else value
    tokens = torch.tensor(ids)
    features["mm_token_type_ids"] = torch.where(tokens == IMAGE, 1, torch.where(tokens == VIDEO, 2, 0))[None]
    frame = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    media = Media(frame, torch.zeros(1, dtype=torch.float64), 0.0, "image")
    return Prompt(tokens, features, (media,), None, [])


def tokens_of(*lengths: int) -> list[Tensor]:
    return [torch.randint(0, TEXT, (length,)) for length in lengths]


def expanded_logprobs(
    model: Any, prompt: Prompt, completions: list[Tensor], temperature: float
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
    kinds = torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0))
    logits = model(ids, attention_mask=mask, mm_token_type_ids=kinds, **features).logits
    scores = torch.log_softmax(logits[:, prompt_length - 1 : -1].float() / temperature, -1)
    chosen = scores.gather(2, ids[:, prompt_length:, None])[..., 0]
    entropy = -(scores.exp() * scores).sum(-1)
    kept = mask[:, prompt_length:].bool()
    return chosen[kept], entropy[kept]
