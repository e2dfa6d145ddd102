"""The evaluation of Video-R1's public code (github.com/tulerfeng/Video-R1, src/eval_bench.py): its prompt,
and how it reads and scores an answer. Its frames and sampling are in settings/decoding.py.

Where this differs from the evaluation of this project, it is on purpose as it is there: an answer has to be
the letter and nothing else, free texts score nothing, and comparisons of numbers are rounded to 32 bits.
"""

from dataclasses import replace

import torch

from video_r1.data.answers import extract_answer
from video_r1.data.manifests.records import ProblemType, Sample
from video_r1.data.templates import ANSWER_HINTS, Template
from video_r1.settings.frames import FrameBudget

# Frames are scaled up to this area only, by its author (issue 11).
LEAST_PIXELS = 128 * 28 * 28

# The words that the published checkpoints were trained and evaluated with.
_INSTRUCTION = (
    "Please think about this question as if you were a human pondering deeply. "
    "Engage in an internal dialogue using expressions such as 'let me think', 'wait', 'Hmm', 'oh, I see', "
    "'let's break it down', etc, or other natural language thought expressions "
    "It's encouraged to include self-reflection or verification in the reasoning process. "
    "Provide your detailed reasoning between the <think> and </think> tags, and then give your final answer "
    "between the <answer> and </answer> tags."
)
_NUMBER = "Please provide the numerical value (e.g., 42 or 3.14) within the <answer> </answer> tags."
_HINTS: dict[ProblemType, str] = {
    "multiple choice": "Please provide only the single option letter (e.g., A, B, C, D, etc.) within the "
    "<answer> </answer> tags.",
    "numerical": _NUMBER,
    "OCR": "Please transcribe text from the image/video clearly and provide your text answer within the "
    "<answer> </answer> tags.",
    "free-form": "Please provide your text answer within the <answer> </answer> tags.",
    "regression": _NUMBER,
}


class ReferenceTemplate(Template):
    """Options follow the question's last character, and an empty line follows them."""

    def render(self, sample: Sample) -> str:
        options = "".join(f"{option}\n" for option in sample.options)
        question = f"{sample.problem}Options:\n{options}" if options else sample.problem
        return self.text.format(question=question, hint=self.hints[sample.problem_type])


TEMPLATE = ReferenceTemplate("{question}\n" + _INSTRUCTION + " {hint}", ANSWER_HINTS | _HINTS)


def as_asked(sample: Sample) -> Sample:
    """The sample as it is asked there: about the whole clip, by the template. Of a chat only the last turn is
    left, so that several clips stand before it.
    """
    problem = sample.problem
    if sample.messages and sample.more_paths:
        problem = problem.replace(sample.mark, "")
    return replace(sample, problem=problem, start=None, end=None, messages=())


def as_sized(budget: FrameBudget) -> FrameBudget:
    """The budget with small frames as they are there, where it has room for them."""
    return replace(budget, least_pixels=LEAST_PIXELS) if budget.frame_pixels > LEAST_PIXELS else budget


def read_answer(output: str) -> str:
    """The text in the first answer tags, or all of the output where there is none."""
    return extract_answer(output) or output


def score(problem_type: str, answer: str, truth: str) -> float:
    """In [0, 1]; types that are compared as texts have no score but 0."""
    if problem_type == "multiple choice":
        return float(answer.strip() == truth.strip())
    if problem_type not in ("numerical", "regression"):
        return 0.0
    if problem_type == "numerical" and _has_mark(answer) != _has_mark(truth):
        return 0.0
    predicted, expected = _number(answer), _number(truth)
    if predicted is None or expected is None:
        return 0.0
    if problem_type == "numerical":
        return float(round(predicted, 2) == round(expected, 2))
    return _mean_relative_accuracy(predicted, expected)


def _has_mark(number: str) -> bool:
    return "." in number or "," in number


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _mean_relative_accuracy(predicted: float, truth: float) -> float:
    """MRA with float32 numbers, where an error of exactly 1 − θ counts or not as it is rounded."""
    prediction, target = torch.tensor(predicted), torch.tensor(truth)
    error = (prediction - target).abs() / (target.abs() + 1e-8)
    thresholds = torch.arange(0.5, 0.975, 0.05)
    return (error < 1 - thresholds).float().mean().item()
