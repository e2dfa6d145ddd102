"""Every reward term of a question's completions, and their weighted sum."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from video_r1.data.answers import extract_answer
from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.data.scores import correctness, format_reward, is_correct
from video_r1.errors import ConfigError
from video_r1.processes import process_index
from video_r1.rewards.custom import RewardFunction, as_said, call_reward_function, named_rewards
from video_r1.rewards.judge import JudgeScores, SampleAnswers
from video_r1.rewards.temporal import GATED, gate_deviation, rule_of, total_reward
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


def score_groups(
    questions: Sequence[Question],
    ordered: Sequence[list[Rollout]],
    shuffled: Sequence[list[Rollout]],
    terms: RewardTerms,
    settings: TGRPOSettings,
    question_text: Callable[[Sample], str],
    drops: Sequence[list[Tensor] | None] | None = None,
    judge: JudgeScores | None = None,
) -> list[RolloutGroup]:
    """Score every reward term of every completion, and their weighted sum. Advantages are still 0.

    drops: of each question, for the temporal rules that need them. question_text: returns a sample's text for
    the user's functions. judge: for the term of that name, or for the accuracy of free-form answers
    (`judge_use`); every rank calls it, even without groups. Raises RewardError, and what the judge raises.
    """
    if not questions:
        if judge is not None:
            judge([])
        return []
    drops = [None] * len(questions) if drops is None else drops
    judged: Sequence[Tensor | None] = [None] * len(questions)
    if judge is not None and settings.judge.use == "accuracy":
        both = [[*own, *others] for own, others in zip(ordered, shuffled, strict=True)]
        judged = judge([SampleAnswers(one.sample, all_) for one, all_ in zip(questions, both, strict=True)])
    groups = [
        score_group(question, own, others, terms, settings, drop, scores)
        for question, own, others, drop, scores in zip(
            questions, ordered, shuffled, drops, judged, strict=True
        )
    ]
    rollouts = [(group.sample, rollout) for group in groups for rollout in group.ordered]
    texts = {id(group.sample): question_text(group.sample) for group in groups} if terms.custom else {}
    for name, function in terms.custom.items():
        rewards = call_reward_function(
            function,
            name,
            [sample for sample, _ in rollouts],
            prompts=[as_said(sample, texts[id(sample)], "user") for sample, _ in rollouts],
            completions=[as_said(sample, rollout.transcript, "assistant") for sample, rollout in rollouts],
            completion_ids=[rollout.token_ids.tolist() for _, rollout in rollouts],
        )
        for group, values in zip(groups, rewards.split([len(g.ordered) for g in groups]), strict=True):
            group.rewards[name] = values
    if judge is not None and settings.judge.use == "reward":
        for group, values in zip(groups, judge(groups), strict=True):
            group.rewards["judge"] = values
    for group in groups:
        _add_up(group, terms, settings)
    return groups


def _add_up(group: RolloutGroup, terms: RewardTerms, settings: TGRPOSettings) -> None:
    """Set the temporal term, the total reward, and the total without each term."""
    correct, rule, gate = group.correct, rule_of(settings), None
    assert correct is not None
    if "temporal" in terms.built_in and rule.bonus is not None:
        group.rewards["temporal"] = rule.bonus(group, correct, settings)
    elif "temporal" in terms.built_in and rule.gate is not None:
        gate = rule.gate(group, correct, settings)
        gated = {name: values for name, values in group.rewards.items() if name in GATED}
        paid = total_reward(gated, terms.weights)
        group.rewards["temporal"] = (gate - 1.0) * paid
        group.gate_deviation = gate_deviation(gate, paid)
    add = partial(total_reward, group.rewards, terms.weights, gate)
    group.total_reward = add().expand(len(correct))
    group.rewards_without = {name: add(without=name).expand(len(correct)) for name in group.rewards}


def score_group(
    question: Question,
    ordered: list[Rollout],
    shuffled: list[Rollout],
    terms: RewardTerms,
    settings: TGRPOSettings,
    drops: list[Tensor] | None = None,
    judged: Tensor | None = None,
) -> RolloutGroup:
    """Score one question's completions by its type: every built-in term but the temporal one. G ordered,
    H shuffled.

    judged: [G + H] scores that replace correctness, unless None or nan. p and p̃ are this question's shares of
    correct completions.
    """
    sample = question.sample
    if judged is None or judged.isnan().any():
        judged = answer_scores(sample, [*ordered, *shuffled])
    accuracy, accuracy_shuffled = judged.split([len(ordered), len(shuffled)])  # [G], [H]
    correct = correct_mask(sample, accuracy, settings.correct_threshold)
    correct_shuffled = correct_mask(sample, accuracy_shuffled, settings.correct_threshold)
    lengths = torch.tensor([len(rollout.token_ids) for rollout in ordered])
    every = {
        "accuracy": accuracy,
        "format": format_scores(sample, ordered),
        "length": length_reward(correct, lengths, settings.length_reward, *settings.length_bounds),
    }
    group = RolloutGroup(
        sample=sample,
        prompt=question.ordered,
        ordered=ordered,
        shuffled_prompt=question.shuffled,
        shuffled=shuffled,
        rewards={},
        total_reward=torch.zeros(len(ordered)),
        advantages=torch.zeros(len(ordered)),
        shuffled_rewards={"accuracy": accuracy_shuffled, "format": format_scores(sample, shuffled)}
        if shuffled
        else {},
        p=int(correct.sum()) / len(correct),
        p_shuffled=int(correct_shuffled.sum()) / len(correct_shuffled) if shuffled else None,
        token_drops=drops,
        teacher_prompt=question.teacher,
        correct=correct,
    )
    group.rewards = {name: every[name] for name in terms.built_in if name in every}
    if settings.look_cost:
        calls = torch.tensor([len(rollout.calls) for rollout in ordered], dtype=torch.float32)
        group.rewards["look_cost"] = -settings.look_cost * calls
    return group


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
