"""The fields of a manifest's row, one by one: what each says, and what is wrong with it.

Each function appends to `found`, in words, whatever keeps its field from being used.
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from video_r1.data.grounding import GROUNDING_FORMS

_LETTER = re.compile(r"\s*\(?([A-Z])(?:[.):]|\s*$)")  # "A. text", "(A) text", "A: text", "A"


def text_field(row: dict[str, Any], name: str, found: list[str], required: bool = True) -> str:
    value = row.get(name)
    if value is None:
        if required:
            found.append(f"{name} is missing")
        return ""
    if not isinstance(value, str):
        found.append(f"{name} is {quoted(value)}; it must be a string")
        return ""
    if required and not value.strip():
        found.append(f"{name} is empty")
        return ""
    return value


def path_field(row: dict[str, Any], find: Callable[[str], str], found: list[str]) -> list[str]:
    """The files of a row whose `path` is a text or a list of them. find: where each lies, or ValueError."""
    said = row.get("path")
    if isinstance(said, (list, tuple)):
        if not said or not all(isinstance(path, str) and path.strip() for path in said):
            found.append(f"path is {quoted(said)}; a list of paths has a text for each clip or image")
            return []
    else:
        said = [path] if (path := text_field(row, "path", found)) else []
    paths = []
    for path in said:
        try:
            paths.append(find(path))
        except ValueError as error:
            found.append(str(error))
    return paths


def several_problems(
    count: int, data_type: str, problem_type: str, marks: int, has_window: bool
) -> Iterator[str]:
    """What keeps a row from showing `count` clips or images. marks: how many stand in its text."""
    files = f"path names {count} {data_type}s"
    if has_window:
        yield f"start and end are a window of one clip, and {files}; cut the clips and name the parts"
    if problem_type in GROUNDING_FORMS:
        yield f"a {problem_type} problem is about one {data_type}, and {files}"
    if marks not in (0, count):
        yield (
            f"{files}, and its text has the mark <{data_type}> {marks} times; write it where each of them "
            "goes, in their order, or nowhere: then they stand before the question"
        )


def messages_field(row: dict[str, Any], found: list[str]) -> tuple[Mapping[str, str], ...]:
    """Turns of a chat, whose last one asks."""
    said = row.get("messages")
    if said is None or said in ([], ()):
        return ()
    if not isinstance(said, (list, tuple)) or not all(map(_is_turn, said)):
        turn = '{"role": "system" | "user" | "assistant", "content": a text}'
        found.append(f"messages is {quoted(said)}; it must be a list of {turn}")
        return ()
    if said[-1]["role"] != "user":
        found.append(f"messages end with one of the {said[-1]['role']}; the last one must be the user's")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in said)


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
    )


def one_of(row: dict[str, Any], name: str, known: tuple[str, ...], found: list[str]) -> Any:
    value = row.get(name)
    if value is None:
        found.append(f"{name} is missing")
    elif not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(str(value).lower().replace("_", " "), [k.lower() for k in known], 1)
        hint = f" (did you mean {next(k for k in known if k.lower() == near[0])!r}?)" if near else ""
        found.append(f"{name} is {quoted(value)}; known are {', '.join(known)}{hint}")
    else:
        return sys.intern(value)
    return ""


def options_field(
    row: dict[str, Any], problem_type: str, answer: str | None, min_options: int, found: list[str]
) -> tuple[tuple[str, ...], str | None]:
    """The options, and the letter of the solution where the problem is multiple choice."""
    options = row.get("options")
    if options is None:
        options = []
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
        found.append(f"options is {quoted(options)}; it must be a list of strings")
        return (), None
    if problem_type != "multiple choice":
        if options and problem_type:
            found.append(f"options are given, but the problem is {problem_type}, not multiple choice")
        return tuple(options), None
    if len(options) < min_options:
        found.append(f"a multiple choice problem needs two options or more, found {len(options)}")
        return tuple(options), None
    letters = []
    for option in options:
        match = _LETTER.match(option)
        if match is None:
            found.append(f"option {quoted(option)} does not begin with its letter, as in 'A. the man sits'")
        else:
            letters.append(match.group(1))
    twice = sorted({letter for letter in letters if letters.count(letter) > 1})
    if twice:
        found.append(f"options use the letter {', '.join(twice)} more than once")
    if not answer or len(letters) < len(options):
        return tuple(options), None
    solution = _LETTER.match(answer)
    letter = solution and solution.group(1)
    if letter is None:
        found.append(
            f"the solution of a multiple choice problem must be an option's letter, not {quoted(answer)}"
        )
    elif letter not in letters:
        found.append(f"the solution {letter} is not among the options {', '.join(letters)}")
    elif letter != answer.strip("(). :") and answer != options[letters.index(letter)].strip():
        found.append(f"the solution {quoted(answer)} is not the text of option {letter}")
    return tuple(options), letter


def window_field(row: dict[str, Any], data_type: str, found: list[str]) -> tuple[float | None, float | None]:
    times: list[float | None] = []
    for name in ("start", "end"):
        value = row.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < 1e9):  # false for NaN as well
            found.append(f"{name} is {quoted(value)}; it must be a time in seconds from the beginning")
            return None, None
        times.append(None if value is None else float(value))
    start, end = times
    if end is not None and end <= (start or 0.0):
        found.append(f"the window ends ({end:g} s) before it starts ({start or 0.0:g} s)")
    if data_type == "image" and (start is not None or end is not None):
        found.append("start and end are for videos, and this is an image")
    return start, end


def rate_of(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < 1e6 else None


def quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
