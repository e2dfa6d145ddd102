"""The row: prompts once, their completions behind them, several groups end to end, no padding.

    row      p p p p a a b b b c | p p a a a b ...
    group    0 0 0 0 0 0 0 0 0 0 | 1 1 1 1 1 1
    segment  0 0 0 0 1 1 2 2 2 3 | 4 4 5 5 5 6        one number a prompt or completion

A token sees the earlier tokens of its own segment and, in a completion, the whole prompt of its group. The
last token of a completion predicts nothing that is scored, so it is not in the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # side of a FlexAttention block in tokens
BUCKET = 64  # completions are padded inside attention to the longest one of their length bucket


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where a group lies in its row, as token indices, ends exclusive.

    The first completion directly follows the prompt, so both together are one plain causal sequence
    [start, first_end); the others, [first_end, end), see the prompt [start, prompt_end) and themselves.
    """

    start: int
    prompt_end: int
    first_end: int
    end: int


@dataclass(frozen=True, slots=True)
class ForkLayout:
    """The same row for layers with a state: prompts first, then completions that start from their states.

    `prompts`, `completions`: [n, L] row indices, similar lengths together; short ones repeat their last.
    `in_prompts`: [n, L] bool for each of `prompts`, False where a token is such a repeat. `states`: [groups],
    for each group the place of its prompt's state among those of `prompts`, one bucket after the other.
    `forks`: [n] for each of `completions`, the groups that they belong to. `back`: [N], for each token its
    place in the flattened prompts and completions.

    A convolution over K tokens runs over the row in which every segment has its K - 1 predecessors before it:
    `inputs`: [M] indices of that row's tokens, N for none; `outputs`: [N], where each token is in it.
    """

    prompts: tuple[Tensor, ...]
    in_prompts: tuple[Tensor, ...]
    completions: tuple[Tensor, ...]
    states: Tensor
    forks: tuple[Tensor, ...]
    back: Tensor
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Which token of a row of N tokens sees which; made once a row and used by every layer.

    `groups`: the spans of the groups in order. `others`: [C] row indices of the tokens of all completions but
    each group's first. `buckets`: [n, L] row indices of those completions, similar lengths together; short
    ones repeat their last token. `bucket_masks`: [n * L] bool, False where a token is such a repeat.
    `from_buckets`: [C], for each of `others` its index in the flattened, concatenated buckets. `block_mask`:
    the same rule for FlexAttention; None on the CPU. `forks`: for models with a state, else None.
    """

    groups: tuple[GroupSpan, ...]
    others: Tensor
    buckets: tuple[Tensor, ...]
    bucket_masks: tuple[Tensor, ...]
    from_buckets: Tensor
    block_mask: BlockMask | None
    forks: ForkLayout | None = None


def row_layout(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    device: torch.device,
    kernel: int | None = None,
) -> RowLayout:
    """The layout of a row of groups.

    prompt_lengths: P of each group. completion_lengths: the tokens of its completions that are in the row.
    kernel: K of the convolution in layers with a state; None for a model without such layers.
    """
    groups: list[GroupSpan] = []
    segments: list[tuple[int, int]] = []  # completions that are not the first of their group
    position = 0
    for prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        start, prompt_end = position, position + prompt
        ends = list(itertools.accumulate(lengths, initial=prompt_end))
        segments += [(a, b) for a, b in itertools.pairwise(ends[1:]) if b > a]
        first_end = ends[1] if lengths else prompt_end
        groups.append(GroupSpan(start, prompt_end, first_end, ends[-1]))
        position = ends[-1]
    buckets, masks, row_indices = _buckets(segments)
    # `row_indices` has row tokens in the buckets' order; what sorts it leads from the row to the buckets.
    others, order = torch.sort(row_indices)
    valid = torch.cat(masks).nonzero()[:, 0] if masks else torch.empty(0, dtype=torch.long)
    on_gpu = device.type != "cpu"
    return RowLayout(
        groups=tuple(groups),
        others=others.to(device),
        buckets=tuple(bucket.to(device) for bucket in buckets),
        bucket_masks=tuple(mask.to(device) for mask in masks),
        from_buckets=valid[order].to(device),
        block_mask=block_mask(prompt_lengths, completion_lengths, device) if on_gpu else None,
        forks=None if kernel is None else fork_layout(prompt_lengths, completion_lengths, kernel, device),
    )


def fork_layout(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    kernel: int,
    device: torch.device,
) -> ForkLayout:
    """Arguments as `row_layout` has them."""
    prompts: list[tuple[int, int]] = []
    completions: list[tuple[int, int]] = []
    inputs: list[Tensor] = []
    total = sum(prompt_lengths) + sum(map(sum, completion_lengths))
    nothing = torch.full((kernel - 1,), total)
    position = 0
    for prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        start, prompt_end = position, position + prompt
        ends = list(itertools.accumulate(lengths, initial=prompt_end))
        own = torch.cat([nothing, torch.arange(start, prompt_end)])
        inputs.append(own)
        inputs += [torch.cat([own[1 - kernel :], torch.arange(a, b)]) for a, b in itertools.pairwise(ends)]
        prompts.append((start, prompt_end))
        completions += [(a, b) for a, b in itertools.pairwise(ends) if b > a]
        position = ends[-1]
    lengths = torch.tensor([len(part) for part in inputs])
    after = lengths.cumsum(0).repeat_interleave(lengths - kernel + 1)  # where the segment of each token ends
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
    """Segments [start, end) of similar length together: indices [n, L], masks [n * L], unmasked indices."""
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


def block_mask(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device
) -> BlockMask:
    """FlexAttention's block mask of the row, built from the spans: the [N, N] mask is never written out.

    A block of 128 × 128 is skipped when no pair in it is visible, and computed without a mask when all are.
    """
    spans: list[tuple[int, int, int, int]] = []  # start, end, and the prompt's start and end
    prompt_numbers: list[int] = []  # the span that is the prompt of each span
    position = 0
    for prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        start, prompt_end = position, position + prompt
        ends = list(itertools.accumulate(lengths, initial=prompt_end))
        prompt_numbers += [len(spans)] * (len(lengths) + 1)
        spans.append((start, prompt_end, start, start))
        spans += [(a, b, start, prompt_end) for a, b in itertools.pairwise(ends)]
        position = ends[-1]

    blocks = -(-position // BLOCK)
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
        *listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(position, position)
    )
