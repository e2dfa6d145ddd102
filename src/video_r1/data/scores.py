"""Scores of answers by problem type, in [0, 1], and the format reward. Pure functions of texts.

The scores are those of Video-R1 (arXiv 2503.21776), except that equal numbers are equal however they are
written: its code gives "3" the score 0 if the truth is "3.0", and "1,200" if it is "1200".
Grounding types are scored by overlap, with the equations of OneThinker (arXiv 2512.03043).
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from video_r1.data.answers import parse_number
from video_r1.data.expressions import same_expression
from video_r1.data.grounding import GROUNDING_FORMS, Box, Located, Span, parse_located

_FORMAT = re.compile(r"<think>(.*?)</think>\s*<answer>(.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Names of characters whose scripts have no spaces between words.
_UNSPACED = re.compile(
    r"(?:CJK|IDEOGRAPHIC|HIRAGANA|(?:HALFWIDTH )?KATAKANA|THAI|LAO|KHMER|MYANMAR|TIBETAN|JAVANESE|BALINESE|"
    r"(?:NEW )?TAI)\b"
)
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
    """Return 1 − word error rate (edit distance of words ÷ words of the truth); both empty: 1.

    Of scripts without spaces, each character is a word.
    """
    words, expected = (_parted(unicodedata.normalize("NFC", text), False) for text in (answer, truth))
    if words == expected or not expected:
        return float(words == expected)
    import jiwer  # here and below: a check of truths needs neither, and nltk takes a second to import

    return max(0.0, 1.0 - jiwer.wer(" ".join(expected), " ".join(words)))


def free_form(answer: str, truth: str) -> float:
    """Return the mean F of ROUGE-1, -2 and -L, words of ASCII letters stemmed (Lin 2004).

    Of text in ASCII, words and scores are those of the package rouge_score. Of other text, a word is a run of
    letters, marks and digits in any script, a character of scripts without spaces, or a symbol such as "→". A
    truth of one word has no pair of words, so that even its copy has a ROUGE-2 of 0 and scores 2/3.
    """
    if answer == truth:
        return (0.0, 2 / 3, 1.0)[min(2, len(_words(truth)))]
    scores = _rouge().score(truth, answer)
    return sum(score.fmeasure for score in scores.values()) / len(scores)


@cache
def _rouge() -> Any:
    if homeless := os.path.expanduser("~") == "~":  # then nltk, which needs none, cannot be imported
        os.environ["HOME"] = os.sep
    try:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
    finally:
        if homeless:
            del os.environ["HOME"]
    stem = PorterStemmer().stem

    def tokenize(text: str) -> list[str]:
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in _words(text)]

    return RougeScorer(("rouge1", "rouge2", "rougeL"), tokenizer=SimpleNamespace(tokenize=tokenize))


def _words(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _parted(unicodedata.normalize("NFKC", text).casefold(), True)


def _parted(text: str, words_only: bool) -> list[str]:
    """Split a text at white space and around each character of a script without spaces.

    words_only: also around symbols, and at everything else that is no letter, mark or digit.
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(_apart(character, words_only) for character in text)
    return text.split()


@cache
def _apart(character: str, words_only: bool) -> str:
    kind, name = unicodedata.category(character), unicodedata.name(character, "")
    if character.isspace():
        return character
    if kind in ("Cc", "Cf") or name.startswith("VARIATION SELECTOR"):  # joiners, direction marks: not seen
        return ""
    symbol = words_only and kind[0] == "S" and not character.isascii()
    if words_only and kind[0] not in "LMN" and not symbol:
        return " "
    return f" {character} " if symbol or _UNSPACED.match(name) else character


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


# ---- Truths


def unpaid(
    problem_type: str, truth: str, score: Callable[[str, str, str], float] = correctness
) -> Iterator[str]:
    """Yield why a completion with a row's own truth as its answer would not earn the full reward."""
    of_kind = f"the solution of {'an' if problem_type == 'OCR' else 'a'} {problem_type} problem"
    shown = repr(truth[:80])
    earned = score(problem_type, truth, truth)
    if problem_type in ("numerical", "regression") and parse_number(truth) is None:
        comma = "; a comma stands only before groups of three digits" * ("," in truth)
        yield f"{of_kind} must be a finite number, not {shown}{comma}"
    elif problem_type == "regression" and earned < 0.99:
        yield f"{of_kind} is {shown}: errors are relative to it, so that no answer is paid; use numerical"
    elif problem_type == "free-form" and earned < 0.66:  # one word earns 2/3
        yield f"{of_kind} must have a word or a symbol to compare, unlike {shown}; OCR compares every sign"
    elif problem_type == "OCR" and score(problem_type, "", truth):
        yield f"{of_kind} has nothing that can be seen: {shown}"
    elif problem_type != "free-form" and earned < 0.99:
        yield f"{of_kind} earns {earned:g} of 1 when it is copied: {shown}"
    elif not format_reward(f"<think></think><answer>{truth}</answer>", problem_type):
        yield f"{of_kind} has a tag in it, so that no completion with it earns the format reward: {shown}"
