"""Scores a question's completions as a RolloutGroup: every reward term, and their weighted sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from video_r1.data.answers import extract_answer
from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.errors import ConfigError
from video_r1.rewards.correctness import correctness, format_reward, is_correct
from video_r1.rewards.custom import RewardFunction, as_said, call_reward_function
from video_r1.rewards.judge import JudgeScores, SampleAnswers
from video_r1.rewards.temporal import rule_of
from video_r1.settings.base import raise_problems
from video_r1.settings.training import TGRPOSettings

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

    reward_funcs: names of built-in terms and functions with TRL's signature. None: those that the settings
    name, or accuracy and format, with the length, temporal and judge rewards that the settings ask for. The
    temporal reward joins any list if `temporal_rule` adds a reward. Raises ConfigError for an empty list, an
    unknown name, names both here and in the settings, a judge without an address, a length reward out of
    reach, or a weight of a missing term (a weight of 1, the default, is allowed for built-in ones).
    """
    asked_for = {
        "length": settings.length_reward > 0,
        "temporal": rule_of(settings).reward is not None,
        "judge": settings.judge_endpoint is not None and settings.judge_as == "reward",
    }
    if settings.reward_funcs is not None:
        if reward_funcs is not None:
            raise ConfigError("reward_funcs is given to the trainer and in its settings; remove one of them")
        reward_funcs = settings.reward_funcs
    if reward_funcs is None:
        built_in = ("accuracy", "format", *(name for name in asked_for if asked_for[name]))
        custom: dict[str, RewardFunction] = {}
    else:
        if isinstance(reward_funcs, str) or callable(reward_funcs):
            reward_funcs = [reward_funcs]
        given = list(reward_funcs)
        if not given:
            raise ConfigError(
                "reward_funcs is empty: name rewards, pass functions, or remove it for accuracy and format"
            )
        names = [entry for entry in given if isinstance(entry, str)]
        unknown = [name for name in names if name not in BUILT_IN_TERMS]
        if unknown:
            raise ConfigError(
                f"reward_funcs: {unknown[0]!r} is no built-in reward; these are {', '.join(BUILT_IN_TERMS)}, "
                "anything else has to be a function"
            )
        built_in = tuple(dict.fromkeys([*names, "temporal"] if asked_for["temporal"] else names))
        if "temporal" in built_in and not asked_for["temporal"]:
            raise ConfigError(
                f"reward_funcs: 'temporal' is named while temporal_rule is {settings.temporal_rule}, "
                "which adds no reward; set margin, threshold or likelihood"
            )
        if ("judge" in built_in) != asked_for["judge"]:
            raise ConfigError(
                "judge_endpoint is set, but reward_funcs does not name 'judge'; add it (or judge_as accuracy)"
                if asked_for["judge"]
                else "reward_funcs: 'judge' is named while judge_endpoint is not set; give its address"
                if settings.judge_endpoint is None
                else "reward_funcs: 'judge' is named while judge_as is accuracy; remove one of them"
            )
        custom = {}
        for function in (entry for entry in given if callable(entry)):
            name = getattr(function, "__name__", type(function).__name__)
            if name in custom or name in BUILT_IN_TERMS:
                raise ConfigError(f"reward_funcs: two rewards have the name {name!r}; rename the function")
            custom[name] = function
    if "length" in built_in:
        raise_problems(list(settings.length_problems()))
    terms = RewardTerms(built_in, custom, dict(settings.reward_weights))
    for name, weight in terms.weights.items():
        if name not in terms.names and (name not in BUILT_IN_TERMS or weight != 1):
            remedies = {
                "length": "; set length_reward above 0",
                "temporal": "; set a temporal_rule",
                "judge": "; set judge_endpoint",
            }
            raise ConfigError(
                f"reward_weights names {name!r}, which is none of the rewards of this run: "
                f"{', '.join(terms.names)}{remedies.get(name, '')}"
            )
    return terms


def length_reward(
    correct: Tensor, lengths: Tensor, omega: float = 0.2, shortest: int = 320, longest: int = 512
) -> Tensor:
    """Return ω for each correct response of [shortest, longest] tokens, else 0 (arXiv 2503.21776).

    correct: [G] bool; lengths: [G] int, tokens of each completion. Returns [G] float32.
    """
    if len(correct) != len(lengths):
        raise ValueError(f"{len(correct)} responses but {len(lengths)} lengths")
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
    the user's functions. judge: for the term of that name, or with `judge_as` accuracy for the accuracy of
    free-form answers, ordered and shuffled. Raises RewardError when one of the functions fails, and what the
    judge raises. Ranks that score together all call the judge, even without groups.
    """
    if not questions:
        if judge is not None:
            judge([])
        return []
    drops = [None] * len(questions) if drops is None else drops
    judged: Sequence[Tensor | None] = [None] * len(questions)
    if judge is not None and settings.judge_as == "accuracy":
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
            completions=[as_said(sample, rollout.text, "assistant") for sample, rollout in rollouts],
            completion_ids=[rollout.token_ids.tolist() for _, rollout in rollouts],
        )
        for group, values in zip(groups, rewards.split([len(g.ordered) for g in groups]), strict=True):
            group.rewards[name] = values
    if judge is not None and settings.judge_as == "reward":
        for group, values in zip(groups, judge(groups), strict=True):
            group.rewards["judge"] = values
    for group in groups:
        group.total_reward = weighted_sum(group.rewards, terms.weights)
        group.base_reward = weighted_sum(group.rewards, {**terms.weights, "temporal": 0.0})
    return groups


def score_group(
    question: Question,
    ordered: list[Rollout],
    shuffled: list[Rollout],
    terms: RewardTerms,
    settings: TGRPOSettings,
    drops: list[Tensor] | None = None,
    judged: Tensor | None = None,
) -> RolloutGroup:
    """Score the built-in terms of one question's completions, by the question's type. G ordered, H shuffled.

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
        "length": length_reward(correct, lengths, settings.length_reward, *settings.length_range),
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
    )
    if (temporal_reward := rule_of(settings).reward) is not None:
        every["temporal"] = temporal_reward(group, accuracy, correct, settings)
    group.rewards = {name: every[name] for name in terms.built_in if name in every}
    return group


def answer_scores(sample: Sample, rollouts: Sequence[Rollout]) -> Tensor:
    """Return the correctness of each completion's tagged answer, [G] float32 in [0, 1]."""
    scores = [correctness(sample.problem_type, extract_answer(r.text), sample.answer) for r in rollouts]
    return torch.tensor(scores, dtype=torch.float32)


def format_scores(sample: Sample, rollouts: Sequence[Rollout]) -> Tensor:
    """Return [G] float32: 1 for each completion that has the demanded format."""
    scores = [format_reward(rollout.text, sample.problem_type) for rollout in rollouts]
    return torch.tensor(scores, dtype=torch.float32)


def correct_mask(sample: Sample, scores: Tensor, threshold: float) -> Tensor:
    """Return which scores [G] count as a correct response, [G] bool."""
    return torch.tensor(
        [is_correct(sample.problem_type, s, threshold) for s in scores.tolist()], dtype=torch.bool
    )


def weighted_sum(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of the terms, [G] float32; a missing value (nan) adds nothing."""
    return sum(
        (weights.get(name, 1.0) * values.nan_to_num(nan=0.0) for name, values in rewards.items()),
        torch.zeros(()),
    )
