"""From a draft to a row of a manifest: letters, types, times, the file, subtitles.

table ─► layout or columns ─► draft ─► manifest_row ─► manifests/records.py
                                          └► Rejected: the reason and its remedy
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from video_r1.data.answers import (
    LETTERS,
    is_doubtful_number,
    option_prefix,
    options_of,
    parse_number,
    parse_options,
    read_answer,
    split_options,
)
from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.data.making.clip_index import SUBTITLE_EXTENSIONS, ClipIndex
from video_r1.data.making.layouts import Draft, Numbers, Rejected, tags_in, without_tags
from video_r1.data.manifests.records import DATA_TYPES, FIELDS, PROBLEM_TYPES
from video_r1.data.manifests.tables import InTable
from video_r1.data.sources.media_paths import MediaPaths, data_type_of, path_below
from video_r1.errors import RequestError

_TYPE_NAMES = {
    "multiple choice": "multichoice mcq mc choice choices",
    "numerical": "numeric number num integer float",
    "free-form": "openended open oe freetext text",
    "math": "mathematical mathematics latex",
    "temporal grounding": "momentretrieval",
    "spatial-temporal grounding": "spatiotemporalgrounding",
}
_TYPES = {re.sub(r"[\W_]", "", name.lower()): name for name in PROBLEM_TYPES}
_TYPES |= {name: problem_type for problem_type, names in _TYPE_NAMES.items() for name in names.split()}
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")
_LARGEST_SUBTITLES = 1 << 24
_TAGGED = re.compile(r"\s*<(think|answer)>(.*)</\1>\s*", re.DOTALL)
_WHOLE_NUMBER = re.compile(r"\s*(\d+)(?:\.0)?\s*")
_CLEARLY = 0.95  # a reading that understands less than this share of what the best one does is ruled out
# Both subtitle formats give each cue a line with its times; SubRip has a comma before the milliseconds,
# WebVTT may lack hours (https://www.w3.org/TR/webvtt1/).
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{1,3})"
_CUE = re.compile(rf"^[^\S\n]*{_TIME}\s*-->\s*{_TIME}.*\n((?:.*\S.*(?:\n|\Z))*)", re.MULTILINE)
_MARKUP = re.compile(r"<[^>\n]*>|\{\\[^}\n]*\}")


@dataclass(frozen=True)
class Making:
    """Shared parts of all rows of a table: the files and the settings."""

    clips: ClipIndex
    places: MediaPaths
    problem_type: str | None = None  # of every question; None: the row's, or by its options and answer
    subtitles: Literal["off", "text", "timed"] = "off"


def question_and_options(draft: Draft) -> tuple[str, list[str]]:
    """Return the question and its options ("A. text"), which the question may contain. Raises Rejected."""
    problem = str(draft.get("problem") or "").strip()
    if not problem:
        raise Rejected("no question", "there is no question")
    given = parse_options(draft.get("options"))
    if given in (None, [], {}):
        problem, given = split_options(problem)
        if not given:
            return problem, []
    if not isinstance(given, (list, tuple, Mapping)):
        raise Rejected("options", f"the options are {given!r}")
    texts = list(given.values() if isinstance(given, Mapping) else given)
    if any(text is None or not str(text).strip() for text in texts):
        raise Rejected("options", f"one of the options is empty: {texts}")
    if not 2 <= len(texts) <= len(LETTERS):
        raise Rejected("options", f"there are {len(texts)} options: {texts}")
    return problem, options_of(given)


def manifest_row(draft: Draft, making: Making, numbers: Numbers) -> dict[str, Any]:
    """Return the row of a manifest, without its problem_id. Raises Rejected."""
    problem, options = question_and_options(draft)
    answer = plain_text(draft.get("answer"))
    if (tagged := _TAGGED.fullmatch(answer)) and tagged[1] == "answer":
        answer = tagged[2].strip()
    if not answer:
        raise Rejected("no answer", "there is no answer")
    problem_type = _problem_type(making.problem_type or draft.get("problem_type"), options, answer)
    if problem_type == "multiple choice":
        if not options:
            raise Rejected("options", "a multiple choice question without options")
        letter = read_choice(answer, options, numbers)
        if not letter:
            raise Rejected("answer is no option", f"the answer {answer!r} names none, or two, of {options}")
        answer = letter
    elif problem_type in GROUNDING_FORMS:
        read = read_answer(f"<answer>{answer}</answer>", problem_type)
        if not read:
            form = GROUNDING_FORMS[problem_type]
            raise Rejected("no place or time", f"the answer {answer[:80]!r} is not of the form {form}")
        answer = read
    media = _media(draft, making)
    if isinstance(media["path"], list):
        tags = [f"<{media['data_type']}>"] * len(media["path"])
        if tags_in("".join([problem, *options])) != tags:  # they do not say where each file goes
            problem, options = without_tags(problem), [*map(without_tags, options)]
    row: dict[str, Any] = {
        "problem": problem,
        "problem_type": problem_type,
        "options": options,
        "solution": f"<answer>{answer}</answer>",
        **media,
        **{name: seconds for name in ("start", "end") if (seconds := _seconds(draft.get(name))) is not None},
    }
    if process := plain_text(draft.get("process")):
        row["process"] = process if _TAGGED.fullmatch(process) else f"<think>{process}</think>"
    if source := plain_text(draft.get("data_source")):
        row["data_source"] = source
    if spoken := _subtitles(draft, making, row):
        row["subtitles"] = spoken
    rest = {
        name: value
        for name, value in draft.items()
        if name not in (*FIELDS, "answer") and value is not None and not isinstance(value, InTable)
    }
    return {**row, **rest}


def plain_text(value: Any) -> str:
    """Return a cell as text; whole numbers lose the ".0" that a column of floats gives them."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _problem_type(given: Any, options: list[str], answer: str) -> str:
    """Return the given type, or guess it: multiple choice with options, numerical for numbers, else
    free-form. A row does not show whether a text is read off the picture (OCR) or a number measured
    (regression)."""
    if given:
        name = re.sub(r"[\W_]", "", str(given).lower())
        if name not in _TYPES:
            raise Rejected("problem type", f"the type is {given!r}")
        return _TYPES[name]
    if options:
        return "multiple choice"
    if is_doubtful_number(answer):
        raise Rejected("doubtful number", f"the answer {answer!r}: a comma stands only before three digits")
    return "free-form" if parse_number(answer) is None else "numerical"


