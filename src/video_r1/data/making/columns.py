"""Which column of somebody's table is which field of a manifest, guessed by its name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from video_r1.errors import RequestError

# For each field the names that columns have, in small letters without anything between them; the first one
# that a table has counts.
NAMES: dict[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "questiontext", "query", "prompt", "instruction", "q"),
    "answer": (
        "answer", "solution", "correctanswer", "correctoption", "correctchoice", "correct", "answerid",
        "answeridx", "answerindex", "correctidx", "correctindex", "groundtruth", "gt", "label",
        "target", "ans", "truth", "answertext", "gold",
    ),
    "options": ("options", "choices", "candidates", "answerchoices", "mcoptions", "answeroptions"),
    "path": (
        "path", "videopath", "video", "videofile", "videoname", "videofilename", "clip", "clippath",
        "filepath", "file", "filename", "media", "mediapath", "videoid", "vid", "clipid", "clipname",
        "image", "imagepath", "imagefile", "imagename", "imageid", "img",
    ),
    "problem_id": ("problemid", "questionid", "qid", "quid", "uid", "id", "key"),
    "problem_type": ("problemtype",),
    "data_type": ("datatype", "modality", "mediatype"),
    "process": ("process", "rationale", "reasoning", "cot", "chainofthought", "explanation"),
    "data_source": ("datasource", "source", "dataset"),
    "start": ("start", "starttime", "startsec", "startseconds", "starts", "begin"),
    "end": ("end", "endtime", "endsec", "endseconds", "ends"),
    "subtitles": ("subtitles", "subtitle", "subtitlepath", "subs", "srt", "vtt", "transcript"),
}  # fmt: skip
_OPTION = re.compile(r"(?:a|ans|answer|option|opt|choice|candidate)?([0-9])|(?:option|opt|choice)?([a-j])")
NOTHING = "none"
"""In place of a column's name: the field has none."""
_JOINED = "+"


class Columns(NamedTuple):
    """The column of each field. Options may stand in several, one for each."""

    names: Mapping[str, str | tuple[str, ...]]
    given: frozenset[str]  # fields whose column was named, not guessed
    unused: tuple[str, ...]

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a row that has something in their columns. Of several columns it is the list of all
        up to the last that is not empty."""
        found = {}
        for field, name in self.names.items():
            if isinstance(name, str):
                value = row.get(name)
            else:
                value = [row.get(one) for one in name]
                while value and value[-1] in (None, ""):
                    value.pop()
            if value not in (None, "", []):
                found[field] = value
        return found

    def lines(self) -> list[tuple[str, str, str]]:
        """(field, its column, how that was known) of each field."""
        return [
            (
                field,
                name if isinstance(name, str) else _JOINED.join(name),
                "given" if field in self.given else "guessed",
            )
            for field, name in self.names.items()
        ]


def guess_columns(names: Iterable[str], given: Mapping[str, str]) -> Columns:
    """The columns of a table. given: field to column, columns joined by "+", or "none".

    Raises RequestError for fields and columns that there are not.
    """
    names = [str(name) for name in names]
    for field, column in given.items():
        if field not in NAMES:
            raise RequestError(f"columns: no field {field!r}; known are {', '.join(NAMES)}")
        missing = [one for one in column.split(_JOINED) if one not in names and column != NOTHING]
        if missing and column not in names:
            raise RequestError(f"columns: the table has no column {missing[0]!r}, only {', '.join(names)}")
    found: dict[str, str | tuple[str, ...]] = {}
    taken = {one for column in given.values() for one in (column, *column.split(_JOINED))}
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(names) if name not in taken}
    for field, known in NAMES.items():
        column = given.get(field)
        if column is None:
            guess = next((plain[name] for name in known if name in plain), None)
            if guess is None and field == "options":
                guess = option_columns(plain)
            if guess:
                found[field] = guess
        elif column != NOTHING:
            joined = column not in names and _JOINED in column
            found[field] = tuple(column.split(_JOINED)) if joined else column
    used = {one for column in found.values() for one in ((column,) if isinstance(column, str) else column)}
    return Columns(found, frozenset(given), tuple(name for name in names if name not in used))


def option_columns(plain: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of single options, in order: a0, a1, … or option_1, option_2, … or A, B, …; two at least.
    plain: column by its name in small letters without anything between them."""
    series: dict[str, dict[int, str]] = {}
    for name, column in plain.items():
        if match := _OPTION.fullmatch(name):
            digit, letter = match.groups()
            place = int(digit) if digit else ord(letter) - ord("a")
            series.setdefault(name[:-1] + ("#" if digit else "@"), {})[place] = column
    for found in series.values():
        first = min(found)
        if first <= 1 and len(found) >= 2 and sorted(found) == list(range(first, first + len(found))):
            return tuple(found[place] for place in sorted(found))
    return ()
