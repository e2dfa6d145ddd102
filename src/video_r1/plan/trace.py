"""Bytes of one update and of one prefill, counted without making the tensors (fake_trace.py).

Both run through the model's own transformers code and this project's head.

A known family runs its vision tower too, with windows and positions computed beforehand from the grid.
On the general path (models/general_forward.py) a row is a prompt and a completion, all rows live until the
backward pass, and the processor says how many tokens a clip has. The towers differ, so they are counted: a
layer keeps 17 numbers a patch and hidden unit (arXiv 2205.05198, equation 2, without attention scores, which
kernels do not keep).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.errors import ConfigError
from video_r1.models.families import family_of, text_of, tower_of, vision_parameters
from video_r1.models.general_forward import micro_batches
from video_r1.models.group_forward import vision_language_model
from video_r1.models.head import CHUNK_LOGITS, token_logprobs
from video_r1.models.loading import size_multiple
from video_r1.plan.fake_trace import Policy, Row, Traced, Tracing, cached_bytes, without_storage
from video_r1.recipe import Recipe
from video_r1.settings.shared import PromptSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings

NUMBERS_KEPT = 17  # by a tower's layer, for each patch and hidden unit
QUESTION = Sample("plan", "?", "video", "free-form", "", "")


def trace(config: PreTrainedConfig, policy: Policy, row: Row, prefill: Row | None) -> Traced:
    """Count the bytes of one update on `row` and of the prefill of the prompts in `prefill`."""
    indices = _vision_indices(config, row), _vision_indices(config, prefill) if prefill else {}
    with without_storage(config, policy) as tracing:
        update_indices, prefill_indices = (
            {k: tracing.mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in found.items()}
            for found in indices
        )
        if prefill is not None:
            tracing.prefill(lambda: _prefill(tracing.model, prefill, prefill_indices))
        tracing.updates(lambda: _update(tracing, row, update_indices))
    return tracing.traced


def trace_general(config: Any, policy: Policy, row: Row, sampled: int) -> Traced:
    """Count the bytes of one update on `row` and of the prefill of `sampled` rows with one prompt.

    Activations of the tower are added to those of the text model.
    """
    with without_storage(config, policy) as tracing:
        model = tracing.model
        if sampled:
            tracing.prefill(
                lambda: _fill_cache(
                    vision_language_model(model),
                    input_ids=torch.zeros(sampled, row.prompt, dtype=torch.long),
                )
            )
        tracing.updates(lambda: _update_general(tracing, row))
    traced, tower = tracing.traced, _tower_bytes(model, config, policy, row)
    traced.activations += tower
    traced.update_peak += tower
    traced.prefill_peak += _layer_bytes(config, policy, row) * bool(sampled)
    return traced


def family_row(config: Any, recipe: Recipe, training: TGRPOSettings | SFTSettings, text_tokens: int) -> Row:
    """Return the longest row that the settings allow: of an image or a video, whichever has more tokens.

    Raises ConfigError if the frames alone exceed max_prompt_length.
    """
    vision, frames = config.vision_config, recipe.section(PromptSettings)
    side = vision.patch_size * vision.spatial_merge_size
    times = max(1, frames.max_frames // vision.temporal_patch_size)
    video, image = times * (frames.frame_pixels // side**2), frames.image_pixels // side**2
    squares = video // times if video >= image else image
    grid = times if video >= image else 1, vision.spatial_merge_size, vision.spatial_merge_size * squares
    visual = max(video, image)
    _check_prompt(visual, frames, "max_frames, frame_pixels or image_pixels")
    timestamps = family_of(config).timestamp_tokens * grid[0]
    prompt = min(visual + timestamps + text_tokens, frames.max_prompt_length)
    return Row(training.per_device_train_batch_size, grid, visual, prompt, *_completions(training))


def general_row(
    config: Any, recipe: Recipe, training: TGRPOSettings | SFTSettings, text_tokens: int, processor: Any
) -> Row:
    """Return the longest row of a clip or an image, as the processor makes it. Raises ConfigError."""
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
    _check_prompt(visual, frames, "max_frames")
    return Row(
        training.per_device_train_batch_size, (1, 1, 1), visual,
        min(visual + text_tokens, frames.max_prompt_length), *_completions(training),
        patches=_patches(config.vision_config, longest), repeated=True,
    )  # fmt: skip


def _check_prompt(visual: int, frames: PromptSettings, lower: str) -> None:
    if visual >= frames.max_prompt_length:
        raise ConfigError(
            f"the frames of a clip are {visual} tokens, which max_prompt_length ({frames.max_prompt_length}) "
            f"does not allow; lower {lower}, or raise max_prompt_length"
        )


def _completions(training: TGRPOSettings | SFTSettings) -> tuple[int, int]:
    """Return the completions of a question and the most tokens of each."""
    if isinstance(training, TGRPOSettings):
        return training.num_generations, training.max_completion_length
    return 1, training.max_response_length


def _patches(vision: Any, prompt: Prompt) -> int:
    """Return the patches of all frames of a prompt, as its tower counts them."""
    pixels = sum(value.numel() for name, value in prompt.features.items() if name.startswith("pixel_values"))
    sides = [vision.patch_size] if isinstance(vision.patch_size, int) else list(vision.patch_size)
    times = getattr(vision, "temporal_patch_size", 1)
    return pixels // (3 * sides[0] * sides[-1] * (times if isinstance(times, int) else times[0]))


def _update(tracing: Tracing, row: Row, indices: dict[str, Any]) -> None:
    traced, live, autocast, policy = tracing.traced, tracing.live, tracing.autocast, tracing.policy
    inner, judge = vision_language_model(tracing.model), vision_language_model(tracing.judge)
    features = None
    if policy.settings.freeze_vision_tower:
        with torch.no_grad(), autocast:
            features = _vision(inner, row, indices)
    start = live.live
    with autocast:
        states = _hidden(inner, row, features or _vision(inner, row, indices))
        before, most, live.peak = live.here, live.peak, live.here
        loss = _loss(inner, policy, row, states)
        traced.logits, live.peak = live.peak - before, max(live.peak, most)
    del states
    traced.activations = live.live - start
    if policy.reference:
        with torch.no_grad(), autocast:
            _loss(judge, policy, row, _hidden(judge, row, features or _vision(judge, row, indices)))
    loss.backward()


def _vision(model: Any, row: Row, indices: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the tower's output for all clips of a row, and DeepStack features if there are any."""
    vision = model.config.vision_config
    across = vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.empty(len(indices["position_ids"]), vision.in_channels * across)
    grid = torch.tensor([row.grid] * row.questions)
    tower = tower_of(model)
    output = tower(pixels.to(tower.dtype), grid, return_dict=True, **indices)
    return (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))


