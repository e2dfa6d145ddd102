"""Log-probabilities of given tokens from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}  # elements of one chunk of logits; a cache's worth on the CPU


def token_logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool, vocabulary: int
) -> tuple[Tensor, Tensor | None]:
    """log softmax(head(hidden) / temperature) at `targets`.

    hidden [N, d], targets [N] int64 -> log-probabilities [N] float32 and, if asked for, the entropy of each
    distribution [N] float32 in nats (without a gradient). The logits exist one chunk at a time; the backward
    pass computes them again.
    """
    rows = max(1, CHUNK_LOGITS.get(hidden.device.type, 2**26) // vocabulary)
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
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    scores = torch.log_softmax(logits, dim=-1)
    entropy = None
    if with_entropy:
        values = scores.detach()
        entropy = -(values.exp() * values).sum(-1)
    return scores.gather(1, targets[:, None])[:, 0], entropy
