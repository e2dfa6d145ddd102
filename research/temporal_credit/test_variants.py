"""Rules that the package does not have: rewards and advantages against figures by hand."""

import math

import pytest
import torch
from test_temporal import scored

from research.temporal_credit.variants import key_drops, variant
from video_r1.data.rollouts import Group, Rewards, Rollouts
from video_r1.settings.training import TGRPOSettings
from video_r1.training import tgrpo

SETTINGS = TGRPOSettings(temporal_rule="likelihood_gate", temporal_alpha=0.3, length_reward=0)


def group(letters: str, drops: list[float]) -> Group:
    """A question with one token in each response, scored by the rule in force."""
    return scored(
        [*letters],
        drops,
        rewards=["accuracy", "temporal"],
        temporal_rule="likelihood_gate",
        temporal_alpha=0.3,
    )


def made(*groups: Group) -> tuple[list[Rollouts], list[Rewards]]:
    return [group.rollouts for group in groups], [group.rewards for group in groups]


def test_likelihood_pays_the_lost_share_of_probability() -> None:
    """exp(−ln 2) = 1/2 is lost: 0.3 × 1/2. Nothing for a gain or a wrong answer."""
    with variant("likelihood"):
        paid = group("AAB", [math.log(2), -0.5, 2.0]).rewards.terms["temporal"]
    torch.testing.assert_close(paid, torch.tensor([0.15, 0.0, 0.0]))
    assert group("A", [0.0]).rewards.terms["temporal"].tolist() == pytest.approx([-0.3])  # the gate is back


def test_a_bonus_added_apart_counts_in_its_own_unit() -> None:
    """In a group that is right throughout nothing divides it; in a mixed one it is added to GRPO's."""
    with variant("apart-0.3"):
        alike = group("AAAA", [math.log(2), 0.0, 0.0, 0.0])
        mixed = group("AABB", [math.log(2), 0.0, 0.0, 0.0])
        alike, mixed = tgrpo.advantages(*made(alike, mixed), SETTINGS)
    own = [0.15 - 0.0375, -0.0375, -0.0375, -0.0375]
    assert alike.advantages.tolist() == pytest.approx(own, abs=1e-6)
    plain = 0.5 / ((4 * 0.25 / 3) ** 0.5 + 1e-4)
    assert mixed.advantages.tolist() == pytest.approx(
        [plain + own[0], plain + own[1], own[2] - plain, own[3] - plain], abs=1e-6
    )


@pytest.mark.parametrize(("rule", "low", "high"), [("gate-floor", 0.01, 0.03), ("gate-frozen", 1.0, 1.5)])
def test_only_the_gate_with_a_floor_keeps_small_differences_small(rule: str, low: float, high: float) -> None:
    with variant(rule):
        alike = group("AAAA", [0.01, 0.02, 0.02, 0.03])
        (alike,) = tgrpo.advantages(*made(alike), SETTINGS)
    assert low < alike.advantages.abs().max() < high


@pytest.mark.parametrize(("share", "mean"), [(10, 3.0), (5, 2.0), (1, 0.2)])
def test_share_of_key_tokens(share: int, mean: float) -> None:
    drops = torch.tensor([3.0, 1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert key_drops([drops], share).item() == pytest.approx(mean)
