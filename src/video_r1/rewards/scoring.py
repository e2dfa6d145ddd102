"""Scores of answers by problem type, in [0, 1], and every reward term of a question's completions.

The scores are those of Video-R1 (arXiv 2503.21776), except that equal numbers are equal however they are
written: its code gives "3" the score 0 if the truth is "3.0", and "1,200" if it is "1200".

Grounding types are scored by overlap, with the equations of OneThinker (arXiv 2512.03043): spans by their
tIoU, boxes by their IoU, boxes over time by the mean of their IoUs: over the seconds that both have
(spatial-temporal grounding), or over the truth's seconds, a missing one counting 0 (tracking).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import jiwer
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from video_r1.data.answers import extract_answer, parse_number
from video_r1.data.grounding import GROUNDING_FORMS, Box, Located, Span, parse_located
from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.errors import ConfigError
from video_r1.rewards.custom import RewardFunction, as_said, call_reward_function, reward_name
from video_r1.rewards.expressions import same_expression
from video_r1.rewards.judge import JudgeScores, SampleAnswers
from video_r1.rewards.temporal import rule_of
from video_r1.settings.training import TGRPOSettings

_FORMAT = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_rouge = cache(RougeScorer)  # making one takes a while
_CONTINUOUS = ("OCR", "free-form", "regression", *GROUNDING_FORMS)


def correctness(problem_type: str, answer: str, truth: str) -> float:
    """Return the score in [0, 1] of an answer. Raises ValueError for an unknown problem type.

    answer, truth: texts inside the answer tags, "" without tags.
    """
    score = _SCORERS.get(problem_type)
    if score is None:
        raise ValueError(f"unknown problem type {problem_type!r}; it is one of {', '.join(_SCORERS)}")
    return score(answer.strip(), truth.strip())


def is_correct(problem_type: str, score: float, threshold: float = 0.5) -> bool:
    """Return whether a response counts as correct: score 1, or above `threshold` for continuous types.

    The paper's threshold is 0.5; its code has 0.1.
    """
    return above(score, threshold) if problem_type in _CONTINUOUS else score == 1.0


def above(score: float, threshold: float) -> bool:
    """Return whether a score exceeds a threshold by more than rounding: 0.1 as a float32 is 0.10000000149."""
    return score > threshold + 1e-6


def format_reward(completion: str, problem_type: str = "") -> float:
    """Return 1 if the whole completion is `<think>…</think>`, white space, `<answer>…</answer>`, each tag
    once, else 0. The answer to a question of a grounding type has to have its form, too.
    """
    once = all(completion.count(tag) == 1 for tag in _TAGS)
    match = _FORMAT.fullmatch(completion) if once else None
    if match is not None and problem_type in GROUNDING_FORMS:
        return float(parse_located(match.group(2), problem_type) is not None)
    return float(match is not None)


def numerical(answer: str, truth: str) -> float:
    """Return 1 if both parse as numbers that agree at two decimals."""
    predicted, expected = parse_number(answer), parse_number(truth)
    if predicted is None or expected is None:
        return 0.0
    return float(round(predicted, 2) == round(expected, 2))


def ocr(answer: str, truth: str) -> float:
    """Return 1 − word error rate (word edit distance ÷ words of the truth); both empty: 1."""
    words, expected = answer.split(), truth.split()
    if not expected:
        return float(not words)
    # jiwer splits on single blanks only: other white space has to become one first.
    return max(0.0, 1.0 - jiwer.wer(" ".join(expected), " ".join(words)))


def free_form(answer: str, truth: str) -> float:
    """Return the mean F of ROUGE-1, -2 and -L, words stemmed (Lin 2004); Latin letters and digits only."""
    scores = _rouge(("rouge1", "rouge2", "rougeL"), use_stemmer=True).score(truth, answer)
    return sum(score.fmeasure for score in scores.values()) / len(scores)


def regression(answer: str, truth: str) -> float:
    """Return 1 − min(1, (|pred − truth| + 1e-9) ÷ (|truth| + 1e-9)); 0 if either is no number.

    By this formula a truth of 0 gives 0, even to an exact answer.
    """
    predicted, expected = parse_number(answer), parse_number(truth)
    if predicted is None or expected is None:
        return 0.0
    return 1.0 - min(1.0, (abs(predicted - expected) + 1e-9) / (abs(expected) + 1e-9))


# ---- Grounding: overlap with the truth


def span_iou(first: Span, second: Span) -> float:
    """Return the tIoU |first ∩ second| ÷ |first ∪ second| of two spans [s, e]."""
    both = min(first[1], second[1]) - max(first[0], second[0])
    return _ratio(both, first[1] - first[0], second[1] - second[0])


def box_iou(first: Box, second: Box) -> float:
    """Return the IoU area(first ∩ second) ÷ area(first ∪ second) of two boxes [x1, y1, x2, y2]."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return _ratio(max(0.0, width) * max(0.0, height), _area(first), _area(second))


def common_iou(boxes: Mapping[float, Box], truth: Mapping[float, Box]) -> float:
    """Return the mean IoU over the seconds that both have; 0 if they have none in common."""
    common = boxes.keys() & truth.keys()
    return sum(box_iou(boxes[second], truth[second]) for second in common) / max(1, len(common))


def track_iou(boxes: Mapping[float, Box], truth: Mapping[float, Box]) -> float:
    """Return the mean IoU over the truth's seconds; a missing one counts 0."""
    ious = (box_iou(boxes[second], box) for second, box in truth.items() if second in boxes)
    return sum(ious) / max(1, len(truth))


def overlaps(problem_type: str, answer: str, truth: str) -> dict[str, float]:
    """Return the overlaps that score a grounding type, by name: {"tIoU": 0.4, "IoU": 0.7}. Zeros for an
    answer that cannot be parsed; {} for such a truth, and for other types.
    """
    expected = parse_located(truth, problem_type) if problem_type in GROUNDING_FORMS else None
    if expected is None:
        return {}
    said, found = parse_located(answer, problem_type) or Located(), {}
    if expected.time:
        found["tIoU"] = span_iou(said.time, expected.time) if said.time else 0.0
    if expected.box:
        found["IoU"] = box_iou(said.box, expected.box) if said.box else 0.0
    if expected.boxes is not None:
        mean = track_iou if problem_type == "tracking" else common_iou
        found["IoU"] = mean(said.boxes or {}, expected.boxes)
    return found


def grounding(problem_type: str, answer: str, truth: str) -> float:
    """Return tIoU, IoU, or with a span and boxes (tIoU + IoU) ÷ 2."""
    found = overlaps(problem_type, answer, truth)
    return sum(found.values()) / max(1, len(found))


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _ratio(both: float, first: float, second: float) -> float:
    """Return both ÷ (first + second − both); 0 if one of them is empty or infinite."""
    if min(both, first, second) <= 0:
        return 0.0
    union = first + second - both
    return min(1.0, both / union) if union > 0 else 0.0


_SCORERS: dict[str, Callable[[str, str], float]] = {
    "multiple choice": lambda answer, truth: float(answer == truth),
    "numerical": numerical,
    "OCR": ocr,
    "free-form": free_form,
    "regression": regression,
    "math": lambda answer, truth: float(same_expression(answer, truth)),
    **{kind: partial(grounding, kind) for kind in GROUNDING_FORMS},
}


# ---- The reward terms of a run

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
