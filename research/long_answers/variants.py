"""Gates that the experiment compares and the package does not have, each in the place of `likelihood_gate`.

    gate-fifth     Δ: mean of the largest fifth of a completion's d_t
    gate-sum       Δ: Σ_t d_t
    gate-follows   1 − α·(1 − (1 − e^−Δ)·κ), Δ as in the package, and κ ∈ [0, 1] the share of the
                   conclusion's probability that is left without frames: it follows from the description

All have the package's minimum of the deviation, so that only what a gate reads differs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from research.temporal_credit.variants import key_drops
from video_r1.data.prompts import Prompt, blind_prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Correct, Rollouts
from video_r1.rewards import temporal
from video_r1.rewards.temporal import TemporalRule, logprob_contrast
from video_r1.settings.training import TGRPOSettings
from video_r1.training import step, tgrpo

CONCLUSION = 24
"""Last tokens of a completion: the conclusion, the closing tag and the answer."""


def opened(contrast: Tensor) -> Tensor:
    """Return 1 − e^−max(0, Δ)."""
    return -torch.expm1(-contrast.clamp(min=0.0))


def follows(blind_drops: Sequence[Tensor]) -> Tensor:
    """[G] float32: κ = e^−max(0, Σ d_t) over the conclusion, d_t [L] against the prompt without frames."""
    lost = torch.stack([drops[-CONCLUSION:].float().sum() for drops in blind_drops])
    return torch.exp(-lost.clamp(min=0.0))


def fifth(drops: Sequence[Tensor]) -> Tensor:
    return opened(key_drops(drops))


def whole(drops: Sequence[Tensor]) -> Tensor:
    return opened(torch.stack([values.float().sum() for values in drops]))


def following(drops: Sequence[Tensor]) -> Tensor:
    """drops: each the d_t of the contrast, then those without frames [2 L]."""
    halves = [values.chunk(2) for values in drops]
    frozen, blind = zip(*halves, strict=True)
    return opened(logprob_contrast(frozen)) * follows(blind)


OPENINGS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "gate-fifth": fifth, "gate-sum": whole, "gate-follows": following,
}  # fmt: skip
"""By variant: how far the gate opens, [G] float32 in [0, 1], by the completions' d_t."""


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Make the temporal rule `likelihood_gate` the variant of this name; other names change nothing."""
    if name not in OPENINGS:
        yield
        return

    def gate(rollouts: Rollouts, correct: Correct, settings: TGRPOSettings) -> Tensor:
        if rollouts.token_contrasts is None:
            return torch.ones(len(correct.ordered))
        shut = 1.0 - OPENINGS[name](rollouts.token_contrasts)
        return 1.0 - settings.alpha * torch.where(correct.ordered, shut, torch.ones_like(shut))

    with ExitStack() as changes:
        rule = TemporalRule("scored", gate=gate, floor=temporal.RULES["likelihood_gate"].floor)
        changes.enter_context(patch.dict(temporal.RULES, likelihood_gate=rule))
        if name == "gate-follows":
            for replaced in _blind_too():
                changes.enter_context(replaced)
        yield


def _blind_too() -> list[Any]:
    """Return patches with which every completion is also scored without frames: its d_t double in length."""
    built, compared = tgrpo.build_question, step.token_contrasts
    blind: dict[int, Prompt] = {}  # by the question's seed

    def build_question(sample: Any, media: Any, builder: Any, *rest: Any) -> Question:
        question = built(sample, media, builder, *rest)
        blind[question.seed] = blind_prompt(sample, media, builder)
        return question

    def token_contrasts(
        model: Any, rollouts: Sequence[Rollouts], temperature: float, size: int, as_sampled: bool = True
    ) -> list[list[Tensor] | None]:
        frozen = compared(model, rollouts, temperature, size, as_sampled)
        unseen = [
            replace(one, vision=None, question=replace(one.question, contrast=blind.pop(one.question.seed)))
            for one in rollouts
        ]
        without = compared(model, unseen, temperature, size, as_sampled)
        return [
            None if one is None or two is None
            else [torch.cat(both) for both in zip(one, two, strict=True)]
            for one, two in zip(frozen, without, strict=True)
        ]  # fmt: skip

    return [
        patch.object(tgrpo, "build_question", build_question),
        patch.object(step, "token_contrasts", token_contrasts),
    ]
