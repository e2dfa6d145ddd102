"""The policy objective: pure functions of tensors, no model.

N completion tokens of R responses are packed one response after another, `lengths` [R] each.

    L = Σ_r v_r Σ_t m_t [ −w f(ρ, A) + β·k3 ] ÷ normaliser  −  entropy_coef · Σ m_t H ÷ tokens

ρ = π/π_old of the token (or of its response), A the response's advantage, w the token's weight and m whether
it counts (both 1 by default); the loss type defines the surrogate f, v and the normaliser. Normaliser and
`tokens` are those of the whole optimizer step (all micro-batches, all ranks), so that the losses of the parts
add up to the loss of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from video_r1.availability import imported
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.vllm import ImportanceMode

ImportanceLevel = Literal["token", "sequence"]
Average = Literal["responses", "tokens", "micro_batch", "budget"]
"""Unit of the loss's mean: responses (each the mean of its tokens), tokens of the step or of a micro-batch,
or the token budget (responses × max_completion_length)."""


# ---- The objective


class ClipRange(NamedTuple):
    """Bounds of ρ: 1 − low and 1 + high (`cispo`: high). delta: bound of the unclipped ρ; soft: temperatures
    of `sapo` for A > 0 and for the rest.
    """

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None
    soft: tuple[float, float] = (1.0, 1.05)


PPO_CLIP = ClipRange()


@dataclass(frozen=True, slots=True)
class SurrogateLoss:
    """Loss (scalar with gradient) and detached scalars, means over this call's N tokens: the k3 estimate
    against the reference (0 without one), and the share of tokens whose ratio is clipped.
    """

    loss: Tensor
    kl: Tensor
    clip_ratio: Tensor


def surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    lengths: Tensor,
    *,
    normaliser: float | Tensor,
    loss_type: str = "grpo",
    clip: ClipRange = PPO_CLIP,
    importance_sampling_level: ImportanceLevel = "token",
    beta: float = 0.0,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    counted: Tensor | None = None,
    token_credits: Tensor | None = None,
) -> SurrogateLoss:
    """Compute the loss of some of a step's R responses with N tokens.

    logprobs: [N] of the policy, with gradient; old_logprobs: [N] of the policy that sampled (None: the policy
    itself); advantages: [R]; lengths: [R] int. normaliser: `loss_normaliser` of the whole optimizer step (÷
    ranks if gradients are averaged over ranks). importance_sampling_level `sequence`: ρ is exp of the mean
    log-ratio of a response's tokens (GSPO, arXiv 2507.18071); with token_credits it has the gradient of each
    token's own π (GSPO-token, the same paper). beta: weight of the KL from ref_logprobs [N]. token_weights:
    [N], factors of the policy terms. token_credits: [N], added to the advantages. counted: [R] bool, False
    excludes a response. Raises ValueError for sizes that do not fit, ConfigError for an unknown loss type.
    """
    if len(advantages) != len(lengths):
        raise ValueError(f"{len(advantages)} advantages but {len(lengths)} responses")
    if int(lengths.sum()) != len(logprobs):
        raise ValueError(f"the responses have {int(lengths.sum())} tokens but {len(logprobs)} log-probs came")
    objective = objective_of(loss_type)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    token_advantages = _by_token(advantages, lengths, len(logprobs))
    if token_credits is not None:
        token_advantages = token_advantages + token_credits.to(token_advantages)

    log_ratio = logprobs - old_logprobs
    if importance_sampling_level == "sequence":
        means = _by_token(_response_sums(log_ratio, lengths) / lengths.clamp(min=1), lengths, len(logprobs))
        # Averaged over the response, the gradients of different token credits would cancel (GSPO-token).
        log_ratio = means if token_credits is None else means.detach() + (logprobs - logprobs.detach())
    ratio = log_ratio.exp()
    token_loss = -objective.surrogate(ratio, logprobs, token_advantages, clip)
    if token_weights is not None:
        token_loss = token_loss * token_weights.to(token_loss)
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else k3_kl(logprobs, ref_logprobs)
    if beta != 0.0:
        if ref_logprobs is None:
            raise ValueError("a KL weight other than 0 needs the reference's log-probabilities")
        token_loss = token_loss + beta * kl

    counted = torch.ones_like(lengths, dtype=torch.bool) if counted is None else counted.to(lengths.device)
    loss = _summed(token_loss, lengths, counted, objective.average) / normaliser
    with torch.no_grad():
        low, high = objective.bounds(clip)
        below = (ratio < low) & (token_advantages < 0)
        above = (ratio > high) & (token_advantages > 0)
        tokens = max(1, len(logprobs))
        return SurrogateLoss(loss, kl.detach().sum() / tokens, (below | above).sum() / tokens)


def clipped(ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip: ClipRange) -> Tensor:
    """min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) (PPO, arXiv 1707.06347); `delta` bounds the first ρ
    (INTELLECT-2, arXiv 2505.07291).
    """
    own = ratio if clip.delta is None else ratio.clamp(max=clip.delta)
    return torch.minimum(own * advantages, ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantages)


def cispo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip: ClipRange) -> Tensor:
    """min(ρ, ε_high) A log π, the first factor without gradient: every token keeps a gradient (MiniMax-M1,
    arXiv 2506.13585).
    """
    return ratio.clamp(max=clip.high).detach() * advantages * logprobs


def sapo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip: ClipRange) -> Tensor:
    """4/τ · sigmoid(τ (ρ − 1)) A, τ by the sign of A: a gate that closes softly (SAPO, arXiv 2511.20347)."""
    positive, rest = map(ratio.new_tensor, clip.soft)
    tau = torch.where(advantages > 0, positive, rest)
    return torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * advantages


class Objective(NamedTuple):
    """A loss type. surrogate(ρ [N], log π [N], A [N], clip) -> [N]; bounds(clip): of ρ, beyond which a token
    counts as clipped.
    """

    surrogate: Callable[[Tensor, Tensor, Tensor, ClipRange], Tensor]
    average: Average = "responses"
    bounds: Callable[[ClipRange], tuple[float, float]] = lambda clip: (-torch.inf, torch.inf)


def _ppo_bounds(clip: ClipRange) -> tuple[float, float]:
    return 1.0 - clip.low, 1.0 + clip.high


OBJECTIVES = {
    "grpo": Objective(clipped, "responses", _ppo_bounds),  # arXiv 2402.03300; T-GRPO, arXiv 2503.21776
    "bnpo": Objective(clipped, "micro_batch", _ppo_bounds),  # as TRL has it
    "dapo": Objective(clipped, "tokens", _ppo_bounds),  # arXiv 2503.14476
    "dr_grpo": Objective(clipped, "budget", _ppo_bounds),  # arXiv 2503.20783
    "cispo": Objective(cispo, "tokens", lambda clip: (-torch.inf, clip.high)),
    "sapo": Objective(sapo, "responses"),
}


def objective_of(loss_type: str) -> Objective:
    """Return one of OBJECTIVES by its name, or import `module:name` or `file.py:name`: an Objective, or a
    surrogate, which is then averaged over responses. Raises ConfigError if there is none.
    """
    if loss_type in OBJECTIVES:
        return OBJECTIVES[loss_type]
    found = imported(loss_type, "loss_type")
    return found if isinstance(found, Objective) else Objective(found)


def trains_all(settings: TGRPOSettings) -> bool:
    """Whether groups of equal rewards matter although their advantages are 0: for a KL or entropy term, a
    teacher, the mean over a micro-batch (bnpo), or where entropies are ranked.
    """
    own_terms = settings.beta != 0 or settings.entropy_coef != 0 or settings.teacher.model_name_or_path
    averaged = objective_of(settings.loss_type).average == "micro_batch"
    return bool(own_terms) or averaged or settings.top_entropy_quantile < 1


def importance_weights(
    log_ratio: Tensor, lengths: Tensor, mode: ImportanceMode, bounds: tuple[float, float]
) -> Tensor:
    """Return weights [N] π_trainer ÷ π_sampler, for tokens that another engine sampled, as in TRL.

    log_ratio: [N], log π_trainer − log π_sampler, detached. `token_…`: each token's own; `sequence_…`: the
    product over its response. `…_truncate`: clipped to the bounds; `…_mask`: 0 beyond them.
    """
    level, _, beyond = mode.partition("_")
    if level == "sequence":
        log_ratio = _by_token(_response_sums(log_ratio, lengths), lengths, len(log_ratio))
    weights, (low, high) = log_ratio.exp(), bounds
    if beyond == "truncate":
        return weights.clamp(low, high)
    return weights.masked_fill((weights < low) | (weights > high), 0.0)


def high_entropy(entropy: Tensor, everywhere: Tensor, share: float) -> Tensor:
    """Return [N] bool: whether an entropy is among the top `share` of `everywhere` [M] (arXiv 2506.01939)."""
    if not len(everywhere):
        return torch.zeros_like(entropy, dtype=torch.bool)
    return entropy >= torch.quantile(everywhere.to(entropy), 1.0 - share)


def entropy_sum(
    entropy: Tensor, lengths: Tensor, counted: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """Sum the entropies [N] of tokens that are kept ([N] bool) in responses that count ([R] bool)."""
    if counted is not None:
        entropy = entropy * _by_token(counted.to(lengths.device), lengths, len(entropy))
    return entropy.sum() if kept is None else (entropy * kept).sum()


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(π ‖ π_ref) by token, [N]: exp(d) − d − 1, d = log π_ref − log π (arXiv 2402.03300, eq. 4).

    d is clamped to [−10, 10], as in the code of arXiv 2503.21776: e^90 is infinite in float32. Beyond the
    bounds the term has no gradient.
    """
    difference = (ref_logprobs - logprobs).clamp(-10.0, 10.0)
    return torch.expm1(difference) - difference


