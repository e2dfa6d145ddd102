"""Rows of tables that are no manifests yet: CSV, TSV, JSON by name, and all that a manifest may be."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from video_r1.data.manifests.records import read_rows
from video_r1.data.manifests.tables import Unreadable
from video_r1.errors import ManifestError

KEY = "key"
"""The field in which a row of a JSON object has the name that it stands behind."""
_DELIMITERS = ",;\t|"
_LONGEST_CELL = 1 << 27


def read_table(table: str, split: str) -> Iterator[tuple[int, Any]]:
    """Numbered rows: (row from 1, its fields by name or `Unreadable`). A CSV's header is no row; JSON lines
    count their lines. table: a file, an address or a data set id, as for a manifest; a column that holds the
    files themselves is `InTable`.

    Raises ManifestError when it cannot be opened at all.
    """
    path = Path(table)
    if path.suffix.lower() in (".csv", ".tsv", ".tab") and path.is_file():
        return _csv_rows(path)
    if path.suffix.lower() == ".json" and path.is_file() and (named := _named_rows(path)) is not None:
        return enumerate(named, start=1)
    return read_rows(table, split)


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Empty cells are absent. The delimiter is the one that the header has most of."""
    csv.field_size_limit(_LONGEST_CELL)
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            delimiter = "\t" if path.suffix.lower() != ".csv" else max(_DELIMITERS, key=header.count)
            stream.seek(0)
            cells = csv.reader(stream, delimiter=delimiter)
            names = [name.strip() for name in next(cells, [])]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ManifestError(
                    f"{path}: two columns are called {twice[0]!r}; each needs a name of its own"
                )
            for row in cells:
                if not any(row):
                    continue
                number += 1
                if len(row) > len(names):
                    yield (
                        number,
                        Unreadable(f"it has {len(row)} cells, and the header {len(names)}"),
                    )
                    continue
                yield number, {name: cell for name, cell in zip(names, row, strict=False) if cell.strip()}
    except UnicodeDecodeError as error:
        yield number + 1, Unreadable(f"the file is not UTF-8 text from here on ({error.reason})")
    except csv.Error as error:
        yield number + 1, Unreadable(f"the file cannot be read from here on ({error})")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error


def _named_rows(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON object: of rows by name, or of one list. None for other files."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            if not stream.read(1000).lstrip().startswith("{"):
                return None
            stream.seek(0)
            whole = json.load(stream)
    except (ValueError, OSError, RecursionError):  # JSON lines, or what the reader of manifests complains of
        return None
    lists = [value for value in whole.values() if isinstance(value, list)]
    if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) and not _is_row(whole):
        return lists[0]
    if whole and all(isinstance(value, dict) for value in whole.values()):
        return [{KEY: name, **row} for name, row in whole.items()]
    return None


def _is_row(whole: dict[str, Any]) -> bool:
    """Whether the only object of a file is a row itself, whose list has its messages, say."""
    return any(name in whole for name in ("messages", "conversations", "prompt"))
