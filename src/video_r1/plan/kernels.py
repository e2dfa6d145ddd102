"""What kernels need and make, without their work, for tensors that have shapes but no storage.

Attention and experts depend on values, which such tensors do not have. Torch's own gated delta rule is a loop
over 64 tokens at a time, and keeps far more than the kernels that take its place on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from video_r1.models.gated_delta import RULE

# "flash": transformers then hands vision attention whole sequences, without reading their lengths.
ATTENTION_NAME = "video_r1_flash_without_storage"
EXPERTS_NAME = "video_r1_experts_without_storage"
CHUNK = 64  # tokens of the gated delta rule between two states


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
) -> tuple[Tensor, None]:
    """The memory of an attention kernel that writes no score matrix: [B, H, S, D] -> [B, S, H, D]."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return _AttentionMemory.apply(query, key, value), None  # pyright: ignore[reportReturnType]


class _AttentionMemory(torch.autograd.Function):
    """Keeps query, key, value, the result and its log-sum-exp; backward makes one gradient for each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, size = query.shape
        out = query.new_empty(batch, length, heads, size)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def experts(module: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The memory of grouped products, where one expert stands for those that the router would choose: states
    [S, d], chosen and weights [S, k] -> [S, d]."""
    rows = states.repeat_interleave(chosen.shape[1], 0)
    gate, up = nn.functional.linear(rows, module.gate_up_proj[0]).chunk(2, dim=-1)
    out = nn.functional.linear(module.act_fn(gate) * up, module.down_proj[0])
    return (out.unflatten(0, chosen.shape) * weights[..., None]).sum(1).to(states.dtype)


@contextmanager
def states_without_storage(module: str | None) -> Iterator[None]:
    """Inside, the layers with a state of transformers' module of that name (None: there are none) call
    `gated_delta_rule`.
    """
    if module is None:
        yield
        return
    found = import_module(module)
    real = getattr(found, RULE)
    setattr(found, RULE, gated_delta_rule)
    try:
        yield
    finally:
        setattr(found, RULE, real)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **unused: Any
) -> tuple[Tensor, Tensor]:
    """The memory of the chunked rule of flash-linear-attention: query, key [B, T, H, Dk], value
    [B, T, H, Dv], g, beta [B, T, H] -> [B, T, H, Dv] and the last states [B, H, Dk, Dv] in float32."""
    return _RuleMemory.apply(query, key, value, g, beta)  # pyright: ignore[reportReturnType]


class _RuleMemory(torch.autograd.Function):
    """Keeps normalised queries and keys, values, gates and the product of the keys within each chunk; the
    states between chunks are made in forward and again in backward, and are kept in neither.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Any:
        within = key.new_empty(*key.shape[:3], CHUNK)
        ctx.save_for_backward(*map(torch.empty_like, (query, key)), value, g, beta, within)
        made = _between_chunks(key, value)
        del made
        state = key.new_empty(key.shape[0], *key.shape[2:], value.shape[-1], dtype=torch.float32)
        return torch.empty_like(value), state

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_state: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, g, beta, _ = ctx.saved_tensors
        made = _between_chunks(key, value), _between_chunks(key, value)  # and their gradients
        del made
        return tuple(map(torch.empty_like, (query, key, value, g, beta)))


def _between_chunks(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The states that chunks begin with, and what each token reads of keys and values and writes to them."""
    batch, length, heads, size = key.shape
    states = key.new_empty(batch, -(-length // CHUNK), heads, size, value.shape[-1])
    return states, torch.empty_like(key), torch.empty_like(value), torch.empty_like(value)


AttentionInterface.register(ATTENTION_NAME, attention)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts)
