"""Log-probabilities of given tokens from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}  # elements of one chunk of logits; a cache's worth on the CPU


def token_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    vocabulary: int,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden) / temperature) at `targets`.

    hidden [N, d], targets [N] int64 -> log-probabilities [N] float32 and, if asked for, the entropy of each
    distribution [N] float32 in nats (without a gradient). The logits exist one chunk at a time; the backward
    pass computes them again. chunk_logits: elements of one chunk (default: by the device).
    """
    if chunk_logits is None:
        chunk_logits = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cuda"])
    rows = max(1, chunk_logits // vocabulary)
    logprobs, entropy = [], []
    for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
        arguments = (head, states, tokens, temperature, with_entropy)
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk(*arguments)
        logprobs.append(chunk[0])
        entropy.append(chunk[1])
    return torch.cat(logprobs), torch.cat(entropy) if with_entropy else None


def _chunk(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    if isinstance(head, FSDPModule):  # its hooks are for one call a step, not for one a chunk
        head.unshard()
        linear = cast(nn.Linear, head)
        logits = nn.functional.linear(hidden, linear.weight, linear.bias).float()
    else:
        logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    scores = torch.log_softmax(logits, dim=-1)
    entropy = None
    if with_entropy:
        values = scores.detach()
        entropy = -(values.exp() * values).sum(-1)
    return scores.gather(1, targets[:, None])[:, 0], entropy
