"""Every reward term of a question's completions, and their weighted sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from video_r1.data.answers import extract_answer
from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.data.scores import correctness, format_reward, is_correct
from video_r1.errors import ConfigError
from video_r1.rewards.custom import RewardFunction, as_said, call_reward_function, reward_name
from video_r1.rewards.judge import JudgeScores, SampleAnswers
from video_r1.rewards.temporal import rule_of
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

    reward_funcs: names of built-in terms and functions with TRL's signature; "none": no rewards. None: those
    that the settings name, or accuracy and format, with the length, temporal and judge rewards that the
    settings ask for. The temporal reward joins any list if `temporal_rule` adds a reward. Raises ConfigError
    for names and weights that contradict each other or the settings.
    """
    if settings.reward_funcs is not None:
        if reward_funcs is not None:
            raise ConfigError("reward_funcs is given to the trainer and in its settings; remove one of them")
        reward_funcs = settings.reward_funcs
    asked_for = {
        "length": settings.length_reward > 0,
        "temporal": rule_of(settings).reward is not None,
        "judge": settings.judge_endpoint is not None and settings.judge_as == "reward",
    }
    if reward_funcs == "none":
        return RewardTerms(())
    if reward_funcs is None:
        reward_funcs = ["accuracy", "format", *(name for name in asked_for if asked_for[name])]
    elif isinstance(reward_funcs, str) or callable(reward_funcs):
        reward_funcs = [reward_funcs]
    names = [entry for entry in reward_funcs if isinstance(entry, str)]
    custom: dict[str, RewardFunction] = {}
    for function in (entry for entry in reward_funcs if callable(entry)):
        custom[reward_name(function, {*custom, *BUILT_IN_TERMS})] = function
    unknown = [name for name in names if name not in BUILT_IN_TERMS]
    wrong = {
        "is empty: name rewards, pass functions, or remove it": not (names or custom),
        f"names {', '.join(unknown)}; known are {', '.join(BUILT_IN_TERMS)} and functions": unknown,
        f"names 'temporal' while temporal_rule is {settings.temporal_rule}, which adds none; set margin": (
            "temporal" in names and not asked_for["temporal"]
        ),
        "names 'judge' while judge_endpoint is not set, or judge_as is accuracy; change one of them": (
            "judge" in names and not asked_for["judge"]
        ),
        "does not name 'judge' while judge_endpoint is set; add it, or set judge_as to accuracy": (
            asked_for["judge"] and "judge" not in names
        ),
    }
    for said, is_so in wrong.items():
        if is_so:
            raise ConfigError(f"reward_funcs {said}")
    built_in = tuple(dict.fromkeys([*names, "temporal"] if asked_for["temporal"] else names))
    terms = RewardTerms(built_in, custom, dict(settings.reward_weights))
    for name, weight in terms.weights.items():
        if name not in terms.names and (name not in BUILT_IN_TERMS or weight != 1):
            raise ConfigError(
                f"reward_weights names {name!r}, which is none of the rewards of this run: "
                f"{', '.join(terms.names)}; set length_reward, temporal_rule or judge_endpoint to add "
                "one, or remove its weight"
            )
    return terms


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
    (`judge_as`); every rank calls it, even without groups. Raises RewardError, and what the judge raises.
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
            completions=[as_said(sample, rollout.transcript, "assistant") for sample, rollout in rollouts],
            completion_ids=[rollout.token_ids.tolist() for _, rollout in rollouts],
        )
        for group, values in zip(groups, rewards.split([len(g.ordered) for g in groups]), strict=True):
            group.rewards[name] = values
    if judge is not None and settings.judge_as == "reward":
        for group, values in zip(groups, judge(groups), strict=True):
            group.rewards["judge"] = values
    for group in groups:
        count = len(group.ordered)
        group.total_reward = weighted_sum(group.rewards, terms.weights).expand(count)
        group.base_reward = weighted_sum(group.rewards, {**terms.weights, "temporal": 0.0}).expand(count)
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
    )
    if (temporal_reward := rule_of(settings).reward) is not None:
        every["temporal"] = temporal_reward(group, accuracy, correct, settings)
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


def weighted_sum(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of the terms, [G] float32; a missing value (nan) adds nothing."""
    return sum(
        (weights.get(name, 1.0) * values.nan_to_num(nan=0.0) for name, values in rewards.items()),
        torch.zeros(()),
    )
