"""Rules that the package does not have: rewards and advantages against figures by hand."""

import math
from typing import Any, cast

import pytest
import torch

from research.temporal_credit.variants import variant
from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import RolloutGroup
from video_r1.rewards.temporal import RULES, key_drops
from video_r1.settings.training import TGRPOSettings
from video_r1.training import tgrpo

SETTINGS = TGRPOSettings(temporal_alpha=0.3, length_reward=0)


def group(correct: list[float], drops: list[float]) -> RolloutGroup:
    """A question with one token in each response; the temporal reward is that of the rule in force."""
    accuracy = torch.tensor(correct)
    sample = Sample(1, "?", "video", "multiple choice", "<answer>A</answer>", "/v.mp4", ("A. a", "B. b"))
    made = RolloutGroup(
        sample=sample, prompt=cast(Any, None), ordered=[], shuffled_prompt=None, shuffled=[],
        rewards={"accuracy": accuracy}, total_reward=accuracy, advantages=torch.zeros_like(accuracy),
        p=float(accuracy.mean()), p_shuffled=None, base_reward=accuracy,
    )  # fmt: skip
    made.token_drops = [torch.tensor([drop]) for drop in drops]
    reward = RULES["likelihood_gate"].reward
    assert reward is not None
    made.rewards["temporal"] = reward(made, accuracy, accuracy > 0.5, SETTINGS)
    made.total_reward = accuracy + made.rewards["temporal"]
    return made


def test_likelihood_pays_the_lost_share_of_probability() -> None:
    """exp(−ln 2) = 1/2 is lost: 0.3 × 1/2. Nothing for a gain or a wrong answer."""
    with variant("likelihood"):
        paid = group([1.0, 1.0, 0.0], [math.log(2), -0.5, 2.0]).rewards["temporal"]
    torch.testing.assert_close(paid, torch.tensor([0.15, 0.0, 0.0]))
    assert group([1.0], [0.0]).rewards["temporal"].tolist() == pytest.approx([-0.3])  # the gate is back


def test_a_bonus_added_apart_counts_in_its_own_unit() -> None:
    """In a group that is right throughout nothing divides it; in a mixed one it is added to GRPO's."""
    with variant("apart-0.3"):
        alike = group([1.0] * 4, [math.log(2), 0.0, 0.0, 0.0])
        mixed = group([1.0, 1.0, 0.0, 0.0], [math.log(2), 0.0, 0.0, 0.0])
        tgrpo.credit([alike, mixed], SETTINGS)
    own = [0.15 - 0.0375, -0.0375, -0.0375, -0.0375]
    assert alike.advantages.tolist() == pytest.approx(own, abs=1e-6)
    plain = 0.5 / ((4 * 0.25 / 3) ** 0.5 + 1e-4)
    assert mixed.advantages.tolist() == pytest.approx(
        [plain + own[0], plain + own[1], own[2] - plain, own[3] - plain], abs=1e-6
    )


@pytest.mark.parametrize(("rule", "low", "high"), [("gate-floor", 0.01, 0.03), ("gate-frozen", 1.0, 1.5)])
def test_only_the_gate_with_a_floor_keeps_small_differences_small(rule: str, low: float, high: float) -> None:
    with variant(rule):
        alike = group([1.0] * 4, [0.01, 0.02, 0.02, 0.03])
        tgrpo.credit([alike], SETTINGS)
    assert low < alike.advantages.abs().max() < high


@pytest.mark.parametrize(("rule", "mean"), [("gate-tenth", 3.0), ("gate-frozen", 2.0), ("gate-all", 0.2)])
def test_share_of_key_tokens(rule: str, mean: float) -> None:
    with variant(rule):
        found = key_drops([torch.tensor([3.0, 1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])])
    assert found.item() == pytest.approx(mean)
