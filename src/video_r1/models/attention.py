"""Attention of a row of groups, registered with transformers as "video_r1_groups".

Models run with unmodified transformers classes: their attention modules look the implementation up by name. A
call without a row's layout (generation, evaluation, a padded batch) goes to transformers' SDPA unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from video_r1.models.packing import RowLayout

IMPLEMENTATION = "video_r1_groups"

# The kernel behind scaled_dot_product_attention on the CPU. Called by name because the log-sum-exp that it
# returns lets two partial results be joined, which the public function does not offer.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def groups_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    group_layout: RowLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, H, S, D], key and value [B, Hkv, S, D] -> [B, S, H, D].

    With `group_layout` B is 1 and S the row's tokens; on the CPU the row's pieces go through the flash kernel
    one by one, elsewhere FlexAttention takes the layout's block mask.
    """
    if group_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; a row of groups needs config.attention_dropout 0")
    if torch.is_autocast_enabled(query.device.type):  # it does not reach the kernels below
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if group_layout.block_mask is not None:
        return flex_attention_forward(module, query, key, value, group_layout.block_mask, scaling=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Any = _SharedPrefixAttention.apply(*rows, group_layout, scale)
    return out[None], None


class _SharedPrefixAttention(torch.autograd.Function):
    """Attention of the row without a mask: softmax over prompt and own tokens, computed apart and joined.

    For a query with partial results o1, o2 and log-sum-exps l1, l2, and l = log(exp l1 + exp l2):
    o = exp(l1 - l) o1 + exp(l2 - l) o2. The flash backward of each part, given the joined o and l, returns
    that part's share of the gradient (as in Ring Attention, Liu et al. 2023, arXiv:2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float
    ) -> Tensor:
        """query [N, H, D], key and value [N, Hkv, D] -> [N, H, D]."""
        keys, values = _all_heads(key, value, query.shape[1])
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty_like(out[..., 0], dtype=torch.promote_types(out.dtype, torch.float32))  # [N, H]

        for rows, columns, causal in _pieces(layout):
            out[rows], lse[rows] = _attend(query, keys, values, rows, columns, causal, scale)
        if layout.buckets:
            own = [_attend(query, keys, values, bucket, bucket, True, scale) for bucket in layout.buckets]
            own_out, own_lse = (torch.cat(parts)[layout.from_buckets] for parts in zip(*own, strict=True))
            prompt_out, prompt_lse = out[layout.others], lse[layout.others]
            both = torch.logaddexp(prompt_lse, own_lse)
            weighted = prompt_out * (prompt_lse - both).exp()[..., None]
            weighted += own_out * (own_lse - both).exp()[..., None]
            out[layout.others] = weighted.to(out.dtype)
            lse[layout.others] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        layout: RowLayout = ctx.layout
        keys, values = _all_heads(key, value, query.shape[1])
        grad_q, grad_k, grad_v = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, keys, values)
        )

        def share(grad_out: Tensor, rows: Any, columns: Any, causal: bool) -> list[Tensor]:
            """Gradients [n * L, H, D] of q, k and v by that of the rows' output [n, H, L, D]."""
            heads = (_take(query, rows), _take(keys, columns), _take(values, columns), _take(out, rows))
            lse_rows = _take(lse, rows).contiguous()
            parts = _flash_backward(grad_out, *heads, lse_rows, 0.0, causal, scale=ctx.scale)
            return [part.transpose(1, 2).flatten(0, 1) for part in parts]

        for rows, columns, causal in _pieces(layout):
            parts = share(_take(grad, rows), rows, columns, causal)
            grad_q[rows] += parts[0]
            grad_k[columns] += parts[1]
            grad_v[columns] += parts[2]
        for bucket, mask in zip(layout.buckets, layout.bucket_masks, strict=True):
            # A repeated token gets no gradient: its copies in the bucket are not part of the row.
            kept = bucket.flatten()[mask]
            parts = share(_take(grad, bucket) * mask.view(len(bucket), 1, -1, 1), bucket, bucket, True)
            for total, part in zip((grad_q, grad_k, grad_v), parts, strict=True):
                total.index_add_(0, kept, part[mask])
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            grad_k, grad_v = (x.unflatten(1, (-1, repeats)).sum(2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None


def _all_heads(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Grouped-query keys and values [N, Hkv, D], each repeated for its query heads: [N, H, D]."""
    repeats = heads // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    """[N, H, …] and indices [n, L], or a slice of L (n = 1) -> [n, H, L, …]."""
    if isinstance(rows, slice):
        return x[None, rows].transpose(1, 2)
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _pieces(layout: RowLayout) -> Iterator[tuple[slice, slice, bool]]:
    """Queries, the keys that they see and whether causally: prompts with their first completion, the rest."""
    for span in layout.groups:
        first = slice(span.start, span.first_end)
        yield first, first, True
        if span.end > span.first_end:
            yield slice(span.first_end, span.end), slice(span.start, span.prompt_end), False


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rows: Any, columns: Any, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The rows' output [n * L, H, D] and log-sum-exp [n * L, H]. rows, columns: as `_take` has them."""
    heads = (_take(query, rows), _take(key, columns), _take(value, columns))
    out, lse = _flash(*heads, 0.0, causal, scale=scale)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(IMPLEMENTATION, groups_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
