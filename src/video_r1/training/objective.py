"""The policy objective on packed completion tokens: pure tensors, no model.

N completion tokens of R responses lie one response after another; `lengths` [R] says where each ends.

    L = Σ_r v_r Σ_t [ −w min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) + β·k3 ] ÷ normaliser

ρ = π/π_old of the token, w its weight (1 where none is given), A the response's advantage, v and normaliser
by the loss type. The normaliser is that of the whole optimizer step (all micro-batches, all ranks), so that
the losses of the parts add up to the loss of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dapo", "dr_grpo"]


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """loss: scalar with gradient; the rest are detached scalars, means over this call's N tokens.

    kl: k3 estimate against the reference (0 without one); clip_low / clip_high: share of tokens whose ratio
    is clipped at 1 − ε (negative advantage) / at 1 + ε_high (positive advantage).
    """

    loss: Tensor
    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor

    @property
    def clip_ratio(self) -> Tensor:
        return self.clip_low + self.clip_high


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    lengths: Tensor,
    *,
    normaliser: float | Tensor,
    loss_type: LossType = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy loss with a KL term.

    logprobs: [N] float, of the policy, with gradient; old_logprobs: [N] of the policy that was sampled, or
    None on the first update after sampling, when it is the policy itself; advantages: [R]; lengths: [R] int
    with the sum N. normaliser: what `loss_normaliser` gives for the whole optimizer step (÷ ranks where
    gradients are averaged over ranks). epsilon_high: None means epsilon (DAPO raises it to 0.28). beta:
    weight of the KL; needs ref_logprobs [N]. token_weights: [N], multiplies the policy term of each token.
    Raises ValueError when the lengths don't add up to N.
    """
    if len(advantages) != len(lengths):
        raise ValueError(f"{len(advantages)} advantages but {len(lengths)} responses")
    if int(lengths.sum()) != len(logprobs):
        raise ValueError(f"the responses have {int(lengths.sum())} tokens but {len(logprobs)} log-probs came")
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    token_advantages = torch.repeat_interleave(advantages, lengths, output_size=len(logprobs))  # [N]
    epsilon_high = epsilon if epsilon_high is None else epsilon_high

    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + epsilon_high)
    token_loss = -torch.minimum(ratio * token_advantages, clipped * token_advantages)
    if token_weights is not None:
        token_loss = token_loss * token_weights.to(token_loss)
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else k3_kl(logprobs, ref_logprobs)
    if beta != 0.0:
        if ref_logprobs is None:
            raise ValueError("a KL weight other than 0 needs the reference's log-probabilities")
        token_loss = token_loss + beta * kl

    loss = _REDUCTIONS[loss_type](token_loss, lengths) / normaliser
    with torch.no_grad():
        low = (ratio < 1.0 - epsilon) & (token_advantages < 0)
        high = (ratio > 1.0 + epsilon_high) & (token_advantages > 0)
        return PolicyLoss(loss, _mean(kl), _mean(low), _mean(high))


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) by token: exp(d) − d − 1, d = log π_ref − log π (arXiv 2402.03300, eq. 4).

    d is clamped to [−10, 10], as in the code of arXiv 2503.21776: e^90 is infinite in float32. Beyond the
    bounds the term has no gradient. [N], [N] → [N], never negative.
    """
    difference = (ref_logprobs - logprobs).clamp(-10.0, 10.0)
    return torch.expm1(difference) - difference


def loss_normaliser(loss_type: LossType, responses: int, tokens: int, max_completion_length: int) -> float:
    """What the sums of `loss_type` are divided by, at least 1.

    responses, tokens: of everything that one optimizer step sees, over all micro-batches and ranks.
    """
    sums = {"grpo": responses, "dapo": tokens, "dr_grpo": responses * max_completion_length}
    if loss_type not in sums:
        raise ValueError(f"unknown loss type {loss_type!r}; it is grpo, dapo or dr_grpo")
    return float(max(1, sums[loss_type]))


def _sum_of_response_means(token_loss: Tensor, lengths: Tensor) -> Tensor:
    """GRPO (arXiv 2402.03300) and T-GRPO (arXiv 2503.21776): each response counts alike."""
    shares = 1.0 / lengths.to(token_loss.dtype)
    return (token_loss * torch.repeat_interleave(shares, lengths, output_size=len(token_loss))).sum()


def _sum_of_tokens(token_loss: Tensor, lengths: Tensor) -> Tensor:
    """DAPO (arXiv 2503.14476): each token counts alike, divided by the tokens that there are.

    Dr. GRPO (arXiv 2503.20783): the same sum, divided by a constant, so that long responses get no discount.
    """
    return token_loss.sum()


_REDUCTIONS = {"grpo": _sum_of_response_means, "dapo": _sum_of_tokens, "dr_grpo": _sum_of_tokens}


def _mean(values: Tensor) -> Tensor:
    values = values.detach()
    return values.sum() / max(1, len(values))
