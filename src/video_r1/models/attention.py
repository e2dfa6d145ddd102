"""A row of groups without padding, and its attention, registered with transformers as "video_r1_groups".

    row      p p p p a a b b b c | p p a a a b ...    prompts once, their completions after them
    group    0 0 0 0 0 0 0 0 0 0 | 1 1 1 1 1 1
    segment  0 0 0 0 1 1 2 2 2 3 | 4 4 5 5 5 6        one number a prompt or completion

A token sees the earlier tokens of its own segment and, in a completion, the whole prompt of its group. The
last token of a completion predicts nothing that is scored, so it is not in the row. transformers' attention
modules look the implementation up by name; a call without a row's layout goes to its SDPA unchanged.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from video_r1.models.checked import Checked

IMPLEMENTATION = "video_r1_groups"
BLOCK = 128  # side of a FlexAttention block in tokens
BUCKET = 64  # completions are padded inside attention to the longest one of their length bucket

# The kernel behind scaled_dot_product_attention on the CPU. It is called by name because it returns the
# log-sum-exp, which is needed to join two partial results and which the public function does not return.
_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

sdpa_attention_forward: Any = AttentionInterface().get("sdpa")
flex_attention_forward: Any = AttentionInterface().get("flex_attention")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class GroupSpan(NamedTuple):
    """Position of a group in its row: start of the prompt, and the exclusive ends of prompt and completions.

    The first completion directly follows the prompt, so both together are one plain causal sequence. The
    others see the prompt and themselves.
    """

    start: int
    ends: Sequence[int]


@dataclass(frozen=True, slots=True)
class ForkLayout:
    """Layout for layers with a state: prompts, then completions, which start from the prompts' states.

    A convolution over K tokens runs over a row of M tokens, where each segment follows the K - 1 before it.
    """

    prompts: tuple[Tensor, ...]  # buckets, as in RowLayout
    in_prompts: tuple[Tensor, ...]  # of each: [n, L] bool, False for repeated tokens
    completions: tuple[Tensor, ...]  # buckets
    states: Tensor  # [groups], index of each group's prompt state among those of all `prompts` buckets
    forks: tuple[Tensor, ...]  # of each bucket of `completions`: [n], their groups
    back: Tensor  # [N], index of each token in the flattened prompts and completions
    inputs: Tensor  # [M], token indices of the convolution's row, N for none
    outputs: Tensor  # [N], index of each token in the convolution's row


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Visibility of the N tokens of a row; built once a row and used by every layer."""

    groups: tuple[GroupSpan, ...]
    others: Tensor  # [C], indices of the tokens of all completions except each group's first
    buckets: tuple[Tensor, ...]  # of these: [n, L] indices, similar lengths together, the last token repeated
    bucket_masks: tuple[Tensor, ...]  # [n * L] bool, False for repeated tokens
    from_buckets: Tensor  # [C], index of each of `others` in the flattened, concatenated buckets
    block_mask: BlockMask | None  # the same rule for FlexAttention; None on the CPU
    forks: ForkLayout | None = None  # for models with a state


def row_layout(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    device: torch.device,
    kernel: int | None = None,
) -> RowLayout:
    """Build the layout of a row of groups.

    prompt_lengths: P of each group. completion_lengths: tokens of its completions that are in the row.
    kernel: K of the convolution in layers with a state; None for a model without such layers.
    """
    groups = group_spans(prompt_lengths, completion_lengths)
    # All completions except the first of each group
    others = [(a, b) for group in groups for a, b in itertools.pairwise(group.ends[1:]) if b > a]
    buckets, masks, row_indices = _buckets(others)
    # `row_indices` has the row's tokens in the order of the buckets; sorting it maps the row to the buckets.
    tokens, order = torch.sort(row_indices)
    valid = torch.cat(masks).nonzero()[:, 0] if masks else torch.empty(0, dtype=torch.long)
    on_gpu = device.type != "cpu"
    return RowLayout(
        groups=groups,
        others=tokens.to(device),
        buckets=tuple(bucket.to(device) for bucket in buckets),
        bucket_masks=tuple(mask.to(device) for mask in masks),
        from_buckets=valid[order].to(device),
        block_mask=block_mask(groups, device) if on_gpu else None,
        forks=None if kernel is None else fork_layout(groups, kernel, device),
    )