def _media(draft: Draft, making: Making) -> dict[str, Any]:
    """Return `data_type` and `path`, which is a list for several files."""
    named = draft.get("path")
    if isinstance(named, (list, tuple)):
        found = [_media({**draft, "path": path}, making) for path in named or [None]]
        kinds = {one["data_type"] for one in found}
        if len(kinds) > 1:
            raise Rejected("several media", f"it shows {', '.join(map(str, named))}")
        paths = [one["path"] for one in found]
        return {"data_type": kinds.pop(), "path": paths if len(paths) > 1 else paths[0]}
    held = [value for value in draft.values() if isinstance(value, InTable) and value.kind in DATA_TYPES]
    if not named and len(held) == 1:
        named = held[0]
    if isinstance(named, InTable) and named.places and named.kind in DATA_TYPES:
        paths = [path_below(making.places.root, place) for place in named.places]
        for path in paths:
            _check_place(path, making.places)
        return {"data_type": named.kind, "path": paths if len(paths) > 1 else paths[0]}
    if isinstance(named, InTable) or (not named and held):
        raise Rejected("media inside the table", "the table contains the file itself instead of its name")
    path = plain_text(named)
    if not path:
        raise Rejected("no clip named", "there is no file name")
    data_type = plain_text(draft.get("data_type")).lower().removesuffix("s")
    known = data_type if data_type in DATA_TYPES else None
    found_path = making.clips.find(path, known)
    _check_place(found_path, making.places)
    return {"data_type": known or data_type_of(found_path), "path": found_path}


def _check_place(path: str, places: MediaPaths) -> None:
    try:
        places.find(path)
    except ValueError as error:
        raise Rejected("clip elsewhere", str(error)) from error


def _seconds(value: Any) -> float | None:
    text = plain_text(value)
    if not text:
        return None
    if (clock := _CLOCK.fullmatch(text)) is not None:
        return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
    number = parse_number(text)
    if number is None or number < 0:
        raise Rejected("times", f"the time {text!r}")
    return number


# --- answers to multiple choice ------------------------------------------------------------------


