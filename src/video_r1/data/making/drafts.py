"""From a draft to a row of a manifest: letters, types, times, the file, subtitles.

table ─► layout or columns ─► draft ─► manifest_row ─► manifests/records.py
                                          └► Rejected: the reason and its remedy
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from video_r1.data.answers import (
    LETTERS,
    NARROW,
    is_doubtful_number,
    label_of,
    option_prefix,
    options_of,
    parse_number,
    parse_options,
    read_answer,
    split_options,
)
from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.data.making.clip_index import MEDIA_EXTENSIONS, SUBTITLE_EXTENSIONS, ClipIndex
from video_r1.data.making.layouts import (
    KIND,
    TAGS,
    Draft,
    Numbers,
    Rejected,
    files_of,
    plain_text,
    seconds_of,
    split_response,
    tags_in,
)
from video_r1.data.manifests.problem_types import BY_ROW, YES_NO, YES_OR_NO, renaming, type_of
from video_r1.data.manifests.records import DATA_TYPES, FIELDS
from video_r1.data.manifests.tables import InTable
from video_r1.data.sources.media_paths import MediaPaths, data_type_of, path_below
from video_r1.errors import RequestError

_LARGEST_SUBTITLES = 1 << 24
_THOUGHT = re.compile(r"\s*<think>.*</think>\s*", re.DOTALL)
_TEXT = {"data_type": "text"}
_LETTERS_ALONE = re.compile(r"\(?[A-Ja-j]\)?(?:(?:\s*[,;&/]\s*|\s+and\s+)\(?[A-Ja-j]\)?)*[.):]?")
_HEADING = re.compile(r"(?i)(?:^|(?<=[\s.?!？。]))(?:options|choices|candidates|选项)\s*[:：]?\s*\Z")
_WHOLE_NUMBER = re.compile(r"\s*(\d+)(?:\.0)?\s*")
_CLEARLY = 0.95  # a reading that understands less than this share of what the best one does is ruled out
# Both subtitle formats give each cue a line with its times; SubRip has a comma before the milliseconds,
# WebVTT may lack hours (https://www.w3.org/TR/webvtt1/).
_TIME = r"((?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3})"
_CUE = re.compile(rf"^[^\S\n]*{_TIME}\s*-->\s*{_TIME}.*\n((?:.*\S.*(?:\n|\Z))*)", re.MULTILINE)
_MARKUP = re.compile(r"<[^>\n]*>|\{\\[^}\n]*\}")


@dataclass(frozen=True)
class Making:
    """Shared parts of all rows of a table: files and settings. notes: rows by what was done to them."""

    clips: ClipIndex
    places: MediaPaths
    problem_type: str | None = None  # of every question; None: the row's, or by its options and answer
    subtitles: Literal["off", "text", "timed"] = "off"
    may_be_text: bool = False  # a row without a file asks about none
    notes: dict[str, list[int]] = field(default_factory=dict)


def question_and_options(draft: Draft) -> tuple[str, list[str]]:
    """Return the question and its options ("A. text"), which the question may contain. Raises Rejected."""
    problem = str(draft.get("problem") or "").strip()
    if not problem:
        raise Rejected("no question", "there is no question")
    bare, inside = split_options(problem, plain_text(split_response(draft.get("answer"))[1]))
    given = parse_options(draft.get("options"))
    names = [name for name in given if given[name] is not None] if isinstance(given, Mapping) else []
    texts = [given[name] for name in names] or given
    texts = [_option_text(text) for text in (texts if isinstance(texts, (list, tuple)) else [texts])]
    if not any(texts):
        names, texts = [], inside
    if not texts:
        return problem, []
    if not all(texts):
        raise Rejected("options", f"one of the options is empty: {texts}")
    if not 2 <= len(texts) <= len(LETTERS):
        raise Rejected("options", f"there are {len(texts)} options: {texts}")
    options = options_of(dict(zip(names, texts, strict=True)) if names else texts)
    return _HEADING.sub("", bare) if options_of(inside) == options else problem, options


def _option_text(option: Any) -> str:
    """Return the text of an option, also of one with fields, such as {"choice_id": 0, "choice": "red"}."""
    if isinstance(option, Mapping):
        texts = [option[name] for name in ("text", "choice", "option", "content", "answer") if name in option]
        if not texts:
            raise Rejected("options", f"an option is {option!r}")
        option = texts[0]
    return plain_text(option)


def manifest_row(number: int, draft: Draft, making: Making, numbers: Numbers) -> dict[str, Any]:
    """Return the row of a manifest, without its problem_id. number: in the table. Raises Rejected."""
    problem, options = question_and_options(draft)
    process, answer = split_response(draft.get("answer"))
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    given, notes = making.problem_type or draft.get("problem_type"), []
    problem_type = _problem_type(given, options, plain_text(answer))
    if not answer and answer != 0:
        raise Rejected("no answer", "there is no answer")
    several = isinstance(answer, list) and any(isinstance(one, (list, dict)) for one in answer[1:])
    if several or (isinstance(answer, (list, dict)) and problem_type not in GROUNDING_FORMS):
        raise Rejected("several answers", f"the answer is {answer!r:.80}")
    answer = json.dumps(answer) if isinstance(answer, (list, dict)) else plain_text(answer)
    if problem_type == YES_NO:
        problem_type = "multiple choice"
        options = options or options_of(YES_OR_NO.get(answer.lower(), YES_OR_NO["yes"]))
        notes.append(f"a question of the type {given} became multiple choice, such as {options}")
    elif given not in (None, "", problem_type) and type_of(str(given)) != BY_ROW:
        notes.append(renaming(given, problem_type))
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
    elif not given and _LETTERS_ALONE.fullmatch(answer.translate(NARROW)):
        raise Rejected("letter without options", f"the answer is {answer!r}, and no options were found")
    marks = tags_in("".join([problem, *options]))
    if (media := _media(draft, making, marks)) == _TEXT and not draft.get("data_type"):
        notes.append("a row without a file asks about its text alone")
    paths = media.get("path", [])
    count = len(paths) if isinstance(paths, list) else 1
    if marks and (len(marks) != count or (count > 1 and len(set(marks)) > 1)):
        raise Rejected("marks", f"its text has {' '.join(marks)}, and the files are {paths}")
    mark = rf"<{media['data_type']}>\1" if count > 1 else ""
    problem, *options = (TAGS.sub(mark, text).strip() for text in (problem, *options))
    row: dict[str, Any] = {
        "problem": problem,
        "problem_type": problem_type,
        "options": options,
        "solution": f"<answer>{answer}</answer>",
        **media,
        **{name: seconds for name in ("start", "end") if (seconds := _seconds(draft.get(name))) is not None},
    }
    if process := plain_text(draft.get("process")) or process:
        row["process"] = process if _THOUGHT.fullmatch(process) else f"<think>{process}</think>"
    if source := plain_text(draft.get("data_source")):
        row["data_source"] = source
    if spoken := _subtitles(draft, making, row):
        row["subtitles"] = spoken
    rest = {
        name: value
        for name, value in draft.items()
        if name not in (*FIELDS, "answer", KIND) and value is not None and not isinstance(value, InTable)
    }
    if rest.get("system"):
        notes.append("the system message is kept as `system` and not shown: prompts have their own")
    for note in notes:
        making.notes.setdefault(note, []).append(number)
    return {**row, **rest}


def _problem_type(given: Any, options: list[str], answer: str) -> str:
    """Return the given type, or guess it: multiple choice with options, numerical for numbers, else
    free-form. A row does not show whether a text is read off the picture (OCR) or a number measured
    (regression)."""
    named = type_of(str(given)) if given else BY_ROW
    if named is None:
        raise Rejected("problem type", f"the type is {given!r}")
    if options and named in (BY_ROW, "numerical"):  # also a count with options
        return "multiple choice"
    if named != BY_ROW:
        return named
    if is_doubtful_number(answer):
        raise Rejected("doubtful number", f"the answer {answer!r}: a comma stands only before three digits")
    return "free-form" if parse_number(answer) is None else "numerical"


def _media(draft: Draft, making: Making, marks: Sequence[str]) -> Mapping[str, Any]:
    """Return `data_type` and `path`, which is a list for several files."""
    named = files_of(draft.get("path"))
    data_type = plain_text(draft.get("data_type")).lower().removesuffix("s")
    held = [value for value in draft.values() if isinstance(value, InTable) and value.kind in DATA_TYPES]
    if not named and len(held) == 1:
        named = files_of(held[0])
    if not named and not held:
        if marks or not (data_type == "text" or making.may_be_text):
            raise Rejected("no clip named", f"its text has {marks[0]}" if marks else "there is no file name")
        return _TEXT
    known = data_type if data_type in DATA_TYPES else None
    kinds: dict[str, list[str]] = {}
    for file in named or held:
        if not isinstance(file, InTable):
            path = making.clips.find(file, known, draft.get(KIND))
            is_clear = path.lower().endswith(MEDIA_EXTENSIONS)
            kind = known or (not is_clear and draft.get(KIND))
        elif not named or not file.places or file.kind not in DATA_TYPES:
            raise Rejected("media inside the table", "the table contains the file itself, not its name")
        else:
            kind, path = file.kind, path_below(making.places.root, file.places[0])
        try:
            place = making.places.find(path)
        except ValueError as error:
            raise Rejected("clip elsewhere", str(error)) from error
        kinds.setdefault(kind or data_type_of(place), []).append(path)
    if len(kinds) > 1:
        raise Rejected("several media", f"it shows {', '.join(map(str, named))}")
    ((kind, paths),) = kinds.items()
    return {"data_type": kind, "path": paths if len(paths) > 1 else paths[0]}


def _seconds(value: Any) -> float | None:
    text = plain_text(value)
    if text and seconds_of(text) is None:
        raise Rejected("times", f"the time {text!r}")
    return seconds_of(text)


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
    letter = label_of(text).upper() or text.translate(NARROW).strip("(). :").upper()
    readings = {_folded(text), _folded(text[len(prefix) :])}
    meant = {letter} & texts.keys() | {name for name, words in texts.items() if words in readings}
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
            f"{len(whole):,} of the answers are numbers, which may be read as {' or '.join(left)} (the first "
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
        begin, end, lines = cue.groups()
        spoken = [" ".join(_MARKUP.sub("", line).split()) for line in lines.splitlines()]
        words = " ".join(line for line in spoken if line and line != previous)
        previous = spoken[-1] if spoken else ""
        if words:
            start, stop = (seconds_of(time.replace(",", ".")) or 0.0 for time in (begin, end))
            yield start, stop, words
