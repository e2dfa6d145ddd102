"""Answers as training reads them (strictly) and as evaluation reads them (tolerantly)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_r1.data.answers import extract_answer, parse_number, read_answer

OPTIONS = ("A. left", "B. right", "C. dark red", "D. red")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>t</think><answer>B</answer>", "B"),
        ("<think>t</think>\n<answer>\n  the man sits \n</answer>", "the man sits"),
        ("<answer>A</answer> then <answer>B</answer>", "A"),
        ("<think>maybe <answer>C</answer></think><answer>D</answer>", "C"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", ""),
        ("no tags: B", ""),
        ("<answer>B", ""),
        ("B</answer>", ""),
        ("", ""),
    ],
)
def test_strict_answer_is_the_first_pair_of_tags(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12.0),
        (" -3.50 ", -3.5),
        ("+7", 7.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1,200", 1200.0),
        ("1,234,567.89", 1234567.89),
        ("2e3", 2000.0),
        ("", None),
        (",", None),
        ("-", None),
        ("three", None),
        ("12 m", None),
        ("12%", None),
        ("nan", None),
        ("inf", None),
        ("1e999", None),
        ("1_000", None),
        ("1 000", None),
        ("1.2.3", None),
    ],
)
def test_parse_number(text: str, number: float | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("<think>A or C?</think><answer>B</answer>", "B"),
        ("<answer>B</answer><answer>C</answer>", "B"),
        ("<think>x</think><answer>B. right", "B"),
        ("<think>A. left is out</think> B", "B"),
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) right\nbecause it moves", "B"),
        ("**B**", "B"),
        ("\\boxed{B}", "B"),
        ("B. right", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The answer is (B).", "B"),
        ("First I thought the answer is A. No: the answer is B", "B"),
        ("The correct option is B", "B"),
        ("I choose B because of that", "B"),
        ("right", "B"),
        ("It moves right.", "B"),
        ("The answer is a right turn", "B"),
        ("dark red", "C"),
        ("Red!", "D"),
        # two answers, or none, are not read as one
        ("A or B", ""),
        ("Both B and C", ""),
        ("left or right", ""),
        ("E", ""),
        ("no idea", ""),
        ("<think>so the answer is C, but", ""),
        ("", ""),
    ],
)
def test_tolerant_choice(output: str, letter: str) -> None:
    assert read_answer(output, "multiple choice", OPTIONS) == letter


def test_options_without_letters_and_no_options_at_all() -> None:
    assert read_answer("the second: walks", "multiple choice", ("runs", "walks")) == "B"
    assert read_answer("Answer: G", "multiple choice") == "G"


@pytest.mark.parametrize("problem_type", ["numerical", "regression"])
@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("<answer>12</answer>", 12),
        ("<answer>about 3.5 meters</answer>", 3.5),
        ("<answer>3 of 12</answer>", 3),
        ("<think>1 2 3</think> 7", 7),
        ("$1,200.50", 1200.5),
        ("There are 3 red and 4 blue, so 7", 7),
        ("The answer is 5, and not 6", 5),
        ("Answer: -2", -2),
        ("1e3", 1000),
        ("many", None),
    ],
)
def test_tolerant_number(output: str, number: float | None, problem_type: str) -> None:
    assert parse_number(read_answer(output, problem_type)) == number


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("<think>t</think><answer> 3 7 2 </answer>", "3 7 2"),
        ("<think>t</think> 3 7 2", "3 7 2"),
        ("Answer: 3 7 2", "3 7 2"),
        ("<answer>The answer is a ball", "The answer is a ball"),
        ("", ""),
    ],
)
def test_tolerant_text(output: str, text: str) -> None:
    assert read_answer(output, "OCR") == text
    assert read_answer(output, "free-form") == text


@given(st.text(), st.sampled_from(["multiple choice", "numerical", "regression", "OCR", "free-form"]))
def test_any_output_is_read_without_an_error(output: str, problem_type: str) -> None:
    answer = read_answer(output, problem_type, OPTIONS)
    if problem_type == "multiple choice":
        assert answer in ("", "A", "B", "C", "D")
    if problem_type == "numerical" and answer:
        assert parse_number(answer) is not None


@given(st.sampled_from("ABCD"), st.text(alphabet="abc ABCD.<>/", max_size=40))
def test_what_is_strictly_right_is_tolerantly_right(letter: str, thought: str) -> None:
    output = f"<think>{thought}</think>\n<answer>{letter}</answer>"
    assert read_answer(output, "multiple choice", OPTIONS) == extract_answer(output) == letter
