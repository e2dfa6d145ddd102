"""Rewards beside correctness: format, frame order and length. Each function sees one question's group.

G is the number of ordered responses to the question, H that of its shuffled ones.
Source of the temporal and the length reward: T-GRPO, arXiv 2503.21776.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from video_r1.data.grounding import GROUNDING_FORMS, parse_located
from video_r1.settings.training import TemporalRule

_FORMAT = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


KEY_TOKENS = 5  # one token in so many of a response is a key token of its contrast


class TemporalReward(NamedTuple):
    bonus: Tensor  # [G] float32
    p: float  # share of correct ordered responses
    p_shuffled: float  # that of shuffled ones; nan where the question has none


def format_reward(completion: str, problem_type: str = "") -> float:
    """1 when the whole completion is `<think>…</think>`, white space, `<answer>…</answer>`, else 0.

    Each of the four tags has to occur exactly once: a second answer is no valid format. The answer to a
    question of a grounding type also has to have its form.
    """
    once = all(completion.count(tag) == 1 for tag in _TAGS)
    match = _FORMAT.fullmatch(completion) if once else None
    if match is not None and problem_type in GROUNDING_FORMS:
        return float(parse_located(match.group(2), problem_type) is not None)
    return float(match is not None)


def temporal_reward(
    correct: Tensor,
    correct_shuffled: Tensor,
    rule: TemporalRule = "margin",
    alpha: float = 0.3,
    mu: float = 1.0,
) -> TemporalReward:
    """The reward for being right because of the frame order, added to correct ordered responses only.

    correct: [G] bool; correct_shuffled: [H] bool, H = 0 for an image, which earns nothing.
    margin:    r_t = α·(p − p̃) if p > p̃, else 0
    threshold: r_t = α          if p ≥ μ·p̃, else 0   (arXiv 2503.21776 v4; μ = 1)
    others:    r_t = 0  (`weight` and `tokens` multiply advantages: training/advantages.py; by likelihood:
               `likelihood_reward`, `gate_reward`)
    """
    p = _share(correct)
    p_shuffled = _share(correct_shuffled)
    amount = 0.0
    if len(correct_shuffled) > 0:
        if rule == "margin":
            amount = alpha * max(0.0, p - p_shuffled)
        elif rule == "threshold":
            # 0.8 × 3/4 is a rounding error above 3/5: shares are compared with more room than that.
            amount = alpha if p >= mu * p_shuffled - 1e-9 else 0.0
        elif rule not in get_args(TemporalRule):
            raise ValueError(
                f"unknown temporal rule {rule!r}; it is one of {', '.join(get_args(TemporalRule))}"
            )
    return TemporalReward(amount * correct.to(torch.float32), p, p_shuffled)


def likelihood_reward(correct: Tensor, drops: Tensor, rule: TemporalRule, alpha: float = 0.3) -> Tensor:
    """The reward for a correct response by what the contrast clip takes from its own likelihood.

    correct: [G] bool; drops: [G] float, Δ_i in nats a token. Returns [G] float32:
    likelihood:      α·(1 − exp(−Δ_i)) if Δ_i > 0, else 0: the share of its tokens' probability that is lost
    likelihood_apart: the same, but added to the advantages (training/advantages.py)
    likelihood_step: α if Δ_i > mean_j Δ_j, else 0                       (TaRO, arXiv 2606.09248)
    Unlike a bonus that all correct responses share, it does not cancel in advantages.
    """
    if len(correct) != len(drops):
        raise ValueError(f"{len(correct)} responses but {len(drops)} drops")
    if rule in ("likelihood", "likelihood_apart"):
        amounts = -torch.expm1(-drops.clamp(min=0.0))
    elif rule == "likelihood_step":
        amounts = (drops > drops.mean()).to(drops.dtype)
    else:
        raise ValueError(f"the rule {rule!r} is none of those by likelihood")
    return alpha * correct.to(torch.float32) * amounts.to(torch.float32)


def gate_reward(accuracy: Tensor, drops: Tensor, alpha: float) -> Tensor:
    """−α·a_i·exp(−Δ_i), between −α·a_i and 0: a response keeps of its accuracy what the contrast clip takes.

    accuracy: [G] float in [0, 1]; drops: [G] float, Δ_i of the key tokens (`key_drops`). Returns [G] float32.
    In all a_i·(1 − α·exp(−Δ_i)) is earned: with equal drops a better answer earns more, graded ones included.
    """
    if len(accuracy) != len(drops):
        raise ValueError(f"{len(accuracy)} responses but {len(drops)} drops")
    return -alpha * (accuracy * torch.exp(-drops.clamp(min=0.0))).to(torch.float32)


def key_drops(token_drops: Sequence[Tensor]) -> Tensor:
    """[G] float32: the mean of the largest fifth (⌈L/5⌉) of each response's drops d_t [L], in nats.

    Most tokens of a response say nothing of the frames; a mean over all of them dilutes those that do.
    """
    largest = (drops.sort(descending=True).values[: -(-len(drops) // KEY_TOKENS)] for drops in token_drops)
    return torch.stack([drops.sum() / max(1, len(drops)) for drops in largest])


def length_reward(
    correct: Tensor, lengths: Tensor, omega: float = 0.2, shortest: int = 320, longest: int = 512
) -> Tensor:
    """ω for each correct response whose length lies in [shortest, longest] tokens, else 0.

    correct: [G] bool; lengths: [G] int, tokens of each completion. Returns [G] float32.
    """
    if len(correct) != len(lengths):
        raise ValueError(f"{len(correct)} responses but {len(lengths)} lengths")
    inside = (lengths >= shortest) & (lengths <= longest)
    return omega * (correct.to(torch.bool) & inside).to(torch.float32)


def has_self_reflection(text: str, phrases: Sequence[str]) -> bool:
    """Whether any of the phrases occurs in the text as whole words, in upper or lower case."""
    return any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) for phrase in phrases)


def _share(correct: Tensor) -> float:
    """Share of true entries as the quotient of two whole numbers, so that equal shares compare equal."""
    return int(correct.sum()) / len(correct) if len(correct) else float("nan")
