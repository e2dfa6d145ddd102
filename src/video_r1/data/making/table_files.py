"""Tables that are not manifests: CSV, TSV, JSON objects that hold rows."""

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from video_r1.data.answers import parse_options
from video_r1.data.making.layouts import KEY
from video_r1.data.manifests.records import TABLE_EXTENSIONS, local_copy, not_utf8, read_rows
from video_r1.data.manifests.tables import Unreadable, name_of
from video_r1.data.sources.remote import is_address
from video_r1.errors import ManifestError

_DELIMITERS = ",;\t|"
_LONGEST_CELL = 1 << 27
_SHEETS = (".xlsx", ".xls", ".ods", ".numbers")


def read_table(table: str, split: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, its fields by name or `Unreadable`). A CSV's header does not count; JSON
    lines count lines. table: a file, a URL or a dataset id, as for a manifest; a column that holds the files
    themselves is `InTable`.

    Raises ManifestError if the table cannot be opened.
    """
    if is_address(table) and name_of(table).lower().endswith((".json", *TABLE_EXTENSIONS)):
        with local_copy(table) as copy:
            return iter(list(read_table(str(copy), split)))
    path = Path(table)
    if path.suffix.lower() in TABLE_EXTENSIONS and path.is_file():
        return _csv_rows(path)
    if path.suffix.lower() in _SHEETS:
        raise ManifestError(f"{table}: a spreadsheet; save it as CSV in UTF-8")
    if path.suffix.lower() == ".json" and path.is_file() and (rows := _json_object_rows(path)) is not None:
        return enumerate(rows, start=1)
    return read_rows(table, split)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield a CSV's rows without their empty cells. The delimiter is the most frequent in the header, or what
    Excel's line `sep=;` says. A cell with a list of objects is parsed."""
    csv.field_size_limit(_LONGEST_CELL)
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            has_hint = header.startswith("sep=")
            delimiter = (
                "\t" if path.suffix.lower() != ".csv" else max(_DELIMITERS, key=header[4 * has_hint :].count)
            )
            cells = csv.reader(
                stream if has_hint else chain([header], stream), delimiter=delimiter, strict=True
            )
            names = [name.strip() or f"column {place}" for place, name in enumerate(next(cells, []), start=1)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ManifestError(f"{path}: two columns are called {twice[0]!r}; rename one of them")
            for number, row in enumerate(filter(any, cells), start=1):
                if len(row) > len(names):
                    yield number, Unreadable(f"it has {len(row)} cells, and the header {len(names)}")
                else:
                    pairs = zip(names, row, strict=False)  # cells at the end may be missing
                    filled = {name: cell for name, cell in pairs if cell.strip()}
                    lists = {n: parse_options(c) for n, c in filled.items() if c.lstrip().startswith("[{")}
                    yield number, filled | lists
    except UnicodeDecodeError:
        yield number + 1, Unreadable(not_utf8(path))
    except csv.Error as error:
        remedy = "close the quotes in it, or double them"
        yield (
            number + 1,
            Unreadable(f"row {number + 1} cannot be read ({error}), and nothing after it; {remedy}"),
        )
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error


def _json_object_rows(path: Path) -> list[Any] | None:
    """Return the rows of a JSON object that maps names to rows or contains one list of rows; None for other
    files."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            if not stream.read(1000).lstrip().startswith("{"):
                return None
            stream.seek(0)
            whole = json.load(stream)
    except (ValueError, OSError, RecursionError):  # JSON lines, or damage that `read_rows` reports
        return None
    is_row = any(name in whole for name in ("messages", "conversations", "prompt"))  # its list: the messages
    lists = [value for value in whole.values() if isinstance(value, list)]
    if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) and not is_row:
        return lists[0]
    if whole and all(isinstance(value, dict) for value in whole.values()):
        return [{KEY: name, **row} for name, row in whole.items()]
    return None
