"""Temporal rules: what each pays for using the order of the frames, one object for each rule.

    p, p̃   shares of correct completions with the frames in order (V) and with the contrast clip (Ṽ)
    d_it   log π(o_it | V) − log π(o_it | Ṽ), the drop of token t of completion i, in nats
    Δ_i    mean of d_it over the tokens t of completion i

A rule compares V with Ṽ in one of two ways. `sampled`: the policy also answers the contrast clip, which gives
p̃. `scored`: the ordered completions are scored behind the contrast clip, which gives d_it. G: ordered
completions of a question. A new rule takes an entry in RULES and its name in settings/training.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from video_r1.data.rollouts import RolloutGroup
from video_r1.processes import process_index
from video_r1.settings.training import TGRPOSettings

logger = logging.getLogger(__name__)

KEY_SHARE = 5  # one token in five of a completion is a key token
GATE_FLOOR = 0.1  # rewards of right completions that differ by less stay small advantages

Reward = Callable[[RolloutGroup, Tensor, Tensor, TGRPOSettings], Tensor]
"""(group, accuracy [G], correct [G] bool, settings) -> r_t [G] float32."""


@dataclass(frozen=True)
class TemporalRule:
    """How a rule compares a clip with its contrast clip, and what a completion earns for it."""

    contrast: Literal["sampled", "scored"] | None = None
    reward: Reward | None = None
    pays_all_alike: bool = False  # the correct completions of a question: see `warn_of_cancelled_bonus`
    floor: float = 1e-4  # added to the deviation of rewards by which advantages are divided


def rule_of(settings: TGRPOSettings) -> TemporalRule:
    return RULES[settings.temporal_rule]


# ---- Rewards


def margin(group: RolloutGroup, accuracy: Tensor, correct: Tensor, settings: TGRPOSettings) -> Tensor:
    """r_t = α·(p − p̃) if p > p̃, else 0, for each correct completion."""
    return settings.alpha * max(0.0, group.margin or 0.0) * correct.float()


def threshold(group: RolloutGroup, accuracy: Tensor, correct: Tensor, settings: TGRPOSettings) -> Tensor:
    """r_t = α if p ≥ μ·p̃, else 0, for each correct completion (arXiv 2503.21776 v4; μ = 1)."""
    if group.p_shuffled is None:
        return torch.zeros(len(correct))
    # 0.8 × 3/4 is a rounding error above 3/5: compare shares with more tolerance than that.
    reached = group.p >= settings.temporal_threshold_mu * group.p_shuffled - 1e-9
    return (settings.alpha if reached else 0.0) * correct.float()


def likelihood_gate(
    group: RolloutGroup, accuracy: Tensor, correct: Tensor, settings: TGRPOSettings
) -> Tensor:
    """r_t = −α·a_i·exp(−Δ_i), where Δ_i is the mean over the key tokens (`key_drops`) and a_i the accuracy.

    In all a_i·(1 − α·exp(−Δ_i)) is earned: with equal drops a better answer earns more, graded ones included.
    """
    if group.token_drops is None:
        return torch.zeros(len(correct))
    kept = torch.exp(-key_drops(group.token_drops).clamp(min=0.0))
    return -settings.alpha * (accuracy * kept).float()


def key_drops(token_drops: Sequence[Tensor]) -> Tensor:
    """[G] float32: the mean of the largest fifth (⌈L/5⌉) of each completion's drops d_t [L], in nats: most
    tokens say nothing about the frames.
    """
    largest = (drops.sort(descending=True).values[: -(-len(drops) // KEY_SHARE)] for drops in token_drops)
    return torch.stack([drops.sum() / max(1, len(drops)) for drops in largest])


RULES: dict[str, TemporalRule] = {
    "off": TemporalRule(),
    "margin": TemporalRule("sampled", reward=margin, pays_all_alike=True),
    "threshold": TemporalRule("sampled", reward=threshold, pays_all_alike=True),
    "likelihood_gate": TemporalRule("scored", reward=likelihood_gate, floor=GATE_FLOOR),
}


def warn_of_cancelled_bonus(
    names: Sequence[str], weights: Mapping[str, float], settings: TGRPOSettings
) -> None:
    """Warn on rank 0 when the settings make the temporal reward cancel: if the rewards of a group have two
    values, advantages divided by its deviation are the same for any bonus (docs/t-grpo.md).
    """
    shared = rule_of(settings).pays_all_alike and "temporal" in names
    adds = shared and settings.alpha * weights.get("temporal", 1.0) != 0
    telling = {name for name in names if weights.get(name, 1.0) != 0}
    two_values = telling <= {"accuracy", "format", "temporal"}
    if adds and two_values and settings.scale_rewards == "group" and process_index() == 0:
        rule = settings.temporal_rule
        logger.warning("temporal_rule %s: scale_rewards group divides its bonus out (docs/t-grpo.md)", rule)
