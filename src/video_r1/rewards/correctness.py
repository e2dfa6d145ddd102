"""How right an answer is, by problem type: the correctness reward in [0, 1].

The scores are those of Video-R1 (arXiv 2503.21776) with one deviation: its code also gives a numerical
answer 0 when only one of the two strings has a `.` or a `,`, so that "3" is wrong where "3.0" is the truth
and "1,200" where "1200" is. Here two equal numbers are equal however they are written. Grounding types are
scored by overlap.py.
"""

from collections.abc import Callable
from functools import cache, partial

import jiwer
from rouge_score.rouge_scorer import RougeScorer

from video_r1.data.answers import parse_number
from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.rewards.expressions import same_expression
from video_r1.rewards.overlap import grounding

_CONTINUOUS = ("OCR", "free-form", "regression", *GROUNDING_FORMS)


def correctness(problem_type: str, answer: str, truth: str) -> float:
    """Score of one answer.

    problem_type: one of the types of a manifest; answer, truth: the texts inside the answer tags
    ("" for an output without tags). Returns a float in [0, 1]. Raises ValueError for an unknown type.
    """
    score = _SCORERS.get(problem_type)
    if score is None:
        raise ValueError(f"unknown problem type {problem_type!r}; it is one of {', '.join(_SCORERS)}")
    return score(answer.strip(), truth.strip())


def is_correct(problem_type: str, score: float, threshold: float = 0.5) -> bool:
    """Whether a response counts as correct: score 1, or above `threshold` for the continuous types.

    The paper's threshold is 0.5; its code has 0.1.
    """
    return above(score, threshold) if problem_type in _CONTINUOUS else score == 1.0


def above(score: float, threshold: float) -> bool:
    """Whether a score is above a threshold by more than rounding: one word of ten is 0.1, and as a float32
    0.10000000149."""
    return score > threshold + 1e-6


def multiple_choice(answer: str, truth: str) -> float:
    """1 when both texts are equal."""
    return float(answer == truth)


def numerical(answer: str, truth: str) -> float:
    """1 when both parse as numbers that agree at two decimals."""
    predicted, expected = parse_number(answer), parse_number(truth)
    if predicted is None or expected is None:
        return 0.0
    return float(round(predicted, 2) == round(expected, 2))


def ocr(answer: str, truth: str) -> float:
    """1 − word error rate (word edit distance ÷ words of the truth); an empty truth wants an empty answer."""
    words, expected = answer.split(), truth.split()
    if not expected:
        return float(not words)
    # jiwer splits on single blanks only: other white space has to become one first.
    return _clip(1.0 - jiwer.wer(" ".join(expected), " ".join(words)))


def free_form(answer: str, truth: str) -> float:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L, words stemmed (Lin 2004); Latin letters and digits only."""
    scores = _rouge().score(truth, answer)
    return _clip(sum(score.fmeasure for score in scores.values()) / len(scores))


def regression(answer: str, truth: str) -> float:
    """1 − min(1, (|pred − truth| + 1e-9) ÷ (|truth| + 1e-9)); 0 when either is no number.

    By this formula nothing scores where the truth is 0, an exact 0 included.
    """
    predicted, expected = parse_number(answer), parse_number(truth)
    if predicted is None or expected is None:
        return 0.0
    return 1.0 - min(1.0, (abs(predicted - expected) + 1e-9) / (abs(expected) + 1e-9))


def math(answer: str, truth: str) -> float:
    """1 when both are the same value, expression, set or interval: see `same_expression`."""
    return float(same_expression(answer, truth))


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _clip(score: float) -> float:
    return min(1.0, max(0.0, float(score)))


_SCORERS: dict[str, Callable[[str, str], float]] = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "OCR": ocr,
    "free-form": free_form,
    "regression": regression,
    "math": math,
    **{kind: partial(grounding, kind) for kind in GROUNDING_FORMS},
}
