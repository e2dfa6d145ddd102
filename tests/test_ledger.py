"""The credit ledger: shares and signs by hand, and the warnings of twenty steps."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from test_temporal import credited, scored, with_advantages

from video_r1.training.ledger import Ledger


def untagged(letter: str) -> str:
    return f"<answer>{letter}</answer>"


def test_ledger_of_two_terms_by_hand() -> None:
    """Undivided. Accuracy 1, 1, 0, 0 and format 1, 0, 1, 0: A = 1, 0, 0, −1. Without accuracy A₋ = ½, −½, ½,
    −½: Σ|A − A₋| = ½ · 4, Σ|A| + Σ|A₋| = 2 + 2. Format's credit is blind to being right.
    """
    group = scored(
        ["A", untagged("A"), "B", untagged("B")], rewards=["accuracy", "format"], scale_rewards="none"
    )
    found = credited([group], scale_rewards="none")
    assert found["credit/accuracy"] == found["credit/format"] == pytest.approx(0.5)
    assert found["credit_sign/accuracy"] == pytest.approx(1.0)
    assert found["credit_sign/format"] == pytest.approx(0.0, abs=1e-9)


def test_ledger_of_a_bonus_that_cancels_and_one_that_counts() -> None:
    """p = 1/2, p̃ = 0: a bonus of 0.15. By the group's deviation it moves nothing; undivided it moves 0.15 of
    each |A| of 1/2 and 0.575: 0.075 ÷ 1.075.
    """
    answers: Any = {"answers": ["A", "A", "B", "B"], "contrast": ["B"], "rewards": ["accuracy", "temporal"]}
    groups = [scored(**answers)]
    assert credited(groups)["credit/temporal"] < 1e-3
    found = credited(groups, scale_rewards="none")
    assert found["credit/temporal"] == pytest.approx(0.075 / 1.075)
    assert found["credit_sign/temporal"] == pytest.approx(1.0)


def test_ledger_of_a_gate_and_of_what_it_multiplies() -> None:
    """Without accuracy the gate has nothing to multiply; the shut one takes 0.9 of A₁ = ½."""
    group = scored(
        ["A", "A", "B", "B"], [0.0, 50.0, 0.0, 0.0], rewards=["accuracy", "temporal"],
        temporal_rule="likelihood_gate",
    )  # fmt: skip
    found = credited([group], temporal_rule="likelihood_gate", scale_rewards="none")
    # A = −0.175, 0.725, −0.275, −0.275; without the gate ±0.5
    assert found["credit/temporal"] == pytest.approx((0.675 + 3 * 0.225) / (1.45 + 2.0))
    assert found["credit/accuracy"] == pytest.approx(1.0)


def test_ledger_takes_no_gate_for_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    for _ in range(21):
        group = scored(["A", "A", "A", "B"], [0.0, 0.0, 9.0, 0.0], temporal_rule="likelihood_gate")
        with caplog.at_level(logging.WARNING):
            series = ledger.add(with_advantages([group], temporal_rule="likelihood_gate"), gated=True)
    assert series["credit_sign/temporal"] < -0.2
    assert not [record for record in caplog.records if "against accuracy" in record.message]


@pytest.mark.parametrize(
    ("rewards", "weights", "said"),
    [
        ((["A", "A", "B", "B"], ["accuracy", "temporal"]), {}, ["reward temporal moved 0.0%"]),
        ((["A", "A", "B", "B"], ["accuracy", "format"]), {}, ["reward format moved 0.0%"]),
        ((["A", "A", "B", "B"], ["accuracy"]), {}, []),
        (
            ([untagged("A"), untagged("A"), "B", "B"], ["accuracy", "format"]),
            {"format": 3.0},
            ["accuracy moved 0.0%", "format works against accuracy"],
        ),
        ((["A", untagged("A"), "B", untagged("B")], ["accuracy", "format"]), {"format": 0.1}, []),
    ],
)
def test_ledger_warns_after_twenty_steps(
    rewards: Any, weights: Any, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    answers, names = rewards
    ledger, warned = Ledger(), []
    for step in range(22):
        group = scored(answers, contrast=["B"], rewards=names, reward_weights=weights)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ledger.add(with_advantages([group], temporal_rule="margin"))
        warned += [(step, record.message) for record in caplog.records if "reward " in record.message]
    assert [step for step, _ in warned] == [19] * len(said)
    assert all(part in line for part, (_, line) in zip(said, warned, strict=True))
