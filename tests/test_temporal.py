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

from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Group, Rollout, Rollouts
from video_r1.errors import ConfigError
from video_r1.rewards.scoring import reward_terms
from video_r1.rewards.temporal import RULES, logprob_contrast, rule_of, warn_of_cancelled_bonus
from video_r1.settings.training import SampledRule, TemporalRule, TGRPOSettings
from video_r1.training.advantages import TaskMoments
from video_r1.training.ledger import Ledger
from video_r1.training.step import advantages, score
from video_r1.training.tgrpo import TGRPOConfig


def test_every_rule_of_the_settings_is_defined() -> None:
    assert set(RULES) == set(get_args(TemporalRule))
    assert {name for name, rule in RULES.items() if rule.contrast == "sampled"} == set(get_args(SampledRule))


SAMPLE = Sample(1, "?", "video", "multiple choice", "<answer>A</answer>", "/v.mp4", ("A. a", "B. b"))
FREE_FORM = replace(
    SAMPLE, problem_type="free-form", options=(), solution="<answer>a red ball rolls</answer>"
)


def scored(
    answers: list[str],
    drops: list[float] | None = None,
    contrast: list[str] | None = None,
    rewards: Any = None,
    sample: Sample = SAMPLE,
    **settings: Any,
) -> Group:
    """A group of whole texts or letters. drops: one d_t a completion, its Δ as well; contrast: answers to the
    contrast clip.
    """

    def rollouts(texts: list[str]) -> list[Rollout]:
        whole = [text if "<" in text else f"<think>t</think><answer>{text}</answer>" for text in texts]
        return [Rollout(torch.tensor([1]), torch.zeros(1), text, "stop") for text in whole]

    chosen = TGRPOSettings(**{"length_reward": 0.0, **settings})
    question = Question(sample, cast(Any, None), cast(Any, None), 0)
    tokens = None if drops is None else [torch.tensor([drop]) for drop in drops]
    given = [Rollouts(question, rollouts(answers), rollouts(contrast or []), tokens)]
    terms = reward_terms(rewards, chosen)
    scores = score(given, terms, chosen, lambda sample: sample.problem)
    return Group(given[0], scores[0], torch.zeros(len(answers)))


def with_advantages(groups: list[Group], moments: TaskMoments | None = None, **settings: Any) -> list[Group]:
    """The groups of one step, by these settings."""
    rollouts, rewards = ([getattr(group, name) for group in groups] for name in ("rollouts", "rewards"))
    return advantages(rollouts, rewards, TGRPOSettings(**settings), moments)


def credited(groups: list[Group], **settings: Any) -> dict[str, float]:
    chosen = TGRPOSettings(**settings)
    return Ledger().add(with_advantages(groups, **settings), rule_of(chosen).gate is not None)


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
    letters = {"1": "A", "0": "B"}
    found = scored(
        [letters[mark] for mark in ordered], contrast=[letters[mark] for mark in shuffled],
        temporal_rule=rule, temporal_threshold_mu=mu,
    )  # fmt: skip
    torch.testing.assert_close(found.rewards.terms["temporal"], amount * found.rewards.terms["accuracy"])
    assert found.rewards.correct.p == ordered.count("1") / len(ordered)
    assert found.rewards.correct.p_contrast == (shuffled.count("1") / len(shuffled) if shuffled else None)


