"""The plan of a model that takes the general path (models/general_forward.py).

The text model is traced without storage on rows of prompt and completion, all of which live until the
backward pass. What a processor makes of a clip is asked of the processor. Towers, whose code differs, are
counted: activations of a layer are 17 numbers a patch and hidden unit (arXiv 2205.05198, equation 2, without
attention scores, which kernels do not keep).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.errors import ConfigError
from video_r1.models.families import text_of, vision_parameters
from video_r1.models.general_forward import micro_batches
from video_r1.models.group_forward import vision_language_model
from video_r1.models.head import CHUNK_LOGITS, token_logprobs
from video_r1.models.loading import size_multiple
from video_r1.plan.sharding import Sharding
from video_r1.plan.without_storage import Policy, Row, Traced, Tracing, cached_bytes, without_storage
from video_r1.recipe import Recipe
from video_r1.settings.shared import ModelSettings, PromptSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings

OF_A_LAYER = 17  # numbers that a tower's layer keeps of a patch, for each hidden unit
QUESTION = Sample("plan", "?", "video", "free-form", "", "")


def check_general(config: Any, recipe: Recipe, sharding: Sharding) -> None:
    """Raises ConfigError for what a run refuses: see docs/models.md."""
    refused = {
        "use_vllm": bool(recipe.values().get("use_vllm")),
        "load_in_4bit": recipe.section(ModelSettings).load_in_4bit,
        f"weights shared out ({sharding.name})": sharding.weights,
    }
    found = [name for name, asked in refused.items() if asked]
    if found:
        raise ConfigError(
            f"{config.model_type} takes the general path, which does not work with {', '.join(found)} "
            "(docs/models.md)"
        )


def general_row(
    config: Any, recipe: Recipe, training: TGRPOSettings | SFTSettings, text_tokens: int, processor: Any
) -> Row:
    """The longest prompt that the frames make, of a clip or an image. Raises ConfigError."""
    if processor is None:
        raise ConfigError(
            f"a plan of {config.model_type} asks its processor how many tokens a clip has: name a folder "
            "with its files too in model_name_or_path or --model_config"
        )
    frames = recipe.section(PromptSettings)
    builder = PromptBuilder(processor, max_prompt_length=2**30)
    multiple = size_multiple(processor)

    def built(count: int, pixels: int) -> Prompt:
        side = max(1, math.isqrt(pixels) // multiple) * multiple
        kind = "video" if count > 1 else "image"
        times = torch.arange(count, dtype=torch.float64)
        clip = Media(torch.zeros(count, 3, side, side, dtype=torch.uint8), times, float(count), kind)
        return builder.build(QUESTION, clip)

    shown = [built(frames.max_frames, frames.frame_pixels), built(1, frames.image_pixels)]
    longest = max(shown, key=lambda prompt: len(prompt.input_ids))
    blind = builder.build(QUESTION, longest.media, torch.empty(0, dtype=torch.long), "blind")
    visual = len(longest.input_ids) - len(blind.input_ids)
    if visual >= frames.max_prompt_length:
        raise ConfigError(
            f"the frames of a clip are {visual} tokens, which max_prompt_length ({frames.max_prompt_length}) "
            "does not allow; lower max_frames, or raise max_prompt_length"
        )
    completions, completion = (
        (training.num_generations, training.max_completion_length)
        if isinstance(training, TGRPOSettings)
        else (1, training.max_response_length)
    )
    return Row(
        training.per_device_train_batch_size, (1, 1, 1), visual,
        min(visual + text_tokens, frames.max_prompt_length), completions, completion,
        patches=_patches(config.vision_config, longest), repeated=True,
    )  # fmt: skip


def _patches(vision: Any, prompt: Prompt) -> int:
    """Of all frames of a prompt, as its tower counts them."""
    pixels = sum(value.numel() for name, value in prompt.features.items() if name.startswith("pixel_values"))
    sides = [vision.patch_size] if isinstance(vision.patch_size, int) else list(vision.patch_size)
    times = getattr(vision, "temporal_patch_size", 1)
    return pixels // (3 * sides[0] * sides[-1] * (times if isinstance(times, int) else times[0]))


def trace_general(config: Any, policy: Policy, row: Row, sampled: int) -> Traced:
    """The memory of an update on `row` and, where completions are sampled, of the prefill of `sampled` rows
    with one prompt. A tower's activations are added to those of the text.
    """
    with without_storage(config, policy) as tracing:
        model = tracing.model
        if sampled:
            tracing.prefill(lambda: _prefill(model, row, sampled))
        tracing.updates(lambda: _update(tracing, row))
    traced, tower = tracing.traced, _tower_bytes(model, config, policy, row)
    traced.activations += tower
    traced.update_peak += tower
    traced.prefill_peak += _layer_bytes(config, policy, row) * bool(sampled)
    return traced


def _update(tracing: Tracing, row: Row) -> None:
    live, policy = tracing.live, tracing.policy
    start = live.live
    with tracing.autocast:
        loss = _scores(tracing.model, policy, row)
    tracing.traced.activations = live.live - start
    if policy.reference:
        with torch.no_grad(), tracing.autocast:
            _scores(tracing.judge, policy, row)
    loss.backward()


def _scores(model: Any, policy: Policy, row: Row) -> Any:
    """A loss of all completions of the row's questions, in micro-batches as an update has them."""
    inner = vision_language_model(model)
    text, head = text_of(inner), inner.get_output_embeddings()
    vocabulary = head.weight.shape[0]
    chunk = CHUNK_LOGITS.get(policy.device_type, CHUNK_LOGITS["cuda"])
    rl = isinstance(policy.training, TGRPOSettings)
    total: Any = 0
    for rows in list(micro_batches(row.prompt, [row.completion] * row.completions)) * row.questions:
        ids = torch.zeros(len(rows), row.prompt + row.completion - 1, dtype=torch.long)
        states = text(input_ids=ids, use_cache=False).last_hidden_state
        logits = head(states[:, row.prompt - 1 :]).flatten(0, 1)
        targets = torch.zeros(len(logits), dtype=torch.long)
        flags = (rl, vocabulary, chunk, not rl)
        total = total + token_logprobs(nn.Identity(), logits, targets, 1.0, *flags).logprobs.mean()
    return total


def _prefill(model: Any, row: Row, rows: int) -> tuple[int, int]:
    inner = vision_language_model(model)
    text = text_of(inner)
    cache: Any = DynamicCache(config=text.config)
    ids = torch.zeros(rows, row.prompt, dtype=torch.long)
    states = text(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    inner.get_output_embeddings()(states[:, -1])
    return cached_bytes(cache)


def _layer_bytes(config: Any, policy: Policy, row: Row) -> int:
    """Activations of one layer of the tower, for one question."""
    size = (policy.autocast or policy.dtype).itemsize
    return OF_A_LAYER * size * row.patches * config.vision_config.hidden_size


def _tower_bytes(model: Any, config: Any, policy: Policy, row: Row) -> int:
    """Activations of the tower: of every layer where it trains, of one layer where it is frozen, and with
    gradient checkpointing of one and of what goes into each.
    """
    layer, layers = _layer_bytes(config, policy, row), tower_depth(config)
    if not any(weight.requires_grad for weight in vision_parameters(vision_language_model(model))):
        return layer
    if policy.training.gradient_checkpointing:
        return row.questions * layers * layer // OF_A_LAYER + layer
    return row.questions * layers * layer


def tower_depth(config: Any) -> int:
    vision = config.vision_config
    return int(getattr(vision, "depth", None) or vision.num_hidden_layers)
