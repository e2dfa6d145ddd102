"""How right an answer is, by problem type: the correctness reward in [0, 1].

The scores are those of Video-R1 (arXiv 2503.21776) with one deviation: its code also gives a numerical
answer 0 when only one of the two strings has a `.` or a `,`, so that "3" is wrong where "3.0" is the truth
and "1,200" where "1200" is. Here two equal numbers are equal however they are written.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

import jiwer
from rouge_score.rouge_scorer import RougeScorer

from video_r1.data.answers import parse_number
from video_r1.data.grounding import GROUNDING_FORMS, Box, Located, Span, parse_located
from video_r1.rewards.expressions import same_expression

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


# ---- How far an answer that says where and when overlaps the truth


def span_iou(first: Span, second: Span) -> float:
    """tIoU: |first ∩ second| ÷ |first ∪ second| of two spans [s, e]; 0 where one ends before it begins."""
    both = min(first[1], second[1]) - max(first[0], second[0])
    return _ratio(both, first[1] - first[0], second[1] - second[0])


def box_iou(first: Box, second: Box) -> float:
    """IoU: area(first ∩ second) ÷ area(first ∪ second) of two boxes [x1, y1, x2, y2]; 0 without an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return _ratio(max(0.0, width) * max(0.0, height), _area(first), _area(second))


def common_iou(boxes: Mapping[float, Box], truth: Mapping[float, Box]) -> float:
    """Mean IoU over the seconds that both have; 0 where they have none in common."""
    common = boxes.keys() & truth.keys()
    return sum(box_iou(boxes[second], truth[second]) for second in common) / max(1, len(common))


def track_iou(boxes: Mapping[float, Box], truth: Mapping[float, Box]) -> float:
    """Mean IoU over the truth's seconds; one that is missing counts 0."""
    ious = (box_iou(boxes[second], box) for second, box in truth.items() if second in boxes)
    return sum(ious) / max(1, len(truth))


def temporal_grounding(answer: Located, truth: Located) -> dict[str, float]:
    """{"tIoU": `span_iou`} of both times."""
    assert answer.time and truth.time
    return {"tIoU": span_iou(answer.time, truth.time)}


def spatial_grounding(answer: Located, truth: Located) -> dict[str, float]:
    """{"IoU": `box_iou`} of both boxes."""
    assert answer.box and truth.box
    return {"IoU": box_iou(answer.box, truth.box)}


def spatial_temporal_grounding(answer: Located, truth: Located) -> dict[str, float]:
    """{"tIoU": `span_iou`, "IoU": `common_iou`} of both times and boxes."""
    assert answer.boxes is not None and truth.boxes is not None
    return temporal_grounding(answer, truth) | {"IoU": common_iou(answer.boxes, truth.boxes)}


def tracking(answer: Located, truth: Located) -> dict[str, float]:
    """{"IoU": `track_iou`} of the boxes."""
    assert answer.boxes is not None and truth.boxes is not None
    return {"IoU": track_iou(answer.boxes, truth.boxes)}


_OVERLAPS = {
    "temporal grounding": temporal_grounding,
    "spatial grounding": spatial_grounding,
    "spatial-temporal grounding": spatial_temporal_grounding,
    "tracking": tracking,
}


def overlaps(problem_type: str, answer: str, truth: str) -> dict[str, float]:
    """The overlaps that a grounding type is scored by, by name: {"tIoU": 0.4, "IoU": 0.7}. Zeros for an
    answer that is none; {} for other types and for a truth that is none. answer, truth: in the exact form."""
    expected = parse_located(truth, problem_type) if problem_type in _OVERLAPS else None
    if expected is None:
        return {}
    said = parse_located(answer, problem_type)
    measure = _OVERLAPS[problem_type]
    return measure(said, expected) if said else dict.fromkeys(measure(expected, expected), 0.0)


def grounding(problem_type: str, answer: str, truth: str) -> float:
    """The score of a grounding type: tIoU, IoU, or with a span and boxes (tIoU + IoU) ÷ 2."""
    found = overlaps(problem_type, answer, truth)
    return sum(found.values()) / max(1, len(found))


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _ratio(both: float, first: float, second: float) -> float:
    """both ÷ (first + second − both); 0 where one of them is empty, or where sizes are infinite."""
    if min(both, first, second) <= 0:
        return 0.0
    union = first + second - both
    return min(1.0, both / union) if union > 0 else 0.0


_SCORERS: dict[str, Callable[[str, str], float]] = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "OCR": ocr,
    "free-form": free_form,
    "regression": regression,
    "math": math,
    **{kind: partial(grounding, kind) for kind in GROUNDING_FORMS},
}