def loss_normaliser(loss_type: str, responses: int, tokens: int, max_completion_length: int) -> float:
    """Return the divisor of the sums. responses, tokens: of a whole optimizer step, over all ranks."""
    sums = {"tokens": tokens, "budget": responses * max_completion_length}
    return float(max(1, sums.get(objective_of(loss_type).average, responses)))


def _summed(token_loss: Tensor, lengths: Tensor, counted: Tensor, average: Average) -> Tensor:
    """Sum the token losses [N] of the responses that count, before the division by the normaliser."""
    if average == "responses":
        shares = counted / lengths.clamp(min=1).to(token_loss.dtype)
        return (token_loss * _by_token(shares, lengths, len(token_loss))).sum()
    total = (token_loss * _by_token(counted, lengths, len(token_loss))).sum()
    if average == "micro_batch":  # the mean over its tokens, by its share of the step's responses
        return total * len(lengths) / (lengths * counted).sum().clamp(min=1).to(total)
    return total


def _by_token(values: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """[R] -> [N]"""
    return torch.repeat_interleave(values, lengths, output_size=tokens)


def _response_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[N] -> [R]"""
    owners = _by_token(torch.arange(len(lengths), device=values.device), lengths, len(values))
    return values.new_zeros(len(lengths)).index_add(0, owners, values)
