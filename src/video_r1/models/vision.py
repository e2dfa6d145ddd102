"""The vision tower in few calls: one attention call a layer, patches embedded by a matrix product, no syncs.

transformers calls attention once for every window of every frame (1,824 times for a clip of 16 frames in
Qwen2.5-VL), embeds patches by Conv3d, and reads lengths back from the device in each layer. Here the grids
stay on the CPU; indices and lengths are computed there and copied to the device. Values and gradients equal
those of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from video_r1.models.attention import replaced
from video_r1.models.checked import Checked
from video_r1.models.families import Family, family_of, tower_of

IMPLEMENTATION = "video_r1_vision_flash"
"""Name of the attention. transformers passes all segments at once only to names that contain "flash"."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Parts of a row of S patches that attend only to themselves: frames, or windows of frames."""

    starts: Tensor  # [count + 1] int32, on the device
    longest: int  # patches
    buckets: tuple[tuple[int, int], ...]  # (segments, patches of each) for every length, in the row's order
    order: Tensor | None  # [S] int64, on the device: puts equal lengths side by side; None if they are so
    back: Tensor | None  # its inverse

    @classmethod
    def of(cls, starts: Tensor, device: torch.device) -> Segments:
        """Build segments from their starts [count + 1], int32 on the CPU."""
        lengths, order, back = starts.diff(), None, None
        if len(lengths.unique_consecutive()) > len(lengths.unique()):  # equal lengths are not adjacent
            order = torch.argsort(lengths.repeat_interleave(lengths), stable=True)
            back = torch.argsort(order).to(device)
            order, lengths = order.to(device), lengths.sort().values
        kinds, counts = lengths.unique_consecutive(return_counts=True)
        buckets = tuple(zip(counts.tolist(), kinds.tolist(), strict=True))
        return cls(starts.to(device), int(kinds.max()), buckets, order, back)


def _as_product(patches: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Embed patches [patches, channels, time, height, width] -> [patches, d, 1, 1, 1]: a Conv3d whose kernel
    covers its whole input, as a matrix product.
    """
    return F.linear(patches.flatten(1), weight.flatten(1), bias)[..., None, None, None]


patch_projection = Checked("the patch embedding as a matrix product", _as_product, F.conv3d)


def encode_visuals(model: Any, pixels: Tensor, grids: Tensor) -> Any:
    """Return the inner model's `get_image_features` of images and videos, computed in few calls.

    model: transformers' model for conditional generation. pixels: [patches, values of a patch] on any device.
    grids: [visuals, 3] int64 on the CPU: time, height and width in patches.
    """
    visual = tower_of(model)
    projection = visual.patch_embed.proj
    device = projection.weight.device
    arguments: dict[str, Any] = {}
    with ExitStack() as changed:
        changed.enter_context(attending_in_segments(visual))
        if visual.config._attn_implementation == IMPLEMENTATION:
            arguments = tower_arguments(family_of(model), visual, grids, device)
        if type(projection) is nn.Conv3d and "forward" not in vars(projection):
            # In bf16 Conv3d is many times slower on GPUs, and some GPUs have no kernel for it.
            projection.forward = lambda input: patch_projection(input, projection.weight, projection.bias)
            changed.callback(delattr, projection, "forward")
        return model.model.get_image_features(pixels.to(device), grids, return_dict=True, **arguments)


@contextmanager
def attending_in_segments(visual: Any) -> Iterator[None]:
    """Let a tower with the default attention use `vision_attention` inside; another attention stays."""
    chosen = visual.config._attn_implementation
    with replaced(visual.config, "_attn_implementation", IMPLEMENTATION if chosen == "sdpa" else chosen):
        yield


def tower_arguments(family: Family, visual: Any, grids: Tensor, device: torch.device) -> dict[str, Any]:
    """Return the arguments that a family's tower would otherwise compute from the grids."""
    from transformers import vision_utils  # private: a release without it takes the general path

    merge = visual.spatial_merge_size
    frames = Segments.of(vision_utils.get_vision_cu_seqlens(grids), device)
    arguments: dict[str, Any] = {
        "position_ids": vision_utils.get_vision_position_ids(grids, merge).to(device),
        "cu_seqlens": frames.starts,
        "max_seqlen": frames.longest,
        "segments": [frames],
    }
    if family.windows:
        size = visual.window_size
        index, starts = vision_utils.get_vision_window_index(grids, merge, size, visual.patch_size)
        windows = Segments.of(starts, device)
        arguments |= {"window_index": index.to(device), "cu_window_seqlens": windows.starts}
        arguments |= {"max_window_seqlen": windows.longest, "segments": [frames, windows]}
    if family.resampled_positions:
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        arguments |= {"interp_indices": indices.to(device), "interp_weights": weights.to(device)}
    return arguments


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    segments: Sequence[Segments] = (),
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend by transformers' interface: query, key, value [1, H, S, D] -> [1, S, H, D].

    segments: from `tower_arguments`. Windows subdivide frames, so the number of segments tells which it is.
    """
    count = len(cu_seq_lens_q) - 1
    parts = next((part for part in segments if len(part.starts) - 1 == count), None)
    if parts is None:  # called without `tower_arguments`
        parts = Segments.of(cu_seq_lens_q.cpu(), query.device)
    packed = query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)
    attend = packed_attention if packed else attention_by_length
    return attend(query, key, value, parts, scaling), None


def attention_by_length(query: Tensor, key: Tensor, value: Tensor, parts: Segments, scale: float) -> Tensor:
    """Attend within segments, those of equal length as one batch: [1, H, S, D] -> [1, S, H, D]."""
    states = [x[0] if parts.order is None else x[0].index_select(1, parts.order) for x in (query, key, value)]
    sizes = [count * length for count, length in parts.buckets]
    found = []
    for (count, length), *heads in zip(parts.buckets, *(x.split(sizes, 1) for x in states), strict=True):
        batch = [x.unflatten(1, (count, length)).transpose(0, 1) for x in heads]  # [count, H, length, D]
        found.append(F.scaled_dot_product_attention(*batch, scale=scale).transpose(1, 2).flatten(0, 1))
    out = found[0] if len(found) == 1 else torch.cat(found)
    return (out if parts.back is None else out.index_select(0, parts.back))[None]


def _variable_length(query: Tensor, key: Tensor, value: Tensor, parts: Segments, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    starts, longest = parts.starts, parts.longest
    out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale)
    return out[None]


packed_attention = Checked("variable-length attention", _variable_length, attention_by_length)

AttentionInterface.register(IMPLEMENTATION, vision_attention)
