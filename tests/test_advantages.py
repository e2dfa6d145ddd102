"""Advantages against figures worked out by hand."""

import math

import pytest
import torch

from video_r1.training.advantages import deviation, group_advantages, updated_moments, without_variance

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
# First group: mean 1/2, squares 4 × 1/4, ÷ (4 − 1): std = √(1/3).
# All eight: mean 3/4, squares 6/16 + 2 × 9/16 = 3/2, ÷ (8 − 1): std = √(3/14).
HALF_BY_GROUP = 0.5 / (math.sqrt(1 / 3) + 1e-4)  # 0.8659
HALF_BY_BATCH = 0.5 / (math.sqrt(3 / 14) + 1e-4)  # 1.0799


@pytest.mark.parametrize(
    ("scale", "half"), [("group", HALF_BY_GROUP), ("batch", HALF_BY_BATCH), ("none", 0.5)]
)
def test_scales(scale, half: float) -> None:
    expected = torch.tensor([[half, -half, -half, half], [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(REWARDS, scale), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale) -> None:
    # 1.3 is not representable: the mean of seven of them in float32 is not 1.3 again
    rewards = torch.tensor([[1.3] * 7, [0.1 + 1.2] * 7], dtype=torch.float32)
    assert torch.equal(group_advantages(rewards, scale), torch.zeros(2, 7))
    assert without_variance(rewards).tolist() == [True, True]
    assert without_variance(REWARDS).tolist() == [False, True]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_has_no_advantage(scale) -> None:
    assert torch.equal(group_advantages(torch.tensor([[2.0]]), scale), torch.zeros(1, 1))


def test_moments_of_a_task() -> None:
    """Rewards 1 0 1 1: E[R] = E[R²] = 3/4. Then 2 0, of means 1 and 2: 0.99 of the old, 0.01 of the new."""
    first = updated_moments({}, torch.tensor([[1.0, 0.0], [5.0, 5.0], [1.0, 1.0]]), ["a", "b", "a"])
    assert first == {"a": (0.75, 0.75), "b": (5.0, 25.0)}
    then = updated_moments(first, torch.tensor([[2.0, 0.0]]), ["a"])
    assert then["a"] == pytest.approx((0.7525, 0.7625))
    assert then["b"] == first["b"]
    assert updated_moments(first, torch.tensor([[5.0, 5.0]]), ["b"])["b"] == pytest.approx((5.0, 25.0))
    assert deviation(then["a"]) == pytest.approx((0.7625 - 0.7525**2) ** 0.5)
    assert deviation(then["b"]) == 0.001  # equal rewards have none


def test_advantages_by_the_task() -> None:
    """±1/2 ÷ 0.5 for the first question; ÷ 0.05 the second would be at 10, so its own √(1/3) is taken."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    deviations = torch.tensor([0.5, 0.05])
    advantages = group_advantages(rewards, "task", task_deviations=deviations)
    assert advantages[0].tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, -0.5 / 0.5001, 0.5 / 0.5001])
    torch.testing.assert_close(advantages[1:], group_advantages(rewards[:1]))
