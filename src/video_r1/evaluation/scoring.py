"""The score of one output, read tolerantly and strictly, or as the reference's code does (protocol.py)."""

from typing import NamedTuple

from video_r1.data.answers import extract_answer, parse_number, read_answer
from video_r1.data.manifests.records import Sample
from video_r1.evaluation import protocol
from video_r1.evaluation.metrics import mean_relative_accuracy
from video_r1.rewards.correctness import correctness
from video_r1.rewards.shaping import format_reward
from video_r1.settings.decoding import Protocol


class Scored(NamedTuple):
    prediction: str  # the answer that was read, "" for none
    score: float  # of that answer
    strict_score: float  # of the text in the answer tags alone
    format: float  # 1 when the whole output has the answer format


def score_output(sample: Sample, output: str, by: Protocol | None = None) -> Scored:
    """Scores one output, tolerantly and strictly: regression by MRA, all else by the training reward. by: the
    protocol that decides the prediction and its score in place of the tolerant reading."""
    kind, truth = sample.problem_type, sample.answer
    if by == "reference":
        prediction = protocol.read_answer(output)
        score = protocol.score(kind, prediction, truth)
    else:
        prediction = read_answer(output, kind, sample.options)
        score = _score(kind, prediction, truth)
    strict = _score(kind, extract_answer(output), truth)
    return Scored(prediction, score, strict, format_reward(output, kind))


def _score(problem_type: str, prediction: str, truth: str) -> float:
    if problem_type != "regression":
        return correctness(problem_type, prediction, truth)
    numbers = [parse_number(text) for text in (prediction, truth)]
    predicted, expected = (float("nan") if number is None else number for number in numbers)
    return float(mean_relative_accuracy([predicted], [expected])[0])
