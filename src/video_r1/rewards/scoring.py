"""Reward terms of a run, and every term's scores of a question's completions."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from video_r1.data.answers import extract_answer
from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import Correct, Rollout, Rollouts
from video_r1.data.scores import correctness, format_reward, is_correct
from video_r1.errors import ConfigError
from video_r1.processes import process_index
from video_r1.rewards.custom import RewardFunction, as_said, call_reward_function, named_rewards
from video_r1.rewards.judge import JudgeScores, SampleAnswers
from video_r1.rewards.temporal import rule_of
from video_r1.settings.training import TGRPOSettings

logger = logging.getLogger(__name__)

BUILT_IN_TERMS = ("accuracy", "format", "length", "temporal", "judge")


@dataclass(frozen=True, slots=True)
class RewardTerms:
    """Reward terms of a run: built-in ones by name, the user's functions by name, and their weights."""

    built_in: tuple[str, ...]
    custom: Mapping[str, RewardFunction] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.built_in, *self.custom)


def reward_terms(
    reward_funcs: str | Callable | Sequence[str | Callable] | None, settings: TGRPOSettings
) -> RewardTerms:
    """Return the terms of a run.

    reward_funcs: names of built-in terms and functions with TRL's signature; "none": no rewards. None: those
    that the settings name, or accuracy and format, with the length, temporal and judge rewards that the
    settings ask for. A list is all that is paid. Raises ConfigError for names and weights that contradict
    each other or the settings.
    """
    if settings.reward_funcs is not None:
        if reward_funcs is not None:
            raise ConfigError("reward_funcs is given to the trainer and in its settings; remove one of them")
        reward_funcs = settings.reward_funcs
    asked_for = {
        "length": settings.length_reward > 0,
        "temporal": settings.temporal_rule != "off" and settings.alpha > 0,
        "judge": settings.judge.endpoint is not None and settings.judge.use == "reward",
    }
    if reward_funcs == "none":
        return RewardTerms(())
    if reward_funcs is None:
        reward_funcs = ["accuracy", "format", *(name for name in asked_for if asked_for[name])]
    elif isinstance(reward_funcs, str) or callable(reward_funcs):
        reward_funcs = [reward_funcs]
    rewards = named_rewards(reward_funcs, BUILT_IN_TERMS)
    names = [name for name, function in rewards.items() if function is None]
    custom = {name: function for name, function in rewards.items() if function is not None}
    weights = settings.reward_weights
    if isinstance(weights, Sequence):
        if len(weights) != len(reward_funcs):
            raise ConfigError(
                f"reward_weights has {len(weights)} weights for {len(reward_funcs)} rewards "
                f"({', '.join(rewards)}); give one for each, or names: accuracy=1,format=0.5"
            )
        weights = dict(zip(rewards, weights, strict=True))
    wrong = {
        "is empty: name rewards, pass functions, or remove it": not (names or custom),
        "names 'temporal' while temporal_rule is off or temporal_alpha 0; set temporal_rule margin": (
            "temporal" in names and not asked_for["temporal"]
        ),
        "names 'temporal' without 'accuracy': the temporal rule pays right answers; add accuracy": (
            "temporal" in names and "accuracy" not in names
        ),
        "names 'judge' while judge_endpoint is not set, or judge_use is accuracy; change one of them": (
            "judge" in names and not asked_for["judge"]
        ),
        "does not name 'judge' while judge_endpoint is set; add it, or set judge_use to accuracy": (
            asked_for["judge"] and "judge" not in names
        ),
    }
    for said, is_so in wrong.items():
        if is_so:
            raise ConfigError(f"reward_funcs {said}")
    terms = RewardTerms(tuple(names), custom, dict(weights))
    _check_weights(terms, settings)
    for name, weight in terms.weights.items():
        if name not in terms.names and (name not in BUILT_IN_TERMS or weight != 1):
            raise ConfigError(
                f"reward_weights names {name!r}, which is none of the rewards of this run: "
                f"{', '.join(terms.names)}; set length_reward, temporal_rule or judge_endpoint to add "
                "one, or remove its weight"
            )
    if asked_for["temporal"] and "temporal" not in names and process_index() == 0:
        logger.warning(
            "temporal_rule %s pays nothing: reward_funcs does not name 'temporal'", settings.temporal_rule
        )
    return terms


def _check_weights(terms: RewardTerms, settings: TGRPOSettings) -> None:
    """Raise ConfigError for weights that punish right answers."""
    weights = {name: terms.weights.get(name, 1.0) for name in terms.built_in}
    for name, weight in weights.items():
        if weight < 0:
            raise ConfigError(
                f"reward_weights gives {name} {weight:g}, which punishes what it should pay; to punish "
                "something else, use a function of your own"
            )
    gates = "temporal" in weights and rule_of(settings).gate is not None
    if "temporal" in weights and weights["accuracy"] == 0:
        raise ConfigError(
            "reward_weights gives accuracy 0, but the temporal rule pays right answers; raise it"
        )
    if gates and weights["temporal"] != 1:
        raise ConfigError(
            f"reward_weights gives temporal {weights['temporal']:g}, but a gate is no term of its own; set "
            "temporal_alpha instead (0 to 1)"
        )
    least = weights.get("accuracy", 0.0) * (1.0 - settings.alpha if gates else 1.0)
    most = settings.look_cost * getattr(settings, "max_looks", 0)
    if "accuracy" in weights and most > least:
        raise ConfigError(
            f"look_cost: {most:g} for max_looks calls is more than a right answer may earn ({least:g}): a "
            "wrong one without calls would be worth more; lower look_cost"
        )


