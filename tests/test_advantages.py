"""Advantages against figures worked out by hand."""

import math

import pytest
import torch

from video_r1.training.advantages import group_advantages, without_variance

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


def test_groups_are_independent_of_their_neighbours() -> None:
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = group_advantages(rewards)
    for row in range(5):
        torch.testing.assert_close(together[row : row + 1], group_advantages(rewards[row : row + 1]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale) -> None:
    # 1.3 is not representable: the mean of seven of them in float32 is not 1.3 again
    rewards = torch.tensor([[1.3] * 7, [0.1 + 1.2] * 7], dtype=torch.float32)
    assert torch.equal(group_advantages(rewards, scale), torch.zeros(2, 7))
    assert without_variance(rewards).tolist() == [True, True]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_has_no_advantage(scale) -> None:
    assert torch.equal(group_advantages(torch.tensor([[2.0]]), scale), torch.zeros(1, 1))


def test_groups_without_variance() -> None:
    assert without_variance(REWARDS).tolist() == [False, True]


def test_wrong_requests() -> None:
    with pytest.raises(ValueError, match="shape"):
        group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="'rank'"):
        group_advantages(REWARDS, "rank")  # type: ignore[arg-type]
