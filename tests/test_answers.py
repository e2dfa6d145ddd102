"""Answers as training reads them (strictly) and as evaluation reads them (tolerantly)."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_r1.data.answers import extract_answer, is_doubtful_number, parse_number, read_answer

OPTIONS = ("A. left", "B. right", "C. dark red", "D. red")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>t</think><answer>B</answer>", "B"),
        ("<think>t</think>\n<answer>\n  the man sits \n</answer>", "the man sits"),
        ("<answer>A</answer> then <answer>B</answer>", "A"),
        ("<think>maybe <answer>C</answer></think><answer>D</answer>", "C"),
        ("<answer>two\nlines</answer>", "two\nlines"), ("<answer></answer>", ""), ("no tags: B", ""),
        ("<answer>B", ""), ("B</answer>", ""), ("", ""),
    ],
)  # fmt: skip
def test_strict_answer_is_the_first_pair_of_tags(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12.0), (" -3.50 ", -3.5), (".5", 0.5), ("1,200", 1200.0), ("1,234,567.89", 1234567.89),
        ("2e3", 2000.0), (",", None), ("three", None), ("12 m", None), ("nan", None), ("1e999", None),
        ("1_000", None), ("−5", -5.0), ("–5", -5.0), ("－5", -5.0), ("1 200", 1200.0),
        ("12\u00a0345.5", 12345.5), ("1\u202f200", 1200.0),
        ("1 2", None), ("1 200 30", None),
    ],
)  # fmt: skip
def test_parse_number(text: str, number: float | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("<think>A or C?</think><answer>B</answer>", "B"),
        ("<answer>B</answer><answer>C</answer>", "B"),
        ("<think>x</think><answer>B. right", "B"),
        ("<think>A. left is out</think> B", "B"),
        ("b", "B"),
        ("B) right\nbecause it moves", "B"),
        ("B. right", "B"),
        ("right", "B"),
        ("It moves right.", "B"),
        ("The answer is a right turn", "B"),
        ("dark red", "C"),
        ("Red!", "D"),
        # two answers, or none, are not read as one
        ("left or right", ""),
        ("E", ""),
        ("no idea", ""),
        ("<think>so the answer is C, but", ""),
        ("", ""),
    ],
)
def test_tolerant_choice(output: str, letter: str) -> None:
    assert read_answer(output, "multiple choice", OPTIONS) == letter


# Each with every letter in the place of X, and another one in that of Y.
ONE_ANSWER = [
    "X is correct.", "Option X describes the clip", "The best choice: X", "The answer is option X.",
    "Answer: **X** since it moves", "I choose X because of that", "I pick X, not Y", "X because it moves",
    "X fits best", "So X.", "(X) is what I see", "$\\boxed{X}$", "The answer is $\\boxed{\\text{X}}$",
    "X. Y is wrong.", "X (Y is wrong)", "It isn't Y. It's X", "Y can be ruled out; X is right",
    "The answer is X, not Y.", "Answer: X\n\nOption Y is wrong because it does not move.",
    "X or Y? The answer is X", "Neither Y nor anything else, only X",
    "I first thought Y is correct. But the answer is X", "X", "(X)", "X.", "**X**", "\\boxed{X}",
    "Answer: X", "**Answer:** X", "The answer is (X).", "The correct option is X",
    "First I thought the answer is Y. No: the answer is X", "Y... no, wait: X is right.",
    "X. Actually, Y is wrong.", "X. Wait for the end.", "X, no doubt.", "X. There is no dog in Y",
]  # fmt: skip
NO_ANSWER = [
    "X, Y", "(X) or (Y)", "X or Y", "X and Y", "X Y", "X\nY", "Either X or Y", "X, Y and maybe even Y",
    "Both X and Y are correct", "Option X, option Y", "The answer is X or Y", "X or Y is correct", "not X",
    "It is not X", "It can't be X", "X is wrong.", "Option X is incorrect", "The answer is not X",
    "neither X nor Y", "X can be ruled out", "Both X and Y", "Wait, X? No, Y.",
    "At first I thought X, but it is Y", "X looked right at first; it is Y", "X... no, wait, Y.", "X. No, Y.",
    "X, actually Y", "(X). Actually, it should be Y.", "Answer: X. On second thought, Y.",
    "So X. But wait, it's Y", "The answer is X. No, Y.", "I choose X, sorry, I mean Y",
    "None of these", "None of them fits.",
]  # fmt: skip


@pytest.mark.parametrize("form", ONE_ANSWER)
def test_one_letter_is_read(form: str) -> None:
    letter, other = "DA"
    output = form.replace("X", letter).replace("Y", other)
    assert read_answer(output, "multiple choice", OPTIONS) == letter
    assert read_answer(f"<think>Y</think><answer>{output}", "multiple choice", OPTIONS) == letter


@pytest.mark.parametrize("form", NO_ANSWER)
def test_two_letters_or_a_denied_one_are_no_answer(form: str) -> None:
    letter, other = "DA"
    output = form.replace("X", letter).replace("Y", other)
    assert read_answer(output, "multiple choice", OPTIONS) == ""


COLOURS = ("A. red", "B. blue", "C. not blue at all", "D. a dog")


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("not blue", ""), ("It is not blue.", ""), ("It isn't blue", ""), ("blue is wrong", ""),
        ("It is not blue but red", "A"), ("red, not blue", "A"), ("not blue at all", "C"),
        ("It is not blue at all.", "C"), ("red or blue", ""), ("A. red or B. blue", ""),
        ("A. red\nB. blue\nC. not blue at all\nD. a dog", ""), ("A. red, B. blue. The answer is B", "B"),
        ("B. blue, not red", "B"), ("A red car", "A"), ("A dog", "D"), ("The answer is A dog", "D"),
        ("The answer is a dog.", "D"), ("The answer is a small one", ""), ("A man walks by.", ""),
        ("I see a man.", ""), ("A best describes it.", "A"), ("A best friend walks by.", ""),
        ("the answer is a", "A"), ("the answer is a or b", ""),
        ("option a is right", "A"), ("No doubt blue", "B"), ("Not sure, blue", "B"),
    ],
)  # fmt: skip
def test_options_named_by_their_texts(output: str, letter: str) -> None:
    assert read_answer(output, "multiple choice", COLOURS) == letter


def test_none_of_these_is_an_answer_where_it_is_an_option() -> None:
    options = ("A. red", "B. blue", "C. None of these")
    for output in ("None of these.", "The answer is none of these"):
        assert read_answer(output, "multiple choice", options) == "C"
        assert read_answer(output, "multiple choice", options[:2]) == ""


def test_options_that_differ_in_signs_only() -> None:
    options = ("A. को", "B. का", "C. 👍", "D. 👎")
    assert [
        read_answer(f"<answer>{option[3:]}</answer>", "multiple choice", options) for option in options
    ] == [*"ABCD"]


def test_the_word_i_is_no_option() -> None:
    assert read_answer("I choose B", "multiple choice") == "B"
    assert read_answer("I is correct", "multiple choice") == "I"
    assert read_answer("B. A", "multiple choice", ("A. C", "B. A", "C. B")) == "B"  # texts that are letters


def test_options_without_letters_and_no_options_at_all() -> None:
    assert read_answer("the second: walks", "multiple choice", ("runs", "walks")) == "B"
    assert read_answer("Answer: G", "multiple choice") == "G"


DECIMAL_COMMAS = [
    "3,5",
    "12,5",
    "0,5",
    "0,500",
    "1.234,5",
    "1 234,5",
    "1234,567",
    "12,34,567",
    "-3,25",
    "1'200,5",
]


@pytest.mark.parametrize("number", DECIMAL_COMMAS)
@pytest.mark.parametrize(
    "form",
    ["{}", "<answer>{}</answer>", "I saw 3. The answer is {} m.", "7 or {}", r"{} \times 10^3", "{}/2"],
)
def test_cases_a_comma_separates_groups_of_three_digits_only(number: str, form: str) -> None:
    """Elsewhere it may be a decimal comma: no other number of the text is taken in its place, either."""
    assert parse_number(number) is None and is_doubtful_number(number)
    assert read_answer(form.format(number), "numerical") == ""


@pytest.mark.parametrize("text", ["3", "1,200", "1 200", "12.5.2024", "1, 2", "a 3,5", ""])
def test_numbers_and_other_texts_are_not_doubtful(text: str) -> None:
    assert not is_doubtful_number(text)


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
        ("about 1e-3 m", 0.001),
        ("about 20-30", 30),  # a range, of which the last number is read
        ("about 20%-30%", 30),
        ("from .5-.7", 0.7),
        ("<answer>20-30 people</answer>", 20),
        ("it is -30 degrees", -30),
        ("x = -30.", -30),
        ("(-30)", -30),
        ("$-30", -30),
        ("__-30__", -30),
        ("答案是-30。", -30),
        ("−5", -5),
        ("- 5", -5),
        ("x = - 5", -5),
        ("- 5 cats\n- 3 dogs", 3),  # a list
        ("1/2", 0.5),
        ("The answer is -1 1/2.", -1.5),
        (r"\frac{1}{2}", 0.5),
        ("3/4/2024", None),
        ("1/0", None),
        ("10^3", 1000),
        (r"2 \times 10^{3}", 2000),
        ("9^999", None),
        ("5 m^2", 5),
        ("about 1 200 people", 1200),
        ("1 200, I think", 1200),
        ("12 345.5 m", 12345.5),
        (r"1{,}200", 1200),
        ("1,2 or 7", 7),
        ("1/2.5", 0.4),
        ("<answer>–5 °C</answer>", -5),
        ("10–20", 20),
        ("it is – 5", 5),  # a dash of the sentence
        ("3...5", 5),
        ("many", None),
    ],
)
def test_tolerant_number(output: str, number: float | None, problem_type: str) -> None:
    assert parse_number(read_answer(output, problem_type)) == number


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("<think>t</think><answer> 3 7 2 </answer>", "3 7 2"), ("<think>t</think> 3 7 2", "3 7 2"),
        ("Answer: 3 7 2", "3 7 2"), ("<answer>The answer is a ball", "The answer is a ball"), ("", ""),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize("piece", ["<answer>", "B is ", "<think>", "1,", "A, ", "not "])
def test_long_nonsense_is_read_at_once(piece: str) -> None:
    output, began = piece * (40_000 // len(piece)), time.process_time()
    for problem_type in ("multiple choice", "numerical", "OCR"):
        read_answer(output, problem_type, OPTIONS)
    extract_answer(output)
    assert time.process_time() - began < 0.5