def group_spans(prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> tuple[GroupSpan, ...]:
    """Return the spans of groups; arguments as for `row_layout`."""
    spans, start = [], 0
    for prompt, lengths in zip(prompts, completions, strict=True):
        spans.append(GroupSpan(start, list(itertools.accumulate(lengths, initial=start + prompt))))
        start = spans[-1].ends[-1]
    return tuple(spans)


def fork_layout(groups: Sequence[GroupSpan], kernel: int, device: torch.device) -> ForkLayout:
    """Build the layout for layers with a state."""
    prompts: list[tuple[int, int]] = []
    completions: list[tuple[int, int]] = []
    inputs: list[Tensor] = []
    nothing = torch.full((kernel - 1,), groups[-1].ends[-1])
    for start, ends in groups:
        own = torch.cat([nothing, torch.arange(start, ends[0])])
        inputs.append(own)
        inputs += [torch.cat([own[1 - kernel :], torch.arange(a, b)]) for a, b in itertools.pairwise(ends)]
        prompts.append((start, ends[0]))
        completions += [(a, b) for a, b in itertools.pairwise(ends) if b > a]
    lengths = torch.tensor([len(part) for part in inputs])
    after = lengths.cumsum(0).repeat_interleave(lengths - kernel + 1)  # end of each token's segment
    left = torch.cat([torch.arange(len(part) - kernel + 1, 0, -1) for part in inputs])
    prompt_buckets, prompt_masks, prompt_rows = _buckets(prompts)
    buckets, masks, rows = _buckets(completions)
    flat = torch.cat([*prompt_masks, *masks]).nonzero()[:, 0]
    starts = torch.tensor([start for start, _ in prompts])
    first = [part[:, 0].contiguous() for part in (*prompt_buckets, *buckets)]
    group_of = [torch.searchsorted(starts, tokens, right=True) - 1 for tokens in first]
    return ForkLayout(
        prompts=tuple(part.to(device) for part in prompt_buckets),
        in_prompts=tuple(
            m.view(p.shape).to(device) for m, p in zip(prompt_masks, prompt_buckets, strict=True)
        ),
        completions=tuple(part.to(device) for part in buckets),
        states=torch.argsort(torch.cat(group_of[: len(prompt_buckets)])).to(device),
        forks=tuple(part.to(device) for part in group_of[len(prompt_buckets) :]),
        back=flat[torch.argsort(torch.cat([prompt_rows, rows]))].to(device),
        inputs=torch.cat(inputs).to(device),
        outputs=(after - left).to(device),
    )


def _buckets(segments: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Group segments [start, end) of similar length.

    Returns indices [n, L] and masks [n * L] of each bucket, and all unmasked indices.
    """
    by_size = sorted(segments, key=lambda segment: segment[1] - segment[0])
    buckets, masks = [], []
    for _, members in itertools.groupby(by_size, key=lambda segment: (segment[1] - segment[0] - 1) // BUCKET):
        bounds = torch.tensor(list(members))
        longest = int((bounds[:, 1] - bounds[:, 0]).max())
        indices = bounds[:, :1] + torch.arange(longest)
        masks.append((indices < bounds[:, 1:]).flatten())
        buckets.append(torch.minimum(indices, bounds[:, 1:] - 1))
    kept = [bucket.flatten()[mask] for bucket, mask in zip(buckets, masks, strict=True)]
    return buckets, masks, torch.cat(kept) if kept else torch.empty(0, dtype=torch.long)


def block_mask(groups: Sequence[GroupSpan], device: torch.device) -> BlockMask:
    """Build FlexAttention's block mask of the row from its spans, without the [N, N] mask.

    A block of 128 × 128 is skipped if no pair in it is visible, and computed without a mask if all are.
    """
    spans: list[tuple[int, int, int, int]] = []  # start, end, start and end of the prompt
    prompt_numbers: list[int] = []  # index of each span's prompt
    for start, ends in groups:
        prompt_numbers += [len(spans)] * len(ends)
        spans.append((start, ends[0], start, start))
        spans += [(a, b, start, ends[0]) for a, b in itertools.pairwise(ends)]

    total = spans[-1][1]
    blocks = -(-total // BLOCK)
    edges = torch.arange(blocks) * BLOCK

    def inside(start: int, end: int) -> Tensor:  # [blocks] tokens of each block that lie in [start, end)
        return (torch.clamp(edges + BLOCK, max=end) - torch.clamp(edges, min=start)).clamp(min=0)

    visible = torch.zeros(blocks, blocks, dtype=torch.bool)
    pairs = torch.zeros(blocks, blocks, dtype=torch.long)
    for start, end, prompt_start, prompt_end in spans:
        own, prompt = inside(start, end), inside(prompt_start, prompt_end)
        causal = torch.outer(own, own).tril()  # upper bound on the diagonal, exact below it
        to_prompt = torch.outer(own, prompt)
        visible |= (causal + to_prompt) > 0
        pairs += causal.tril(-1) + to_prompt
    full = pairs == BLOCK * BLOCK
    partial = visible & ~full

    lengths = torch.tensor([end - start for start, end, _, _ in spans])
    segment = torch.arange(len(spans)).repeat_interleave(lengths).to(device)
    prompt_segment = torch.tensor(prompt_numbers).repeat_interleave(lengths).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (segment[key] == segment[query]) | (segment[key] == prompt_segment[query])
        return same & (key <= query)

    def listed(table: Tensor) -> tuple[Tensor, Tensor]:  # counts; key blocks, listed ones first
        order = torch.argsort(table.int(), dim=1, descending=True, stable=True)
        return table.sum(1).int()[None, None].to(device), order.int()[None, None].to(device)

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(total, total)
    )


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
    """Attend by transformers' interface: query [B, H, S, D], key, value [B, Hkv, S, D] -> [B, S, H, D].

    With `group_layout` B is 1 and S is the row's tokens: on the CPU the flash kernel runs on the row's pieces
    one by one; elsewhere FlexAttention uses the layout's block mask. Both are compared with SDPA (`Checked`).
    """
    if group_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; a row of groups needs config.attention_dropout 0")
    if torch.is_autocast_enabled(query.device.type):  # autocast does not reach the kernels below
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = flash_attention if group_layout.block_mask is None else row_attention
    return attend(query, key, value, group_layout, scale, module), None


def _flex(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, module: nn.Module
) -> Tensor:
    return flex_attention_forward(module, query, key, value, layout.block_mask, scaling=scale)[0]


def _flash_pieces(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, module: nn.Module
) -> Tensor:
    heads: Any = (x[0].transpose(0, 1) for x in (query, key, value))
    return _SharedPrefixAttention.apply(*heads, layout, scale)[None]  # pyright: ignore[reportOptionalSubscript]


def _by_spans(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scale: float, module: nn.Module
) -> Tensor:
    """Attend completion by completion behind a copy of its prompt's keys, which needs no compiler."""
    attend: Any = partial(scaled_dot_product_attention, scale=scale, enable_gqa=True)
    found: list[Tensor] = []
    for start, ends in layout.groups:
        first = slice(start, ends[:2][-1])  # prompt and first completion are one causal sequence
        found.append(attend(*(x[:, :, first] for x in (query, key, value)), is_causal=True))
        for a, b in itertools.pairwise(ends[1:]):
            keys, values = (torch.cat([x[:, :, start : ends[0]], x[:, :, a:b]], 2) for x in (key, value))
            mask = torch.ones(b - a, keys.shape[2], dtype=torch.bool, device=query.device)
            found.append(attend(query[:, :, a:b], keys, values, attn_mask=mask.tril(ends[0] - start)))
    return torch.cat(found, 2).transpose(1, 2)


row_attention = Checked("FlexAttention", _flex, _by_spans)
flash_attention = Checked("the CPU's flash attention", _flash_pieces, _by_spans)


class _SharedPrefixAttention(torch.autograd.Function):
    """Attention of the row without a mask: prompt and own tokens are attended to separately, then joined.

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
            """Return gradients [n * L, H, D] of q, k and v from the rows' output gradient [n, H, L, D]."""
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
            # Repeated tokens get no gradient: they are not part of the row.
            kept = bucket.flatten()[mask]
            parts = share(_take(grad, bucket) * mask.view(len(bucket), 1, -1, 1), bucket, bucket, True)
            for total, part in zip((grad_q, grad_k, grad_v), parts, strict=True):
                total.index_add_(0, kept, part[mask])
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            grad_k, grad_v = (x.unflatten(1, (-1, repeats)).sum(2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None


def _all_heads(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Repeat grouped-query keys and values [N, Hkv, D] for their query heads: [N, H, D]."""
    repeats = heads // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Select rows of x [N, H, …] by indices [n, L], or by a slice of L (n = 1) -> [n, H, L, …]."""
    if isinstance(rows, slice):
        return x[None, rows].transpose(1, 2)
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)


def _pieces(layout: RowLayout) -> Iterator[tuple[slice, slice, bool]]:
    """Yield query rows, the key rows that they see and whether the attention is causal.

    A group's prompt and first completion are one piece; its other completions see the prompt in a second one.
    """
    for start, ends in layout.groups:
        first = slice(start, ends[:2][-1])
        yield first, first, True
        if ends[-1] > first.stop:
            yield slice(first.stop, ends[-1]), slice(start, ends[0]), False


def _attend(
    query: Tensor, key: Tensor, value: Tensor, rows: Any, columns: Any, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the rows' output [n * L, H, D] and log-sum-exp [n * L, H]; rows, columns: as for `_take`."""
    heads = (_take(query, rows), _take(key, columns), _take(value, columns))
    out, lse = _flash(*heads, 0.0, causal, scale=scale)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(IMPLEMENTATION, groups_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, AttentionMaskInterface()["sdpa"])
