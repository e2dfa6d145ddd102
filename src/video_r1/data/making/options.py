"""Options and answers as people write them, made those of a manifest: `"A. text"` and the letter."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from video_r1.data.answers import LETTERS, lettered
from video_r1.errors import RequestError

Reading = Literal["text", "from_0", "from_1"]
"""What a whole number as an answer is: an option's text like any other answer, or its place."""

_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s*")
_WHOLE_NUMBER = re.compile(r"\s*(\d+)(?:\.0)?\s*")
_IN_ONE_LINE = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s+")
_CLEARLY = 0.95  # a reading that understands fewer answers than this share of the best one's is ruled out


def options_of(options: Any, problem_type: str = "multiple choice") -> list[str]:
    """Options as `"A. text"`, from a list of texts, lettered or not, or a mapping of letters to texts."""
    if problem_type != "multiple choice":
        return []
    if isinstance(options, Mapping):
        return [f"{letter}. {text}" for letter, text in sorted(options.items())]
    texts = [str(option) for option in options]
    letters = [match and match.group(1) for match in map(_LETTERED.match, texts)]
    if letters == list(LETTERS[: len(texts)]):
        texts = [text[len(_prefix(text)) :] for text in texts]
    return lettered(texts)


def _prefix(option: str) -> str:
    match = _LETTERED.match(option)
    return match.group() if match else ""


def answer_of(answer: Any, options: Sequence[str], read_as: Literal["letter", "text"] = "letter") -> str:
    """The option's letter for an answer given as letter, as `"B. text"` or as the option's text.

    read_as: what an answer is that is one option's letter and another one's text ("A" of "A. E", "B. A").
    """
    text = str(answer).strip()
    if not options:
        return text
    letters = [option[0] for option in options]
    texts = [option[len(_prefix(option)) :].strip() for option in options]
    bare = text.strip("().: ")
    if bare in letters and not (read_as == "text" and text in texts):
        return bare
    if text in texts:
        return letters[texts.index(text)]
    prefix = _prefix(text)
    return prefix.strip("(.): ") if prefix and text[len(prefix) :].strip() in texts else text


def listed(options: Any) -> Any:
    """Options as they stand in one cell: a list as JSON or Python write it, or texts with line breaks, "|",
    ";" or their letters between them. What is no text stays as it is."""
    if not isinstance(options, str):
        return options
    text = options.strip()
    if text.startswith(("[", "{")):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(text)
            except (ValueError, SyntaxError, RecursionError):
                continue
    for separator in ("\n", "|", ";"):
        if separator in text:
            return [part.strip() for part in text.split(separator) if part.strip()]
    letters = list(_IN_ONE_LINE.finditer(text))
    if len(letters) > 1 and "".join(match.group(1) for match in letters) == LETTERS[: len(letters)]:
        ends = [match.start() for match in letters[1:]] + [len(text)]
        return [text[match.start() : end].strip() for match, end in zip(letters, ends, strict=True)]
    return [text]


def split_options(question: str) -> tuple[str, list[str]]:
    """A question whose options stand in it, each on a line that begins with its letter, as (question,
    options). What follows them is an instruction and left out. Without two options or more: all of it, []."""
    lines = question.split("\n")
    letters = [match[1] if (match := _LETTERED.match(line)) else "" for line in lines]
    for begin in (place for place, letter in enumerate(letters) if letter == "A"):
        end = begin + 1
        while letters[end : end + 1] == [LETTERS[end - begin]]:
            end += 1
        if end - begin > 1:
            return "\n".join(lines[:begin]).strip(), [line.strip() for line in lines[begin:end]]
    return question, []


def read_choice(answer: Any, options: Sequence[str], reading: Reading) -> str:
    """The letter of the option that is meant; "" where none is, or more than one: "B. red" where red is A.
    options: as `options_of` gives them."""
    number = _WHOLE_NUMBER.fullmatch(str(answer))
    if number and reading != "text":
        place = int(number[1]) - (reading == "from_1")
        return LETTERS[place] if 0 <= place < len(options) else ""
    texts = {option[0]: _plain(option[len(_prefix(option)) :]) for option in options}
    text = str(answer).strip()
    prefix = _prefix(text)
    letter = (prefix or text).strip("(). :").upper()
    said = {_plain(text), _plain(text[len(prefix) :])}
    meant = {letter} & texts.keys() | {name for name, words in texts.items() if words in said}
    return meant.pop() if len(meant) == 1 else ""


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def reading_of(choices: Sequence[tuple[Any, Sequence[str]]]) -> Reading:
    """How the numbers among the answers of a table are read, where its rows leave no doubt.

    Each reading is tried on all (answer, options). One that understands clearly fewer of them than another is
    ruled out: places from 0 have a 0 somewhere, places from 1 the number of the last option. Raises
    RequestError where several are left that do not agree.
    """
    numbers = [(answer, options) for answer, options in choices if _WHOLE_NUMBER.fullmatch(str(answer))]
    read = {
        reading: [read_choice(answer, options, reading) for answer, options in numbers]
        for reading in get_args(Reading)
    }
    understood = {reading: sum(map(bool, letters)) for reading, letters in read.items()}
    most = max(understood.values())
    left = [reading for reading, count in understood.items() if most and count >= _CLEARLY * most]
    if not left:
        return "text"
    if any(read[reading] != read[left[0]] for reading in left):
        answer, options = numbers[0]
        raise RequestError(
            f"{len(numbers):,} answers are numbers, which may be read as {' or '.join(left)} (the first "
            f"one is {answer}, of {', '.join(options)}); say which: --answers text (an option's own text), "
            "from_0 or from_1 (its place)"
        )
    return left[0]
