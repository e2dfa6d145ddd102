"""Log-probs of given tokens from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}  # elements of one chunk of logits; fits a CPU's cache
LEAST_ROWS = 64  # of a chunk; each chunk adds a gradient of the head's size, costly for a large vocabulary


class TokenScores(NamedTuple):
    """Scores of N given tokens: `logprobs` [N] float32, nats.

    On request: `entropy` [N] float32, nats, of each token's distribution; `likeliest` [N] bool, whether the
    token is the arg max.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    likeliest: Tensor | None = None


def token_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    vocabulary: int,
    chunk_logits: int | None = None,
    with_likeliest: bool = False,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Return log softmax(head(hidden) / temperature) at `targets`, for hidden [N, d] and targets [N] int64.

    The logits exist one chunk at a time; the backward pass computes them again. chunk_logits: elements of one
    chunk (default: by the device); a chunk has at least LEAST_ROWS tokens. entropy_gradient: keep the
    entropy's gradient, for an entropy bonus.
    """
    if chunk_logits is None:
        chunk_logits = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cuda"])
    rows = max(LEAST_ROWS, chunk_logits // vocabulary)
    run: Any = _chunk
    if torch.is_grad_enabled():
        run = partial(checkpoint, _chunk, use_reentrant=False, preserve_rng_state=False)
    chunks = [
        run(head, states, tokens, temperature, with_entropy, with_likeliest, entropy_gradient)
        for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logprobs, *others = zip(*chunks, strict=True)
    return TokenScores(
        torch.cat(logprobs), *(None if part[0] is None else torch.cat(part) for part in others)
    )


def _chunk(
    head: Any,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    with_likeliest: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(head, FSDPModule):  # its hooks expect one call a step, not one a chunk
        head.unshard()
        linear = cast(nn.Linear, head)
        logits = nn.functional.linear(hidden, linear.weight, linear.bias).float()
    else:
        logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    scores = torch.log_softmax(logits, dim=-1)
    entropy = likeliest = None
    if with_entropy:
        values = scores if entropy_gradient else scores.detach()
        entropy = -(values.exp() * values).sum(-1)
    if with_likeliest:
        likeliest = scores.detach().argmax(-1) == targets
    return scores.gather(1, targets[:, None])[:, 0], entropy, likeliest
