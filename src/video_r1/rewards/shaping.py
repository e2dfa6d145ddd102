"""Rewards for format and length (T-GRPO, arXiv 2503.21776)."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from video_r1.data.grounding import GROUNDING_FORMS, parse_located

_FORMAT = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


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