def read_choice(answer: Any, options: Sequence[str], numbers: Numbers) -> str:
    """Return the letter of the option that `answer` names; "" for none or several ("B. red" where A is red).
    options: in the form of `options_of`."""
    number = _WHOLE_NUMBER.fullmatch(str(answer))
    if number and numbers != "text":
        place = int(number[1]) - (numbers == "from_1")
        return LETTERS[place] if 0 <= place < len(options) else ""
    texts = {option[0]: _folded(option[len(option_prefix(option)) :]) for option in options}
    text = str(answer).strip()
    prefix = option_prefix(text)
    letter = (prefix or text).strip("(). :").upper()
    said = {_folded(text), _folded(text[len(prefix) :])}
    meant = {letter} & texts.keys() | {name for name, words in texts.items() if words in said}
    return meant.pop() if len(meant) == 1 else ""


def _folded(text: str) -> str:
    return text.strip().rstrip(".").casefold()


def numbers_of(choices: Sequence[tuple[Any, Sequence[str]]]) -> Numbers:
    """Return how the whole numbers among a table's answers are read, where its rows leave no doubt.

    Each reading is tried on all (answer, options). A reading that understands clearly fewer answers than
    another is ruled out: positions from 0 have a 0 somewhere, positions from 1 the number of the last option.
    Raises RequestError where several readings are left and disagree.
    """
    whole = [(answer, options) for answer, options in choices if _WHOLE_NUMBER.fullmatch(str(answer))]
    read = {
        numbers: [read_choice(answer, options, numbers) for answer, options in whole]
        for numbers in get_args(Numbers)
    }
    understood = {numbers: sum(map(bool, letters)) for numbers, letters in read.items()}
    most = max(understood.values())
    left = [numbers for numbers, count in understood.items() if most and count >= _CLEARLY * most]
    if not left:
        return "text"
    if any(read[numbers] != read[left[0]] for numbers in left):
        answer, options = whole[0]
        raise RequestError(
            f"{len(whole):,} answers are numbers, which may be read as {' or '.join(left)} (the first "
            f"one is {answer}, of {', '.join(options)}); say which: --answers text (an option's own text), "
            "from_0 or from_1 (its position)"
        )
    return left[0]


# --- subtitles: SubRip (.srt) and WebVTT (.vtt) --------------------------------------------------


def _subtitles(draft: Draft, making: Making, row: Mapping[str, Any]) -> str:
    """Return the subtitles of the row's window: from the file or text in its column, or from the file beside
    the clip."""
    if making.subtitles == "off":
        return ""
    text = plain_text(draft.get("subtitles"))
    if text and not text.lower().endswith(SUBTITLE_EXTENSIONS):
        if "-->" not in text:
            return text
    else:
        clip = row["path"]
        path = text or (making.clips.subtitles_of(clip) if isinstance(clip, str) else None)
        if path is None:
            return ""
        try:
            file = Path(making.places.find(path))
            if file.stat().st_size > _LARGEST_SUBTITLES:
                raise Rejected("subtitles", f"{path} has {file.stat().st_size:,} bytes")
            text = file.read_text(encoding="utf-8-sig")
        except (ValueError, OSError) as error:
            raise Rejected("subtitles", f"{path}: {error}") from error
    return subtitle_lines(text, making.subtitles == "timed", row.get("start"), row.get("end"))


def subtitle_lines(text: str, timed: bool, start: float | None = None, end: float | None = None) -> str:
    """Return the cues in the window from `start` to `end`, one a line. timed: put the minute and second of
    the window at which each begins before it: "0:03 Hello."."""
    lines = []
    for cue_start, cue_end, words in _cues(text):
        if cue_end > (start or 0.0) and (end is None or cue_start < end):
            second = int(max(0.0, cue_start - (start or 0.0)))
            lines.append(f"{second // 60}:{second % 60:02} {words}" if timed else words)
    return "\n".join(lines)


def _cues(text: str) -> Iterator[tuple[float, float, str]]:
    """Yield (start and end in seconds, text on one line without markup) of each cue. A line that repeats the
    line before it, as in rolling captions, is skipped."""
    previous = ""
    for cue in _CUE.finditer(text.replace("\r\n", "\n").replace("\r", "\n")):
        *times, lines = cue.groups()
        spoken = [" ".join(_MARKUP.sub("", line).split()) for line in lines.splitlines()]
        words = " ".join(line for line in spoken if line and line != previous)
        previous = spoken[-1] if spoken else ""
        if words:
            yield _cue_seconds(*times[:4]), _cue_seconds(*times[4:]), words


def _cue_seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000
