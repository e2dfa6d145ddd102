"""From what a table says to a row of a manifest: letters, types, times, the file, subtitles.

table ─► layout or columns ─► draft ─► manifest_row ─► records.py
                                          └► Refused: the reason, and how it is mended
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from video_r1.data.answers import LETTERS, parse_number, read_answer
from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.data.making.clip_index import ClipIndex
from video_r1.data.making.layouts import Draft, tags_in, without_tags
from video_r1.data.making.options import Reading, listed, options_of, read_choice, split_options
from video_r1.data.making.refusals import Refused
from video_r1.data.making.subtitles import SUBTITLE_ENDINGS, subtitle_lines
from video_r1.data.manifests.records import DATA_TYPES, FIELDS
from video_r1.data.manifests.tables import InTable
from video_r1.data.sources.media_paths import MediaPaths, data_type_of, path_below

SubtitleForm = Literal["off", "text", "timed"]
_TYPE_NAMES = {
    "multiple choice": "multiplechoice multichoice mcq mc choice choices",
    "numerical": "numerical numeric number num integer float",
    "OCR": "ocr",
    "free-form": "freeform openended open oe freetext text",
    "regression": "regression",
    "math": "math mathematical mathematics latex",
    "temporal grounding": "temporalgrounding momentretrieval",
    "spatial grounding": "spatialgrounding",
    "spatial-temporal grounding": "spatialtemporalgrounding spatiotemporalgrounding",
    "tracking": "tracking",
}
_TYPES = {name: problem_type for problem_type, names in _TYPE_NAMES.items() for name in names.split()}
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")
_LARGEST_SUBTITLES = 1 << 24
_TAGGED = re.compile(r"\s*<(think|answer)>(.*)</\1>\s*", re.DOTALL)


@dataclass(frozen=True)
class Making:
    """What all rows of a table have in common: the files, how numbers are read, the settings."""

    clips: ClipIndex
    places: MediaPaths
    problem_type: str | None = None  # of every question; None: as the row says, or by its options and answer
    subtitles: SubtitleForm = "off"


def question_and_options(draft: Draft) -> tuple[str, list[str]]:
    """The question and its options, "A. text", also where they stand in it. Raises Refused."""
    problem = str(draft.get("problem") or "").strip()
    if not problem:
        raise Refused("no question", "there is no question")
    given = listed(draft.get("options"))
    if given in (None, [], {}):
        problem, given = split_options(problem)
        if not given:
            return problem, []
    if not isinstance(given, (list, tuple, Mapping)):
        raise Refused("options", f"the options are {given!r}")
    texts = list(given.values() if isinstance(given, Mapping) else given)
    if any(text is None or not str(text).strip() for text in texts):
        raise Refused("options", f"one of the options is empty: {texts}")
    if not 2 <= len(texts) <= len(LETTERS):
        raise Refused("options", f"there are {len(texts)} options: {texts}")
    return problem, options_of(given)


def manifest_row(draft: Draft, making: Making, reading: Reading) -> dict[str, Any]:
    """The row of a manifest, but for its problem_id. Raises Refused."""
    problem, options = question_and_options(draft)
    answer = plain_text(draft.get("answer"))
    if (tagged := _TAGGED.fullmatch(answer)) and tagged[1] == "answer":
        answer = tagged[2].strip()
    if not answer:
        raise Refused("no answer", "there is no answer")
    problem_type = _problem_type(making.problem_type or draft.get("problem_type"), options, answer)
    if problem_type == "multiple choice":
        if not options:
            raise Refused("options", "a multiple choice question without options")
        letter = read_choice(answer, options, reading)
        if not letter:
            raise Refused("answer is no option", f"the answer {answer!r} names none, or two, of {options}")
        answer = letter
    elif problem_type in GROUNDING_FORMS:
        read = read_answer(f"<answer>{answer}</answer>", problem_type)
        if not read:
            form = GROUNDING_FORMS[problem_type]
            raise Refused("no place or time", f"the answer {answer[:80]!r} is not of the form {form}")
        answer = read
    media = _media(draft, making)
    if isinstance(media["path"], list):
        marks = [f"<{media['data_type']}>"] * len(media["path"])
        if tags_in("".join([problem, *options])) != marks:  # they do not say where each file goes
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
    """A value of a table as text; whole numbers without the ".0" that other rows of their column gave
    them."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _problem_type(said: Any, options: list[str], answer: str) -> str:
    """The type that is said, or else: with options multiple choice, numbers numerical, all else free-form.
    Which texts are read off the picture (OCR), and which numbers are measured (regression), no row shows."""
    if said:
        name = re.sub(r"[\W_]", "", str(said).lower())
        if name not in _TYPES:
            raise Refused("problem type", f"the type is {said!r}")
        return _TYPES[name]
    if options:
        return "multiple choice"
    return "free-form" if parse_number(answer) is None else "numerical"


def _media(draft: Draft, making: Making) -> dict[str, Any]:
    """`data_type` and `path`, of several files their list."""
    named = draft.get("path")
    if isinstance(named, (list, tuple)):
        found = [_media({**draft, "path": path}, making) for path in named or [None]]
        kinds = {one["data_type"] for one in found}
        if len(kinds) > 1:
            raise Refused("several media", f"it shows {', '.join(map(str, named))}")
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
        raise Refused("media inside the table", "the table holds the file itself, and no name of one")
    path = plain_text(named)
    if not path:
        raise Refused("no clip named", "there is no file's name")
    data_type = plain_text(draft.get("data_type")).lower().removesuffix("s") or None
    found = making.clips.find(path, data_type if data_type in DATA_TYPES else None)
    _check_place(found, making.places)
    return {"data_type": data_type if data_type in DATA_TYPES else data_type_of(found), "path": found}


def _check_place(path: str, places: MediaPaths) -> None:
    try:
        places.find(path)
    except ValueError as error:
        raise Refused("clip elsewhere", str(error)) from error


def _seconds(value: Any) -> float | None:
    text = plain_text(value)
    if not text:
        return None
    if (clock := _CLOCK.fullmatch(text)) is not None:
        return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
    number = parse_number(text)
    if number is None or number < 0:
        raise Refused("times", f"the time {text!r}")
    return number


def _subtitles(draft: Draft, making: Making, row: Mapping[str, Any]) -> str:
    """What is said in the row's window: of the file or text that its column has, or of the file beside the
    clip."""
    if making.subtitles == "off":
        return ""
    said = plain_text(draft.get("subtitles"))
    if said and not said.lower().endswith(SUBTITLE_ENDINGS):
        text = said
        if "-->" not in said:
            return said
    else:
        clip = row["path"]
        path = said or (making.clips.subtitles_of(clip) if isinstance(clip, str) else None)
        if path is None:
            return ""
        try:
            file = Path(making.places.find(path))
            if file.stat().st_size > _LARGEST_SUBTITLES:
                raise Refused("subtitles", f"{path} has {file.stat().st_size:,} bytes")
            text = file.read_text(encoding="utf-8-sig")
        except (ValueError, OSError) as error:
            raise Refused("subtitles", f"{path}: {error}") from error
    return subtitle_lines(text, making.subtitles == "timed", row.get("start"), row.get("end"))
