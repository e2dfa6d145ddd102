"""Correctness scores, each figure worked out by hand."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

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
        ("free-form", "ball", "ball", 2 / 3),  # one word has no pairs
        ("regression", "3", "4", 0.75),
        ("regression", "1,000", "2000", 0.5),
        ("regression", "9", "4", 0.0),  # off by 125 %
        ("regression", "0", "0", 0.0),  # the formula has no score at a truth of 0
    ],
)
def test_scores(problem_type: str, answer: str, truth: str, score: float) -> None:
    assert correctness(problem_type, answer, truth) == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize(
    ("problem_type", "answer", "truth", "score"),
    [
        ("free-form", "黑白条纹", "黑白条纹", 1.0),
        # two of four characters, one of three pairs, a common sequence of two
        ("free-form", "3个香蕉", "3个苹果", (2 / 4 + 1 / 3 + 2 / 4) / 3),
        ("free-form", "кошка спит", "Кошка СПИТ", 1.0),
        ("free-form", "кошка спит", "собака спит", (1 / 2 + 0 + 1 / 2) / 3),
        ("free-form", "القطة تحت الطاولة", "القطة تحت الطاولة", 1.0),
        ("free-form", "แมว", "หมา", (1 / 3 + 0 + 1 / 3) / 3),
        ("free-form", "की किताब", "का किताब", (1 / 2 + 0 + 1 / 2) / 3),  # they differ in a vowel sign
        ("free-form", "caf\u00e9 noir", "cafe\u0301 NOIR", 1.0),
        ("free-form", "cafe noir", "café noir", (1 / 2 + 0 + 1 / 2) / 3),
        ("free-form", "it’s 3 balls", "it's 3 balls", 1.0),
        ("free-form", "👍👎", "👍 👎\ufe0f", 1.0),
        ("free-form", "?", "¿?", 0.0),
        ("OCR", "在成年人的监督下使用他", "在成年人的监督下使用它", 10 / 11),
        ("OCR", "营业中 OPEN", "营业中 open", 3 / 4),
        ("OCR", "Caf\u00e9 du Nord", "Cafe\u0301 du\u00a0Nord", 1.0),
        ("OCR", "Привет мир", "Привет, мир", 1 / 2),
    ],
)
def test_cases_texts_of_any_script(problem_type: str, answer: str, truth: str, score: float) -> None:
    assert correctness(problem_type, answer, truth) == pytest.approx(score, abs=1e-8)


_ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
_PIECES = [
    "cats",
    "cat",
    "running",
    "It's",
    "U.S.",
    "3.5",
    "$5",
    "_x_",
    "re-enter",
    "happily",
    "a",
    ", ",
    "\n",
]
_TEXTS = st.lists(
    st.sampled_from(_PIECES) | st.text(st.characters(max_codepoint=127), max_size=5), max_size=8
)


@given(_TEXTS.map(" ".join), _TEXTS.map(" ".join))
def test_free_form_scores_of_ascii_are_those_of_rouge_score(answer: str, truth: str) -> None:
    answer, truth = answer.strip(), truth.strip()
    for said in (answer, truth):
        scores = _ROUGE.score(truth, said)
        assert correctness("free-form", said, truth) == sum(s.fmeasure for s in scores.values()) / 3


def test_cases_scores_for_a_user_without_a_home() -> None:
    program = (
        "import os; os.environ.pop('HOME'); os.getuid = lambda: 2**31 - 3\n"
        "from video_r1.data.scores import correctness\n"
        "print(correctness('free-form', 'red balls', 'a red ball'), 'HOME' in os.environ)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert float(said.split()[0]) == pytest.approx((4 / 5 + 2 / 3 + 4 / 5) / 3) and said.split()[1] == "False"


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
