"""Correctness scores, each figure worked out by hand."""

import pytest
import torch

from video_r1.data.answers import extract_answer
from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import Rollout
from video_r1.rewards.scoring import answer_scores, correct_mask, correctness, is_correct


@pytest.mark.parametrize(
    ("problem_type", "answer", "truth", "score"),
    [
        ("multiple choice", " B ", "B", 1.0),
        ("multiple choice", "b", "B", 0.0),
        ("numerical", "3", "3.0", 1.0),  # the reference gives 0: only one of the two has a point
        ("numerical", "1200", "1,200", 1.0),  # and here: only one has a comma
        ("numerical", "0.006", "0", 0.0),
        ("numerical", "nan", "nan", 0.0),
        ("OCR", "3\n7\t2   9", "3 7 2 9", 1.0),
        ("OCR", "3 7 9", "3 7 2 9", 0.75),  # one word missing of four
        ("OCR", "7 3", "3 7 2 9", 0.25),  # 3 and 9 deleted, 2 replaced by 3
        ("OCR", "", "", 1.0),
        # ROUGE-1 5/6, ROUGE-2 3/5, ROUGE-L 5/6
        ("free-form", "the cat lay on the mat", "the cat sat on the mat", (5 / 6 + 3 / 5 + 5 / 6) / 3),
        # precision 1 and recall 3/5: 3/4; bigrams 1 and 2/4: 2/3
        ("free-form", "a red ball", "a red ball rolls left", (3 / 4 + 2 / 3 + 3 / 4) / 3),
        ("free-form", "cats running", "cat runs", 1.0),  # stems
        ("free-form", "", "", 0.0),
        ("regression", "3", "4", 0.75),
        ("regression", "1,000", "2000", 0.5),
        ("regression", "9", "4", 0.0),  # off by 125 %
        ("regression", "0", "0", 0.0),  # the formula has no score at a truth of 0
    ],
)
def test_scores(problem_type: str, answer: str, truth: str, score: float) -> None:
    assert correctness(problem_type, answer, truth) == pytest.approx(score, abs=1e-8)


def test_scores_of_whole_completions() -> None:
    assert correctness("multiple choice", extract_answer("B without tags"), "B") == 0.0
    assert correctness("multiple choice", extract_answer("<answer>B</answer><answer>A</answer>"), "B") == 1.0
    with pytest.raises(ValueError, match=r"'ocr'.*OCR"):
        correctness("ocr", "a", "a")


@pytest.mark.parametrize(
    ("problem_type", "score", "threshold", "correct"),
    [
        ("multiple choice", 1.0, 0.5, True),
        ("OCR", 0.5, 0.5, False),
        ("free-form", 0.2, 0.5, False),
        ("free-form", 0.2, 0.1, True),
        ("regression", 0.75, 0.5, True),
    ],
)
def test_what_counts_as_correct(problem_type: str, score: float, threshold: float, correct: bool) -> None:
    assert is_correct(problem_type, score, threshold) is correct


@pytest.mark.parametrize("tenths", [1, 7])
def test_a_score_at_the_threshold_is_not_above_it(tenths: int) -> None:
    """A group's scores are float32: 0.1 is 0.10000000149 there."""
    words = [f"word{number}" for number in range(10)]
    answer = " ".join(words[:tenths])
    sample = Sample(1, "?", "image", "OCR", f"<answer>{' '.join(words)}</answer>", "a.png")
    rollouts = [Rollout(torch.ones(1).long(), torch.zeros(1), f"<answer>{answer}</answer>", "stop")]
    scores = answer_scores(sample, rollouts)
    assert scores.tolist() == pytest.approx([tenths / 10])
    assert not correct_mask(sample, scores, tenths / 10).any()
    assert correct_mask(sample, scores, tenths / 10 - 0.01).all()