def _embeddings(model: Any, rows: int, tokens: int, features: tuple[Tensor, ...]) -> Tensor:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    embedded = model.get_input_embeddings()(ids)
    mask = (ids > 0)[..., None]
    return embedded.masked_scatter(mask, features[0].to(embedded.dtype))


def _hidden(model: Any, row: Row, features: tuple[Tensor, ...]) -> Tensor:
    """Return the last hidden states [1, tokens, d]. DeepStack features are kept and get a gradient."""
    states = text_of(model)(
        inputs_embeds=_embeddings(model, 1, row.tokens, features),
        position_ids=torch.zeros(3, 1, row.tokens, dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    for layer in features[1:]:
        states = states + 0 * layer.sum()
    return states


def _loss(model: Any, policy: Policy, row: Row, states: Tensor) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    head = model.get_output_embeddings()
    chosen = torch.zeros(row.questions * row.completions * row.completion, dtype=torch.long)
    chunk = CHUNK_LOGITS.get(policy.device_type, CHUNK_LOGITS["cuda"])
    rl = isinstance(policy.training, TGRPOSettings)  # with the entropy; SFT with the likeliest tokens
    return token_logprobs(head, states[0][chosen], chosen, 1.0, rl, vocabulary, chunk, not rl).logprobs.mean()


def _prefill(model: Any, row: Row, indices: dict[str, Any]) -> tuple[int, int]:
    """Run one forward of `row.questions` prompts with a cache; return the bytes of `cached_bytes`."""
    inner = vision_language_model(model)
    return _fill_cache(
        inner,
        inputs_embeds=_embeddings(inner, row.questions, row.prompt, _vision(inner, row, indices)),
        position_ids=torch.zeros(3, row.questions, row.prompt, dtype=torch.long),
    )


def _fill_cache(inner: Any, **inputs: Any) -> tuple[int, int]:
    text = text_of(inner)
    cache: Any = DynamicCache(config=text.config)
    states = text(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    inner.get_output_embeddings()(states[:, -1])
    return cached_bytes(cache)


def _vision_indices(config: Any, row: Row) -> dict[str, Any]:
    """Return what the tower computes from the grid's values: order, positions and lengths of the patches."""
    grid = torch.tensor([row.grid] * row.questions)
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patches = row.grid[1] * row.grid[2]
    found: dict[str, Any] = {
        "position_ids": get_vision_position_ids(grid, merge),
        "cu_seqlens": get_vision_cu_seqlens(grid),
        "max_seqlen": patches,
    }
    if family_of(config).windows:
        window = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
        found |= dict(zip(("window_index", "cu_window_seqlens"), window, strict=True))
        found["max_window_seqlen"] = patches
    if family_of(config).resampled_positions:
        side = int(vision.num_position_embeddings**0.5)
        taps = get_vision_interpolation_indices_and_weights(grid, side, spatial_merge_size=merge)
        found |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    return found


def _update_general(tracing: Tracing, row: Row) -> None:
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
    """Return a loss of all completions of the row's questions, in the micro-batches of an update."""
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


def _layer_bytes(config: Any, policy: Policy, row: Row) -> int:
    """Return the activations of one layer of the tower for one question."""
    size = (policy.autocast or policy.dtype).itemsize
    return NUMBERS_KEPT * size * row.patches * config.vision_config.hidden_size


def _tower_bytes(model: Any, config: Any, policy: Policy, row: Row) -> int:
    """Return the activations of the tower.

    Every layer keeps its own if the tower trains, one layer if it is frozen. With gradient checkpointing one
    layer and the inputs of all are kept.
    """
    layer, layers = _layer_bytes(config, policy, row), tower_depth(config)
    if not any(weight.requires_grad for weight in vision_parameters(vision_language_model(model))):
        return layer
    if policy.training.gradient_checkpointing:
        return row.questions * layers * layer // NUMBERS_KEPT + layer
    return row.questions * layers * layer


def tower_depth(config: Any) -> int:
    vision = config.vision_config
    return int(getattr(vision, "depth", None) or vision.num_hidden_layers)
