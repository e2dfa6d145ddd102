"""Temporal rules: what each adds to rewards and advantages, by hand and in the gradient."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from test_tgrpo import assert_same_gradients, plain_logprobs
from tgrpo_trainers import first_step, make_trainer, policy_of
from torch import Tensor

from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.rewards.scoring import RewardTerms, reward_terms, score_group
from video_r1.rewards.temporal import (
    RULES,
    key_drops,
    warn_of_cancelled_bonus,
)
from video_r1.settings.training import SampledRule, TemporalRule, TGRPOSettings
from video_r1.training.callbacks import TaskMoments
from video_r1.training.metrics import Meter, describe_credit
from video_r1.training.tgrpo import credit


def test_every_rule_of_the_settings_is_defined() -> None:
    assert set(RULES) == set(get_args(TemporalRule))
    assert {name for name, rule in RULES.items() if rule.contrast == "sampled"} == set(get_args(SampledRule))


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
    credit(groups, TGRPOSettings(temporal_rule="margin", **settings))
    meter = Meter()
    for each in groups:
        describe_credit(meter, each)
    return meter.drain()


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


def reward_of(rule: str, accuracy: list[float], drops: list[float] | None = None, **settings: Any) -> Tensor:
    """r_t of the rule; drops: one d_t for each response, which is then its Δ as well."""
    scored = group("0" * len(accuracy), p_shuffled=None)
    scored.token_drops = None if drops is None else [torch.tensor([drop]) for drop in drops]
    given, reward = torch.tensor(accuracy), RULES[rule].reward
    assert reward is not None
    return reward(scored, given, given > 0.5, TGRPOSettings(temporal_rule=cast(Any, rule), **settings))


@pytest.mark.parametrize(
    ("rule", "mu", "ordered", "shuffled", "amount"),
    [
        # p = 6/8, p̃ = 1/4: 0.3 × 0.5
        ("margin", 1.0, "11111100", "1000", 0.15),
        ("threshold", 1.0, "11111100", "1000", 0.3),
        # p = p̃ = 1/2: no margin, but the threshold is reached
        ("threshold", 1.0, "11110000", "1100", 0.3),
        # p = 1/4 < p̃ = 1/2; 0.4 × 1/2 is below p
        ("threshold", 1.0, "11000000", "1100", 0.0),
        # p = 3/5 and 0.8 × 3/4 are the same number, not so in binary
        ("threshold", 0.8, "11100", "1110", 0.3),
        # an image has no shuffled responses
        ("margin", 1.0, "1110", "", 0.0),
    ],
)
def test_rewards_by_shares(rule: Any, mu: float, ordered: str, shuffled: str, amount: float) -> None:
    def rollouts(marks: str) -> list[Rollout]:
        texts = [f"<answer>{'A' if mark == '1' else 'B'}</answer>" for mark in marks]
        return [Rollout(torch.tensor([1]), torch.zeros(1), text, "stop") for text in texts]

    settings = TGRPOSettings(temporal_rule=rule, temporal_threshold_mu=mu, length_reward=0)
    question = Question(group("1").sample, cast(Any, None), cast(Any, None), 0)
    terms = RewardTerms(("accuracy", "temporal"))
    found = score_group(question, rollouts(ordered), rollouts(shuffled), terms, settings)
    torch.testing.assert_close(found.rewards["temporal"], amount * found.rewards["accuracy"])
    assert found.p == ordered.count("1") / len(ordered)
    assert found.p_shuffled == (shuffled.count("1") / len(shuffled) if shuffled else None)


def mine(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("rewards", "settings", "warned"),
    [
        (None, {"length_reward": 0.0}, True),
        (None, {}, False),  # the length reward varies among right answers
        (["accuracy", mine], {}, False),
        (["accuracy", mine], {"reward_weights": {"mine": 0.0}}, True),
        (None, {"length_reward": 0.0, "temporal_alpha": 0.0}, False),
        (None, {"length_reward": 0.0, "temporal_rule": "likelihood_gate"}, False),
    ],
)
def test_credit_that_cancels_is_warned_of(
    rewards: Any, settings: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = TGRPOSettings(**{"temporal_rule": "margin", **settings})
    with caplog.at_level(logging.WARNING):
        terms = reward_terms(rewards, chosen)
        warn_of_cancelled_bonus(terms.names, terms.weights, chosen)
    said = [record.message for record in caplog.records]
    assert any("scale_rewards" in line and len(line.split()) < 16 for line in said) == warned


def test_credit_reaches_the_gradient_with_the_deviation_of_a_task() -> None:
    """The bonus enters the moments with weight 0.01 from the second step on: it no longer cancels."""
    tasks = TaskMoments()
    settings = TGRPOSettings(temporal_rule="margin", scale_rewards="task")
    credit([group("1100")], settings, tasks)  # E[R] = E[R²] = 1/2, deviation 1/2
    paid = group("1100", bonus=0.15)  # E[R] = 0.50075, E[R²] = 0.5016125
    credit([paid], settings, tasks)
    std = (0.5016125 - 0.50075**2) ** 0.5
    assert paid.advantages[0].item() == pytest.approx(0.575 / (std + 1e-4), rel=1e-5)
    assert paid.base_advantages is not None
    assert paid.base_advantages[0].item() == pytest.approx(0.5 / (std + 1e-4), rel=1e-5)


# ---- likelihood


def test_rewards_by_likelihood() -> None:
    """With α = 1 a response keeps of its accuracy what is lost: 0.5 of 1, 0 of 1 for a gain, 0.259 of 0.6."""
    accuracy, drops = [1.0, 1.0, 0.0, 0.6], [math.log(2), -0.5, 2.0, 0.3]
    gate = reward_of("likelihood_gate", accuracy, drops, temporal_alpha=1.0)
    torch.testing.assert_close(gate, torch.tensor([-0.5, -1.0, 0.0, -0.6 * 0.7408182]))
    assert not reward_of("likelihood_gate", accuracy).any()  # an image


def test_small_differences_between_right_responses_stay_small() -> None:
    """The deviation of the rewards 1 − 0.9·exp(−Δ) is 0.0072, and A is ±0.0088 ÷ (0.0072 + 0.1). A group of
    right and wrong responses has 0.5 ÷ (0.577 + 0.1).
    """
    alike, mixed = group("1111"), group("1100")
    settings = TGRPOSettings(temporal_rule="likelihood_gate")
    paid = reward_of("likelihood_gate", [1.0] * 4, [0.01, 0.02, 0.02, 0.03])
    alike.total_reward = alike.total_reward + paid
    credit([alike, mixed], settings)
    assert alike.advantages.tolist() == pytest.approx([-0.0825, 0.0002, 0.0002, 0.0821], abs=2e-4)
    assert mixed.advantages[0].item() == pytest.approx(0.5 / ((1 / 3) ** 0.5 + 0.1))


def test_key_drops() -> None:
    """The largest fifth: 2 of 6 tokens (3 and 1), 1 of 3 (−0.1), none of none."""
    given = [[0.0, 3.0, 0.1, 1.0, -4.0, 0.2], [-0.3, -0.1, -2.0], []]
    found = key_drops([torch.tensor(each) for each in given])
    torch.testing.assert_close(found, torch.tensor([2.0, -0.1, 0.0]))


def test_drops_and_gradient_of_a_scored_rule(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """Compare two micro-batches with transformers' own forward; the sampler is another model."""
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, temporal_rule="likelihood_gate", temporal_contrast="dropped",
        beta=0.0, temperature=0.7,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    batches, normaliser = first_step(trainer)
    groups = [each for batch in batches for each in batch["batch"].groups]
    assert {each.sample.data_type for each in groups} == {"video", "image"}
    shift = 0.2 * (torch.arange(10) % 3)
    trainer.settings.use_vllm = True  # after sampling
    for each in groups:
        each.ordered = [replace(r, logprobs=r.logprobs - shift[: len(r.logprobs)]) for r in each.ordered]
    model = copy.deepcopy(policy_of(trainer)).double()
    expected = torch.zeros((), dtype=torch.float64)
    for each in groups:
        assert each.shuffled == [] and each.p_shuffled is None  # scored, not sampled
        for place, (rollout, advantage) in enumerate(zip(each.ordered, each.advantages, strict=True)):
            scored = plain_logprobs(model, each, rollout.token_ids, 0.7)
            if each.shuffled_prompt is not None:
                behind = plain_logprobs(
                    model, replace(each, prompt=each.shuffled_prompt), rollout.token_ids, 0.7
                )
                drops = (scored - behind).detach().float()
                torch.testing.assert_close(cast(Any, each.token_drops)[place], drops, rtol=0, atol=5e-5)
            weights = shift[: len(scored)].exp()
            expected = expected - (weights * advantage * scored).mean()
    (expected / sum(len(each.ordered) for each in groups)).backward()
    losses = [
        trainer.compute_loss(policy_of(trainer), batch, num_items_in_batch=normaliser) for batch in batches
    ]
    torch.stack(losses).sum().backward()
    assert_same_gradients(policy_of(trainer), model)