def length_reward(
    correct: Tensor, lengths: Tensor, omega: float = 0.2, shortest: int = 320, longest: int = 512
) -> Tensor:
    """Return ω for each correct response of [shortest, longest] tokens, else 0 (arXiv 2503.21776).

    correct: [G] bool; lengths: [G] int, tokens of each completion. Returns [G] float32.
    """
    inside = (lengths >= shortest) & (lengths <= longest)
    return omega * (correct.to(torch.bool) & inside).to(torch.float32)


class Scores(NamedTuple):
    """Reward terms of one question before the temporal rule: each [G], of the contrast clip [H]."""

    terms: dict[str, Tensor]
    contrast_terms: dict[str, Tensor]
    correct: Correct


def score_terms(
    rollouts: Sequence[Rollouts],
    terms: RewardTerms,
    settings: TGRPOSettings,
    question_text: Callable[[Sample], str],
    judge: JudgeScores | None = None,
) -> list[Scores]:
    """Score every term but the temporal one. p and p̃ of a question are its own shares of right completions.

    question_text: returns a sample's text for the user's functions. judge: for the term of that name, or for
    the accuracy of free-form answers (`judge_use`); every rank calls it, even without questions. Raises
    RewardError, and what the judge raises.
    """
    judged: Sequence[Tensor | None] = [None] * len(rollouts)
    as_accuracy = settings.judge.use == "accuracy"
    if judge is not None:
        answers = [
            SampleAnswers(one.sample, [*one.ordered, *(one.contrast if as_accuracy else ())])
            for one in rollouts
        ]
        judged = judge(answers)
    scores = [
        _built_in(one, terms, settings, own if as_accuracy else None)
        for one, own in zip(rollouts, judged, strict=True)
    ]
    every = [(one.sample, rollout) for one in rollouts for rollout in one.ordered]
    for name, function in terms.custom.items() if every else ():
        rewards = call_reward_function(
            function,
            name,
            [sample for sample, _ in every],
            prompts=[as_said(sample, question_text(sample), "user") for sample, _ in every],
            completions=[as_said(sample, rollout.transcript, "assistant") for sample, rollout in every],
            completion_ids=[rollout.token_ids.tolist() for _, rollout in every],
        )
        for one, own in zip(scores, rewards.split([len(one.ordered) for one in rollouts]), strict=True):
            one.terms[name] = own
    if judge is not None and not as_accuracy:
        for one, own in zip(scores, judged, strict=True):
            one.terms["judge"] = cast(Tensor, own)
    return scores


def _built_in(
    rollouts: Rollouts, terms: RewardTerms, settings: TGRPOSettings, judged: Tensor | None
) -> Scores:
    """Score the built-in terms by the question's type. judged: [G + H] scores that replace correctness,
    unless None or nan.
    """
    sample, ordered = rollouts.sample, rollouts.ordered
    if judged is None or judged.isnan().any():
        judged = answer_scores(sample, [*ordered, *rollouts.contrast])
    accuracy = judged.split([len(ordered), len(rollouts.contrast)])  # [G], [H]
    correct = Correct(*(correct_mask(sample, scores, settings.correct_threshold) for scores in accuracy))
    lengths = torch.tensor([len(rollout.token_ids) for rollout in ordered])
    every = {
        "accuracy": accuracy[0],
        "format": format_scores(sample, ordered),
        "length": length_reward(correct.ordered, lengths, settings.length_reward, *settings.length_bounds),
    }
    chosen = {name: every[name] for name in terms.built_in if name in every}
    if settings.look_cost:
        calls = torch.tensor([len(rollout.calls) for rollout in ordered], dtype=torch.float32)
        chosen["look_cost"] = -settings.look_cost * calls
    others = {"accuracy": accuracy[1], "format": format_scores(sample, rollouts.contrast)}
    return Scores(chosen, others if rollouts.contrast else {}, correct)


def answer_scores(sample: Sample, rollouts: Sequence[Rollout]) -> Tensor:
    """[G] float32 in [0, 1]"""
    scores = [correctness(sample.problem_type, extract_answer(r.text), sample.answer) for r in rollouts]
    return torch.tensor(scores, dtype=torch.float32)


def format_scores(sample: Sample, rollouts: Sequence[Rollout]) -> Tensor:
    """[G] float32"""
    scores = [format_reward(rollout.text, sample.problem_type) for rollout in rollouts]
    return torch.tensor(scores, dtype=torch.float32)


def correct_mask(sample: Sample, scores: Tensor, threshold: float) -> Tensor:
    """[G] → [G] bool"""
    return torch.tensor(
        [is_correct(sample.problem_type, s, threshold) for s in scores.tolist()], dtype=torch.bool
    )
