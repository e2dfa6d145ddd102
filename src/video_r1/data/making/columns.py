"""Tables without a published layout: which column is which field, by its name and its values."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from video_r1.data.making.layouts import KIND, Row, files_of, plain_text, seconds_of
from video_r1.data.manifests.problem_types import type_of
from video_r1.data.manifests.tables import InTable
from video_r1.errors import RequestError

NOTHING = "none"
"""Written instead of a column's name for a field that has no column."""
_OPTION = re.compile(r"(?:a|ans|answer|option|opt|choice|candidate)?([0-9])|(?:option|opt|choice)?([a-j])")
_TRIED = 20  # values of a column
_FILE_LISTS = ("videos", "images")  # a row without any asks about no file

COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    field: tuple(names.split())
    for field, names in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")).items()
}
"""Names of each field's columns, in the order in which they are tried."""
CHAT_COLUMNS = COLUMN_NAMES | {"problem": (), "answer": ("solution", "answer", "groundtruth")}
"""Fields that columns beside a chat may hold."""
_FITS: dict[str, Callable[[str], object]] = {"problem_type": type_of}  # of others: times


class Columns(NamedTuple):
    """The columns of each field."""

    names: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]

    def values(self, row: Row) -> dict[str, Any]:
        """Return the fields of a row whose columns are not empty. Several columns give a list, without the
        empty cells at its end; a question's give its lines, an answer's the only filled one. Raises
        Rejected."""
        fields: dict[str, Any] = {}
        for field, names in self.names.items():
            cells = [row.get(name) for name in names]
            filled = [cell for cell in cells if not is_empty(cell)]
            while cells and is_empty(cells[-1]):
                cells.pop()
            if field == "path" and cells:
                fields[field] = [path for cell in cells for path in files_of(cell)]
                kinds = {_kind_of(name) for name in names if not is_empty(row.get(name))}
                fields |= {KIND: kinds.pop()} if len(kinds) == 1 else {}
            elif field == "problem":
                fields[field] = "\n".join(map(str, filled))
            elif cells:
                fields[field] = (
                    filled[0] if len(names) == 1 or (field, len(filled)) == ("answer", 1) else cells
                )
        return fields

    @property
    def lists_files(self) -> bool:
        return set(map(_plain, self.names.get("path", ("",)))) <= {*_FILE_LISTS}


def is_empty(cell: Any) -> bool:
    return cell is None or cell == [] or (isinstance(cell, str) and not cell.strip())


def questions_in(row: Row) -> list[Row]:
    """Return the questions that a row nests in lists, such as a clip's `qa_pairs`, each with the row's other
    fields except records; the row itself if it is a question."""
    nested = {
        name: value
        for name, value in row.items()
        if isinstance(value, list)
        and value
        and all(isinstance(question, Mapping) and _asks(question) for question in value)
    }
    if not nested or _asks(row):
        return [row]
    rest = {name: value for name, value in row.items() if not _is_large(value)}
    return [{**rest, **question} for value in nested.values() for question in value]


def _is_large(value: Any) -> bool:
    """Tell whether a value is not repeated for each question: records, such as all clips of a data set."""
    return isinstance(value, Mapping) or (
        isinstance(value, list) and any(isinstance(v, Mapping) for v in value)
    )


def _asks(row: Row) -> bool:
    return any(_plain(name) in COLUMN_NAMES["problem"] for name in row)


