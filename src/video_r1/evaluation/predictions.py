"""Predictions as JSON lines that survive an interruption at any moment."""

import os
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from video_r1.errors import RequestError
from video_r1.files import json_lines, parts_of, replacing, whole_lines, without_links

NEEDED = {"problem_id", "order", "output", "prediction", "score", "strict_score", "format", "finish_reason"}


def read_predictions(path: Path, needed: Set[str] = NEEDED) -> list[dict[str, Any]]:
    """The records of a predictions file, if there is one; each has the fields `needed`. A last line that was
    cut off as it was written is removed, so that its question is asked again. Raises RequestError for any
    other line that is no record."""
    if not path.is_file():
        return []
    records = []
    with path.open("r+b") as file:
        for number, _, record in whole_lines(file):
            if record is None or not record.keys() >= needed:
                raise RequestError(f"{path}, line {number} is no prediction; delete it to have it made again")
            records.append(record)
    return records


def read_with_parts(path: Path, needed: Set[str] = NEEDED) -> list[dict[str, Any]]:
    """The records of a predictions file and of those parts of it that are not merged yet; see
    `read_predictions`."""
    return [record for file in (path, *parts_of(path)) for record in read_predictions(file, needed)]


def merge_parts(
    path: Path, records: Iterable[Mapping[str, Any]], place: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Makes `path` hold the records, which are its own and those of its parts, in the order of `place`, in
    one step; then the parts go. A file that is in this order already is left as it is."""
    records, parts = list(records), parts_of(path)
    ordered = sorted(records, key=place)
    if parts or ordered != records:
        with replacing(path) as file:
            file.write(json_lines(ordered).decode())
        for part in parts:
            part.unlink()


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line for each record and waits until the disk has them; writes nothing for no records."""
    if lines := json_lines(records):
        with open(path, "ab", opener=without_links) as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
