"""The tensors of one update and of one prefill of a known family, counted without making them.

Both are run through the model's own transformers code and this project's head (without_storage.py). The
pixels' way into windows and positions is computed beforehand from the grid.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from video_r1.models.families import family_of, text_of, tower_of
from video_r1.models.group_forward import vision_language_model
from video_r1.models.head import CHUNK_LOGITS, token_logprobs
from video_r1.plan.without_storage import Policy, Row, Traced, Tracing, cached_bytes, without_storage
from video_r1.settings.training import TGRPOSettings


def trace(config: PreTrainedConfig, policy: Policy, row: Row, prefill: Row | None) -> Traced:
    """The memory of one update on `row` and, if there is one, of the prefill of the prompts in `prefill`."""
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
    """The tower's output for all clips of a row, and DeepStack features where there are some."""
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
    """The last hidden states [1, tokens, d]. DeepStack features are held and get a gradient."""
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
    """One forward of `row.questions` prompts with a cache. Returns the bytes of its keys and values, in the
    format that computes, and of its recurrent states."""
    inner = vision_language_model(model)
    cache: Any = DynamicCache(config=text_of(inner).config)
    states = text_of(inner)(
        inputs_embeds=_embeddings(inner, row.questions, row.prompt, _vision(inner, row, indices)),
        position_ids=torch.zeros(3, row.questions, row.prompt, dtype=torch.long),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    inner.get_output_embeddings()(states[:, -1])
    return cached_bytes(cache)


def _vision_indices(config: Any, row: Row) -> dict[str, Any]:
    """What the tower computes from the grid's values: order, positions and lengths of the patches."""
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