def mine(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("rewards", "settings", "warned"),
    [
        (None, {"length_reward": 0.0}, True),
        (None, {}, False),  # the length reward varies among right answers
        (["accuracy", "temporal", mine], {}, False),
        (["accuracy", "temporal", mine], {"reward_weights": {"mine": 0.0}}, True),
        (["accuracy", mine], {"reward_weights": {"mine": 0.0}}, False),  # nothing temporal is paid
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
    tasks, settings = TaskMoments(), {"temporal_rule": "margin", "scale_rewards": "task"}
    plain, paid = (
        scored(["A", "A", "B", "B"], contrast=["A", other], rewards=["accuracy", "temporal"])
        for other in "AB"
    )
    with_advantages([plain], tasks, **settings)  # E[R] = E[R²] = 1/2, deviation 1/2
    accuracy = paid.rewards.terms["accuracy"]
    terms = {"accuracy": accuracy, "temporal": 0.15 * accuracy}
    rewards = replace(paid.rewards, terms=terms, total=1.15 * accuracy)
    # E[R] = 0.50075, E[R²] = 0.5016125
    (paid,) = with_advantages([replace(paid, rewards=rewards)], tasks, **settings)
    std = (0.5016125 - 0.50075**2) ** 0.5
    assert paid.advantages[0].item() == pytest.approx(0.575 / (std + 1e-4), rel=1e-5)
    assert paid.advantages_without["temporal"][0].item() == pytest.approx(0.5 / (std + 1e-4), rel=1e-5)


# ---- The list of rewards


def half(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [0.5 * ("<answer>A" in text) for text in completions]


@pytest.mark.parametrize("rule", ["margin", "threshold", "likelihood_gate"])
@pytest.mark.parametrize("rewards", [["format"], [half], ["accuracy", "format"], half])
def test_a_list_of_rewards_is_all_that_is_paid(rule: Any, rewards: Any) -> None:
    """Without 'temporal' in the list nothing is sampled or scored for it, and no right answer is punished."""
    settings = TGRPOSettings(temporal_rule=rule, reward_funcs=rewards if rewards == ["format"] else None)
    terms = reward_terms(None if settings.reward_funcs else rewards, settings)
    assert "temporal" not in terms.names
    found = scored(["A", "A", "B", "B"], drops=[0.1, 0.0, 0.0, 0.0], rewards=rewards, temporal_rule=rule)
    right, wrong = found.rewards.total[:2], found.rewards.total[2:]
    assert right.min() >= wrong.max() and torch.equal(right[:1], right[1:])
    by_name = TGRPOSettings(temporal_rule=rule, reward_funcs=["format"])
    assert by_name.paid_rule == "off" and by_name.contrast_generations == 0


def test_a_list_given_to_the_trainer_switches_the_rule_off(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, rewards=[half], temporal_rule="likelihood_gate"
    )
    batches, _ = first_step(trainer)
    groups = [each for batch in batches for each in batch["batch"].groups]
    assert all(
        each.rollouts.question.contrast is None and each.rollouts.token_contrasts is None for each in groups
    )


@pytest.mark.parametrize(
    ("rewards", "settings", "said"),
    [
        (["format", "temporal"], {}, "without 'accuracy'"),
        ([half, "temporal"], {"temporal_rule": "likelihood_gate"}, "without 'accuracy'"),
        (["accuracy", "temporal"], {"reward_weights": {"accuracy": 0.0}}, "accuracy 0"),
        (None, {"reward_weights": {"accuracy": -1.0}}, "accuracy -1"),
        (None, {"reward_weights": {"temporal": -0.5}}, "temporal -0.5"),
        (None, {"reward_weights": {"temporal": 2.0}, "temporal_rule": "likelihood_gate"}, "temporal_alpha"),
        (["accuracy", "temporal"], {"temporal_rule": "off"}, "temporal_rule is off"),
        (["accuracy", "temporal"], {"temporal_alpha": 0.0}, "temporal_alpha 0"),
    ],
)
def test_rewards_that_would_punish_right_answers_are_refused(rewards: Any, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reward_terms(rewards, TGRPOSettings(**settings))


def test_the_size_of_a_gate_is_a_share() -> None:
    with pytest.raises(ConfigError, match=r"temporal_alpha.*0 to 1"):
        TGRPOConfig(output_dir="o", temporal_rule="likelihood_gate", temporal_alpha=2.0)


# ---- The gate


def test_a_gate_multiplies_what_right_answers_earn() -> None:
    """α = 1: exp(−ln 2) leaves half of accuracy 1 and length 0.2, a gain leaves nothing, format stays."""
    found = scored(
        ["A", "A", "B", "A"], [math.log(2), -0.5, 2.0, 50.0], temporal_rule="likelihood_gate",
        temporal_alpha=1.0, length_reward=0.2, length_range=[1, 9], max_completion_length=9,
    )  # fmt: skip
    torch.testing.assert_close(found.rewards.total, torch.tensor([0.6 + 1, 0.0 + 1, 0.0 + 1, 1.2 + 1]))
    torch.testing.assert_close(found.rewards.terms["temporal"], torch.tensor([-0.6, -1.2, 0.0, 0.0]))
    torch.testing.assert_close(found.rewards.without["temporal"], torch.tensor([2.2, 2.2, 1.0, 2.2]))
    torch.testing.assert_close(found.rewards.without["accuracy"], torch.tensor([1.1, 1.0, 1.0, 1.2]))


@pytest.mark.parametrize(
    "weights", [{}, {"accuracy": 0.5}, {"accuracy": 0.1, "length": 3.0}, {"format": 2.0}]
)
@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("sample", [SAMPLE, FREE_FORM])
def test_no_gate_makes_a_right_answer_worth_less_than_a_wrong_one(
    weights: Any, alpha: float, sample: Any
) -> None:
    """Right answers of any contrast, wrong ones of any, a graded one just below the threshold among them."""
    right, wrong = sample.answer, "a red hat sits" if sample is FREE_FORM else "B"
    found = scored(
        [right, right, wrong, wrong], [0.0, 9.0, 9.0, 0.0], temporal_rule="likelihood_gate", sample=sample,
        temporal_alpha=alpha, reward_weights=weights, length_reward=0.2, length_range=[1, 9],
        max_completion_length=9,
    )  # fmt: skip
    assert found.rewards.correct.ordered.tolist() == [True, True, False, False]
    assert found.rewards.total[:2].min() >= found.rewards.total[2:].max()
    assert credited([found], temporal_rule="likelihood_gate")["credit_sign/temporal"] >= -1e-6 or alpha > 0


def test_a_group_without_contrast_has_no_gate() -> None:
    found = scored(["A", "B"], None, temporal_rule="likelihood_gate")
    assert found.rewards.total.tolist() == [2.0, 1.0] and found.rewards.gate_deviation == 0.0


def test_equal_gates_are_plain_grpo() -> None:
    """4 of 8 right: 0.5 ÷ 0.5345 whether the gate is open or shut, with a format that varies or not."""
    for text in ("A", "<answer>A</answer>"):
        answers = [text, "A", "A", "A", "B", "B", "B", "B"]
        plain = scored(answers, temporal_rule="off")
        (plain,) = with_advantages([plain], temporal_rule="off")
        for drop in (0.0, 20.0):
            gated = scored(answers, [drop] * 8, temporal_rule="likelihood_gate", temporal_alpha=0.9)
            (gated,) = with_advantages([gated], temporal_rule="likelihood_gate")
            if text == "A" or drop:
                torch.testing.assert_close(gated.advantages, plain.advantages, atol=2e-3, rtol=0)
    assert plain.advantages[1].item() == pytest.approx(0.9354 if text == "A" else plain.advantages[1].item())


def test_small_differences_between_right_responses_stay_small() -> None:
    """The deviation of 1 − 0.9·exp(−Δ) is 0.0072, and A is ±0.0088 ÷ (0.0072 + 0.1). A group of right and
    wrong responses without contrast keeps 0.5 ÷ 0.577.
    """
    alike = scored(["A"] * 4, [0.01, 0.02, 0.02, 0.03], temporal_rule="likelihood_gate")
    mixed = scored(["A", "A", "B", "B"], temporal_rule="likelihood_gate")
    alike, mixed = with_advantages([alike, mixed], temporal_rule="likelihood_gate")
    assert alike.advantages.tolist() == pytest.approx([-0.0825, 0.0002, 0.0002, 0.0821], abs=2e-4)
    assert mixed.advantages[0].item() == pytest.approx(0.5 / ((1 / 3) ** 0.5 + 1e-4))


def test_what_the_gate_alone_adds_to_the_deviation() -> None:
    """Right ones with gates 0.1 and 1: ḡ = 0.55, (g − ḡ)·B = −0.45, 0.45, 0, 0 of deviation 0.367; R = 0.1,
    1, 0, 0 (and format 1) of 0.486. So 0.1 · 0.367 ÷ 0.486 is added.
    """
    found = scored(["A", "A", "B", "B"], [0.0, 50.0, 0.0, 0.0], temporal_rule="likelihood_gate")
    (found,) = with_advantages([found], temporal_rule="likelihood_gate")
    own, gated = torch.tensor([0.1, 1.0, 0.0, 0.0]).std(), torch.tensor([-0.45, 0.45, 0.0, 0.0]).std()
    expected = (torch.tensor([0.1, 1.0, 0.0, 0.0]) - 0.275) / (own + 0.1 * gated / own + 1e-4)
    torch.testing.assert_close(found.advantages, expected)


@pytest.mark.parametrize(
    ("length", "noise", "decisive", "low", "high"),
    [
        # noise pays hardly more than a shut gate (0.1): 0.11, 0.13, 0.14, 0.18
        (200, 0.1, False, 0.1, 0.12), (200, 0.3, False, 0.1, 0.14), (200, 0.5, False, 0.1, 0.16),
        (200, 1.0, False, 0.1, 0.20), (20, 0.3, False, 0.1, 0.16),
        # one token of 6 nats pays the same at any length: 1 − 0.9·exp(−6/8) = 0.575
        (20, 0.0, True, 0.574, 0.576), (60, 0.0, True, 0.574, 0.576), (200, 0.0, True, 0.574, 0.576),
        (500, 0.0, True, 0.574, 0.576), (20, 0.3, True, 0.53, 0.62), (200, 0.3, True, 0.50, 0.60),
        (500, 0.3, True, 0.50, 0.60),
    ],
)  # fmt: skip
def test_what_the_gate_pays_noise_and_one_decisive_token(
    length: int, noise: float, decisive: bool, low: float, high: float
) -> None:
    """Means of a right answer's reward at α = 0.9, over 400 draws."""
    drawn = noise * torch.randn(400, length, generator=torch.Generator().manual_seed(length))
    if decisive:
        drawn[:, 0] += 6.0
    paid = 1.0 - 0.9 * torch.exp(-logprob_contrast(list(drawn)).clamp(min=0.0))
    assert low <= paid.mean() <= high


def test_logprob_contrast_of_short_answers() -> None:
    """At most half of the tokens at either end: 2 of 4, 2 and 1 of 3, the only one, none."""
    given = [[3.0, 1.0, -2.0, 0.0], [0.5, 2.0, -1.0], [1.5], []]
    found = logprob_contrast([torch.tensor(each) for each in given])
    torch.testing.assert_close(found, torch.tensor([2.0 - 1.0, 1.25 - 1.0, 1.5, 0.0]))


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
    trainer.settings.engine = "vllm"  # after sampling
    for batch in batches:

        def shifted(group: Group) -> Group:
            ordered = [replace(r, logprobs=r.logprobs - shift[: len(r.logprobs)]) for r in group.ordered]
            return replace(group, rollouts=replace(group.rollouts, ordered=ordered))

        batch["batch"] = replace(batch["batch"], trained=[shifted(group) for group in batch["batch"].trained])
    groups = [each for batch in batches for each in batch["batch"].trained]
    model = copy.deepcopy(policy_of(trainer)).double()
    expected = torch.zeros((), dtype=torch.float64)
    for each in groups:
        assert each.rollouts.contrast == [] and each.rewards.correct.p_contrast is None  # scored, not sampled
        for place, (rollout, advantage) in enumerate(zip(each.ordered, each.advantages, strict=True)):
            scored = plain_logprobs(model, each, rollout.token_ids, 0.7)
            question = each.rollouts.question
            if question.contrast is not None:
                changed = replace(each.rollouts, question=replace(question, ordered=question.contrast))
                behind = plain_logprobs(model, replace(each, rollouts=changed), rollout.token_ids, 0.7)
                drops = (scored - behind).detach().float()
                torch.testing.assert_close(
                    cast(Any, each.rollouts.token_contrasts)[place], drops, rtol=0, atol=5e-5
                )
            weights = shift[: len(scored)].exp()
            expected = expected - (weights * advantage * scored).mean()
    (expected / sum(len(each.ordered) for each in groups)).backward()
    losses = [
        trainer.compute_loss(policy_of(trainer), batch, num_items_in_batch=normaliser) for batch in batches
    ]
    torch.stack(losses).sum().backward()
    assert_same_gradients(policy_of(trainer), model)