def guess_columns(
    names: Iterable[str],
    given: Mapping[str, str],
    rows: Sequence[Row] = (),
    known: Mapping[str, tuple[str, ...]] = COLUMN_NAMES,
    is_file: Callable[[Any], bool] = bool,
) -> Columns:
    """Find the columns of each field.

    given: maps a field to its column, to columns joined by "+", or to "none". rows: the table's; a column
    without values is not guessed. known: COLUMN_NAMES or CHAT_COLUMNS. is_file: whether a cell's files exist.

    Raises RequestError for unknown fields and columns.
    """
    names = [str(name) for name in names]
    chosen: dict[str, tuple[str, ...]] = {}
    for field, column in given.items():
        if field not in COLUMN_NAMES:
            raise RequestError(f"columns: no field {field!r}; known are {', '.join(COLUMN_NAMES)}")
        chosen[field] = () if column == NOTHING else (column,) if column in names else (*column.split("+"),)
        if missing := [column for column in chosen[field] if column not in names]:
            raise RequestError(f"columns: the table has no column {missing[0]!r}, only {', '.join(names)}")
    taken = {name for columns in chosen.values() for name in columns}
    cells = {name: [cell for row in rows if not is_empty(cell := row.get(name))] for name in names}
    free = [name for name in names if name not in taken and (cells[name] or not rows)]
    for field, wanted in known.items():
        fits = _FITS.get(field, lambda text: seconds_of(text) is not None)
        guess = [
            name
            for alias in wanted
            for name in free
            if _plain(name) == alias.rstrip("?")
            and (
                alias[-1] != "?"
                or sum(bool(fits(plain_text(cell))) for cell in cells[name]) * 2 > len(cells[name])
            )
        ]
        first = guess[:1]
        if field == "path":
            first = _path_columns(guess, free, cells, rows, is_file, known is CHAT_COLUMNS)
        elif field == "answer":
            for name in guess[1:]:
                first += [name] * _fills_gaps(name, first, rows)
        elif field == "problem" and first:  # an instruction and its input
            first += [name for name in free if _plain(name) == "input"]
        elif field == "options":
            first = first or [*option_columns({_plain(name): name for name in reversed(free)})]
        chosen.setdefault(field, (*first,))
    used = {name for columns in chosen.values() for name in columns}
    fields = {field: chosen[field] for field in COLUMN_NAMES if chosen.get(field)}
    return Columns(fields, tuple(name for name in names if name not in used and (cells[name] or not rows)))


def _path_columns(
    named: Sequence[str],
    free: Sequence[str],
    cells: Mapping[str, Sequence[Any]],
    rows: Sequence[Row],
    is_file: Callable[[Any], bool],
    is_chat: bool,
) -> list[str]:
    """Return the columns of files: the first of the known names whose values are files, and others that are
    filled where it is not, such as `image` beside `video`; in chats, and of lists, also of the other kind.
    Without known names: a column whose values are all files."""
    candidates = [name for name in named if any(map(is_file, cells[name][:_TRIED]))] or list(named)
    if not candidates and not any(isinstance(cell, InTable) for name in free for cell in cells[name][:1]):
        texts = {name: dict.fromkeys(c for c in cells[name][:_TRIED] if isinstance(c, str)) for name in free}
        candidates = [name for name, some in texts.items() if some and all(map(is_file, some))]
    chosen = candidates[:1]
    for name in candidates[1:] if named and rows else ():
        lists = is_chat or _plain(name) in _FILE_LISTS
        rivals = [column for column in chosen if not lists or _kind_of(column) == _kind_of(name)]
        if _fills_gaps(name, rivals, rows):
            chosen.append(name)
    return chosen


def _fills_gaps(column: str, others: Sequence[str], rows: Sequence[Row]) -> bool:
    """Tell whether none of the other columns is filled where this one is."""
    return not any(
        not is_empty(row.get(column)) and not is_empty(row.get(other)) for row in rows for other in others
    )


def _kind_of(column: str) -> str | None:
    """Return the kind of file that a column's name says."""
    match = re.match(r"(video|clip|vid)|image|img|pic|photo", column.lower())
    return match and ("video" if match[1] else "image")


def _plain(name: object) -> str:
    return re.sub(r"[\W_]", "", str(name).lower())


def option_columns(plain: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns of single options in order, at least two: a0, a1, … or option_1, option_2, … or A,
    B, …. plain: maps a name in lower case without punctuation to its column."""
    series: dict[str, dict[int, str]] = {}
    for name, column in plain.items():
        if match := _OPTION.fullmatch(name):
            digit, letter = match.groups()
            place = int(digit) if digit else ord(letter) - ord("a")
            series.setdefault(name[:-1] + ("#" if digit else "@"), {})[place] = column
    for columns in series.values():
        first = min(columns)
        if first <= 1 and len(columns) >= 2 and sorted(columns) == list(range(first, first + len(columns))):
            return tuple(columns[place] for place in sorted(columns))
    return ()
