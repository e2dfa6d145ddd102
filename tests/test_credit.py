"""What the temporal term does to the advantages: its series, its warning, and its rules, by hand."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
import torch

from video_r1.data.records import Sample
from video_r1.data.rollouts import RolloutGroup
from video_r1.rewards.group import reward_terms
from video_r1.settings.training import TGRPOSettings
from video_r1.training.checks import warn_of_cancelled_bonus
from video_r1.training.metrics import Meter, describe_credit
from video_r1.training.rollouts import compare


def group(correct: str, bonus: float = 0.0, p_shuffled: float | None = 0.0) -> RolloutGroup:
    """A question whose responses are right (1) or wrong (0), the right ones with a temporal reward."""
    accuracy = torch.tensor([float(mark) for mark in correct])
    sample = Sample(1, "?", "video", "multiple choice", "<answer>A</answer>", "/v.mp4", ("A. a", "B. b"))
    return RolloutGroup(
        sample=sample, prompt=cast(Any, None), ordered=[], shuffled_prompt=None, shuffled=[],
        rewards={"accuracy": accuracy, "temporal": bonus * accuracy}, total_reward=(1 + bonus) * accuracy,
        advantages=torch.zeros_like(accuracy), p=float(accuracy.mean()), p_shuffled=p_shuffled,
        base_reward=accuracy,
    )  # fmt: skip


def series(groups: list[RolloutGroup], **settings: Any) -> dict[str, float]:
    compare(groups, TGRPOSettings(**settings))
    meter = Meter()
    for each in groups:
        describe_credit(meter, each)
    return meter.drain(1)


def test_credit_of_a_bonus_that_cancels() -> None:
    """Scaled by the group, 1 + b and 0 are what 1 and 0 are, but for the 1e-4 beside the deviation."""
    seen = series([group("1100", bonus=0.15), group("1000", bonus=0.075), group("1100")])
    assert seen["temporal/credit"] < 1e-3
    assert seen["temporal/credit_groups"] == 0.0  # of the two that were paid


def test_credit_of_a_bonus_that_counts() -> None:
    """Without scaling, A is 1 + b times what it was. "1100": ‖A₀‖² = 4/4, changed by 0.15 of it; "1000":
    ‖A₀‖² = 9/16 + 3/16, unpaid. The root of 0.15² · 1 ÷ (1 + 3/4)."""
    seen = series([group("1100", bonus=0.15), group("1000")], scale_rewards="none")
    assert seen["temporal/credit"] == pytest.approx((0.15**2 / 1.75) ** 0.5, rel=1e-5)
    assert seen["temporal/credit_groups"] == 1.0
    # 0.012 × 1/2 changes no advantage by more than 0.01
    seen = series([group("1100", bonus=0.15), group("1100", bonus=0.012)], scale_rewards="none")
    assert seen["temporal/credit_groups"] == 0.5


def test_credit_is_one_quotient_over_several_steps_and_processes() -> None:
    meter = Meter()
    meter.norms("temporal/credit", torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0]))
    meter.norms("temporal/credit", torch.tensor([0.0, 4.0]), torch.tensor([2.0, 4.0]))
    assert meter.drain(2) == {"temporal/credit": 1.0}  # √(9 + 16) ÷ √(5 + 20)
    assert meter.drain(1) == {}


def test_groups_without_variance_have_no_credit() -> None:
    assert "temporal/credit" not in series([group("1111", bonus=0.3)])


def mine(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("rewards", "settings", "warned"),
    [
        (None, {"length_reward": 0.0}, True),
        (None, {"length_reward": 0.0, "temporal_rule": "threshold"}, True),
        (["accuracy"], {}, True),  # a list of rewards has no length reward unless it names it
        (None, {}, False),  # the length reward varies among right answers
        (["accuracy", mine], {}, False),
        (["accuracy", mine], {"reward_weights": {"mine": 0.0}}, True),
        (None, {"length_reward": 0.0, "temporal_rule": "off"}, False),
        (None, {"length_reward": 0.0, "temporal_alpha": 0.0}, False),
        (None, {"length_reward": 0.0, "scale_rewards": "none"}, False),
        (None, {"length_reward": 0.0, "scale_rewards": "batch"}, False),
    ],
)
def test_credit_that_cancels_is_warned_of(
    rewards: Any, settings: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = TGRPOSettings(**settings)
    with caplog.at_level(logging.WARNING):
        warn_of_cancelled_bonus(reward_terms(rewards, chosen), chosen)
    said = [record.message for record in caplog.records]
    assert any("scale_rewards" in line and "temporal/credit" in line for line in said) == warned
