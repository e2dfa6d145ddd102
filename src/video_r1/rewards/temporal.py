"""Temporal rules: how each changes the rewards of completions that used the frames' order. One object a rule.

    p, p̃   shares of correct completions with the frames in order (V) and with the contrast clip (Ṽ)
    d_it   log π(o_it | V) − log π(o_it | Ṽ) of token t of completion i, in nats
    Δ_i    log-prob contrast of completion i, in nats (`logprob_contrast`)

A rule compares V with Ṽ in one of two ways. `sampled`: the policy also answers the contrast clip, which gives
p̃. `scored`: the ordered completions are scored behind the contrast clip, which gives d_it. A rule then does
one of two things. A bonus r_t is added to the reward of correct completions. A gate g_i multiplies the
rewards that are paid for being right. G: ordered completions of a question. A new rule takes an entry in
RULES and its name in settings/training.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from video_r1.data.rollouts import Correct, Rollouts
from video_r1.processes import process_index
from video_r1.settings.training import TGRPOSettings

logger = logging.getLogger(__name__)

EXTREMES = 8  # tokens at either end of a completion's d_t
GATED = ("accuracy", "length", "judge")
"""Reward terms that are paid for being right: a gate multiplies them."""

Rule = Callable[[Rollouts, Correct, TGRPOSettings], Tensor]
"""(rollouts, which of them are right, settings) -> r_t or g [G] float32."""


@dataclass(frozen=True)
class TemporalRule:
    """How a rule compares a clip with its contrast clip, and how that changes the rewards.

    bonus: r_t, the reward term `temporal`. gate: g in [0, 1]; the term `temporal` is then what it takes away.
    floor: minimum added to a group's deviation as far as the gate makes it (`gate_deviation`).
    """

    contrast: Literal["sampled", "scored"] | None = None
    bonus: Rule | None = None
    gate: Rule | None = None
    floor: float = 0.0


def rule_of(settings: TGRPOSettings) -> TemporalRule:
    return RULES[settings.paid_rule]


# ---- Rules


def margin(rollouts: Rollouts, correct: Correct, settings: TGRPOSettings) -> Tensor:
    """r_t = α·(p − p̃) if p > p̃, else 0, for each correct completion (arXiv 2503.21776 v1)."""
    gap = 0.0 if correct.p_contrast is None else correct.p - correct.p_contrast
    return settings.alpha * max(0.0, gap) * correct.ordered.float()


def threshold(rollouts: Rollouts, correct: Correct, settings: TGRPOSettings) -> Tensor:
    """r_t = α if p ≥ μ·p̃, else 0, for each correct completion (arXiv 2503.21776 v4; μ = 1)."""
    if correct.p_contrast is None:
        return torch.zeros(len(correct.ordered))
    # 0.8 × 3/4 is a rounding error above 3/5: compare shares with more tolerance than that.
    reached = correct.p >= settings.temporal_threshold_mu * correct.p_contrast - 1e-9
    return (settings.alpha if reached else 0.0) * correct.ordered.float()


def likelihood_gate(rollouts: Rollouts, correct: Correct, settings: TGRPOSettings) -> Tensor:
    """g_i = 1 − α·exp(−max(0, Δ_i)) for a correct completion, 1 − α for another; 1 without a contrast.

    A graded answer that is not correct may still earn something. It gets the lowest factor, so that no gate
    makes a correct completion worth less than it.
    """
    if rollouts.token_contrasts is None:
        return torch.ones(len(correct.ordered))
    kept = torch.exp(-logprob_contrast(rollouts.token_contrasts).clamp(min=0.0))
    return 1.0 - settings.alpha * torch.where(correct.ordered, kept, torch.ones_like(kept))


def logprob_contrast(token_contrasts: Sequence[Tensor]) -> Tensor:
    """[G] float32, nats: Δ of each completion's d_t [L], the mean of the 8 largest plus the mean of the 8
    smallest, each of at most half of the tokens.

    Noise around 0 cancels between the two ends, and the length of the rest does not matter.
    """
    contrasts = []
    for tokens in token_contrasts:
        ordered, size = tokens.float().sort(descending=True).values, len(tokens)
        largest = ordered[: min(EXTREMES, -(-size // 2))]
        smallest = ordered[size - min(EXTREMES, size // 2) :]
        contrasts.append(sum((ends.mean() for ends in (largest, smallest) if len(ends)), torch.zeros(())))
    return torch.stack(contrasts)


RULES: dict[str, TemporalRule] = {
    "off": TemporalRule(),
    "margin": TemporalRule("sampled", bonus=margin),
    "threshold": TemporalRule("sampled", bonus=threshold),
    "likelihood_gate": TemporalRule("scored", gate=likelihood_gate, floor=0.1),
}


# ---- What a rule does to rewards


def total_reward(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    gate: Tensor | None = None,
    without: str | None = None,
) -> Tensor:
    """Return R = Σ_k w_k·r_k, [G] float32, where a gate g [G] multiplies the terms in GATED.

    rewards: each term [G]; a missing value (nan) adds nothing. without: leaves one term out: `temporal` with
    its gate, `accuracy` with the bonus that it earns.
    """
    gate = None if without == "temporal" else gate
    left_out = {without, "temporal"} if gate is not None or without == "accuracy" else {without}
    total = torch.zeros(())
    for name, values in rewards.items():
        if name not in left_out:
            paid = weights.get(name, 1.0) * values.nan_to_num(nan=0.0)
            total = total + (paid if gate is None or name not in GATED else paid * gate)
    return total


def gate_deviation(gate: Tensor, paid: Tensor) -> float:
    """Return the deviation of (g_i − ḡ)·B_i, ḡ = Σ g·B² ÷ Σ B²: what the gate g [G] adds to the deviation of
    a group's rewards beyond a factor that all would share. paid: B [G], the rewards that it multiplies.
    """
    if len(gate) < 2:
        return 0.0
    shared = (gate * paid.square()).sum() / paid.square().sum().clamp(min=1e-12)
    return float(((gate - shared) * paid).std())


def warn_of_cancelled_bonus(
    names: Sequence[str], weights: Mapping[str, float], settings: TGRPOSettings
) -> None:
    """Warn on rank 0 when the settings make the temporal reward cancel: if the rewards of a group have two
    values, advantages divided by its deviation are the same for any bonus (docs/t-grpo.md).
    """
    shared = rule_of(settings).contrast == "sampled" and "temporal" in names
    adds = shared and weights.get("temporal", 1.0) != 0
    telling = {name for name in names if weights.get(name, 1.0) != 0}
    two_values = telling <= {"accuracy", "format", "temporal"}
    if adds and two_values and settings.scale_rewards == "group" and process_index() == 0:
        rule = settings.temporal_rule
        logger.warning("temporal_rule %s: scale_rewards group divides its bonus out (docs/t-grpo.md)", rule)
