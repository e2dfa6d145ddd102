"""Reading answers out of model outputs: strictly (training) and tolerantly (evaluation)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPEN_ANSWER = re.compile(r"<answer>(.*)\Z", re.DOTALL)
_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
# "Answer: B", "the final answer is (B)", "**Answer**: 12"
_CUE = re.compile(r"answer\W{0,4}(?:\s+is\b|\s*[:=])\W*?(?=[\w(.+-])", re.IGNORECASE)
_CHOICE_CUE = re.compile(
    r"(?:answer\W{0,4}(?:\s+is\b|\s*[:=])|\b(?:option|choice)\b)[\s*:\"'(\[]*(?:option\s+)?([A-Za-z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
_LETTERS_WITHOUT_OPTIONS = "ABCDEFGHIJ"


def extract_answer(text: str) -> str:
    """The text inside the first `<answer>…</answer>`, stripped; "" when there is no such pair of tags."""
    match = _ANSWER.search(text)
    return match.group(1).strip() if match else ""


def parse_number(text: str) -> float | None:
    """The number that `text` spells, commas taken as thousands separators; None when it spells none.

    Only finite decimal numbers count: no units, no words, no `nan`, no `inf`.
    """
    plain = text.strip().replace(",", "")
    if not _PLAIN_NUMBER.fullmatch(plain):
        return None
    number = float(plain)
    return number if isfinite(number) else None


def read_answer(output: str, problem_type: str, options: Sequence[str] = ()) -> str:
    """The answer that a reader would take from `output`, for evaluation; "" when there is none.

    Looks inside the first answer tags (an unclosed one counts), or without tags at everything but the
    reasoning (which a cut-off output never leaves). Multiple choice gives the option's letter ("(B)", "B.",
    "Answer: B" and the option's text are understood; two different letters are no answer), numerical and
    regression the number's digits, the other types the text itself.
    """
    tagged = _ANSWER.search(output) or _OPEN_ANSWER.search(output)
    if tagged:
        text = tagged.group(1)
    else:
        text = _THINK.sub(" ", output)
    text = _TAG.sub(" ", text).strip()
    if problem_type == "multiple choice":
        return _read_choice(text, options)
    if problem_type in ("numerical", "regression"):
        return _read_number(text, first=tagged is not None)
    return text if tagged else _after_cue(text)


def _after_cue(text: str) -> str:
    cues = list(_CUE.finditer(text))
    return text[cues[-1].end() :].strip() if cues else text


def _read_number(text: str, first: bool) -> str:
    """Inside tags the first number is the answer; free text states it after a cue, or else last."""
    if parse_number(text) is not None:
        return text
    stated = _after_cue(text)
    numbers = [match.group() for match in _NUMBER.finditer(stated)]
    if not numbers:
        return ""
    return numbers[0] if first or stated != text else numbers[-1]


def _split_option(option: str) -> tuple[str, str]:
    """`"B. the man sits"` → `("B", "the man sits")`; an option without a letter has the letter ""."""
    match = re.match(r"\s*\(?([A-Za-z])\s*[.):]\s*(.*)", option, re.DOTALL)
    return (match.group(1).upper(), match.group(2)) if match else ("", option)


def _plain(text: str) -> str:
    """Lower case, words only: what is compared when an option is answered by its text."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _read_choice(text: str, options: Sequence[str]) -> str:
    named: dict[str, str] = {}
    for position, option in enumerate(options):
        letter, option_text = _split_option(option)
        named[letter or chr(ord("A") + position)] = _plain(option_text)
    letters = "".join(named) or _LETTERS_WITHOUT_OPTIONS

    bare = re.sub(r"\\boxed|\\text|[\s*_`$(){}\[\]\"'.:,;!]", "", text)
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    leading = re.match(r"[\s*_`(\[{\"']*([A-Z])[*_`\])}\"']*\s*(?:[.:)\],]|\n)", text)
    if leading and leading.group(1) in letters:
        return leading.group(1)
    cued = [match.upper() for match in _CHOICE_CUE.findall(text) if match.upper() in letters]
    if cued and not _is_article(text, cued[-1]):
        return cued[-1]
    by_text = _option_in_text(_plain(text), named)
    if by_text:
        return by_text
    return _only_letter(text, letters)


def _is_article(text: str, letter: str) -> bool:
    """Whether the last cue's letter is the word "a" in front of another word ("the answer is a dog")."""
    if letter != "A":
        return False
    last = list(_CHOICE_CUE.finditer(text))[-1]
    return bool(re.match(r"\s+[a-z]", text[last.end() :]))


def _option_in_text(plain: str, named: dict[str, str]) -> str:
    """The one option whose words occur in the text; a longer option hides those that it contains."""
    found = {letter: words for letter, words in named.items() if words and f" {words} " in f" {plain} "}
    longest = [
        letter
        for letter, words in found.items()
        if not any(words != other and f" {words} " in f" {other} " for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else ""


def _only_letter(text: str, letters: str) -> str:
    """The one option letter that stands alone in the text; "A" before a word in lower case is an article."""
    standing = set(re.findall(r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9']|(?<=A)\s+(?!or\b|and\b)[a-z])", text))
    standing &= set(letters)
    return standing.pop() if len(standing) == 1 else ""
