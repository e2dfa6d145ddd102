"""Raw rows of a manifest, numbered, before any check: from JSON, JSON lines, Parquet, `datasets` or a list.

JSON files are parsed row by row with the standard library. An Arrow table, which is what `datasets`
makes of a JSON file, gives each column one type: it would refuse the whole file, or convert silently,
exactly where a row has to be reported (an id that is a number here and a string there, options that are
a string). What has its types already, on the hub or in memory, is read through `datasets`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from video_r1.data.manifests.parquet_rows import (
    ENDING,
    InTable,
    OwnPlace,
    held_files,
    name_of,
    placed,
    table_rows,
    tables_of,
)
from video_r1.data.sources.addresses import fetch, is_address, on_this_machine
from video_r1.data.sources.endings import MANIFEST_ENDINGS
from video_r1.data.sources.places import is_pattern, path_below
from video_r1.errors import ManifestError, MediaError, VideoR1Error
from video_r1.hub import ask_the_hub, is_hub_id

_READ_CHARACTERS = 1 << 20
_ROWS_PER_BATCH = 1000
_TAR = re.compile(r"\.(tar|tgz)(\.|$)")
_NOT_A_MANIFEST = "it must be a JSON list of rows, or have one JSON row on each line"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands where a row should be; `reason` says why there is none."""

    reason: str


def placed_rows(source: Any, split: str, media_root: str | None = None) -> Iterator[tuple[int, Any]]:
    """As `read_rows`, each row that has a file of its own with the place of it as `path`: an `OwnPlace`, or
    with a media root the text that a manifest with that root says.
    """
    for number, row in read_rows(source, split):
        try:
            row = placed(row) if isinstance(row, dict) else row
        except ValueError as error:
            row = Unreadable(str(error))
        if media_root is not None and isinstance(row, dict):
            path = row.get("path")
            if isinstance(path, OwnPlace):
                row = {**row, "path": path_below(media_root, path)}
            elif isinstance(path, list) and path and isinstance(path[0], OwnPlace):
                row = {**row, "path": [path_below(media_root, one) for one in path]}
        yield number, row


def read_rows(source: Any, split: str) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a manifest: (row number from 1, whatever stands there or `Unreadable`).

    In JSON lines the row number is the line number. Where a row has a file itself stands `InTable`; `placed`
    (parquet_rows.py) makes its path of it. source, split: as for `records.load_manifest`.
    Raises ManifestError when the source cannot be opened at all.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        yield from enumerate(source, start=1)
    elif not isinstance(source, (str, Path)):
        yield from _dataset_rows(source, split)
    elif (name := on_this_machine(str(source))) and is_address(name):
        yield from _rows_at(name, split)
    else:
        yield from _local_rows(name, split)


def _rows_at(address: str, split: str) -> Iterator[tuple[int, Any]]:
    name = name_of(address)
    if name.endswith(ENDING):
        yield from enumerate(table_rows(tables_of(address)), start=1)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, name or "manifest")
        try:
            fetch(address, copy)
        except MediaError as error:
            raise ManifestError(str(error)) from error
        yield from _local_rows(str(copy), split)


def _local_rows(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """Of a file, a pattern of tables, a folder, or an id of the hub."""
    path = Path(source)
    if path.suffix == ENDING and not path.is_dir() and (path.is_file() or is_pattern(source)):
        yield from enumerate(table_rows(tables_of(source)), start=1)
    elif path.is_file():
        yield from _file_rows(path)
    elif path.is_dir():
        yield from _named_rows(str(path), split)
    elif path.suffix in MANIFEST_ENDINGS or path.is_absolute():
        lab = f"; video-r1 lab make {path.parent} makes it" if path.parent.name == "lab" else ""
        raise ManifestError(f"{path}: no such manifest file{lab}")
    elif "/" in source and not is_hub_id(source):
        raise ManifestError(f"{path}: no such manifest, and not the id of a data set on the hub")
    else:
        yield from _named_rows(source, split)


def _named_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
    """Of a folder that `datasets` reads, or a data set of the hub. Files stay where they are: tables are read
    without the columns that hold some, and of a folder of files (imagefolder, videofolder) only metadata.
    """
    if not Path(name).exists():
        ask_the_hub()
    import datasets  # takes two seconds, and a JSON manifest does without it

    try:
        builder = datasets.load_dataset_builder(name)  # from the card and the names of the files
        found = builder.config.data_files or {}
        if found and split not in found:  # before anything is downloaded
            raise ManifestError(_no_split(split, found))
        files = found.get(split, ())
        if files and all(file.endswith(ENDING) for file in files):
            yield from enumerate(table_rows(files, builder.info.features), start=1)
        elif archives := [file for file in files if _TAR.search(file)]:
            raise ManifestError(
                f"{name}: made of tar archives, which have no table of questions; write JSON rows with the "
                f"path tar://MEMBER::ARCHIVE, such as tar://0001.mp4::{archives[0]}"
            )
        elif files and hasattr(builder, "BASE_FEATURE"):
            yield from _folder_rows(datasets.load_dataset(name, split=split, streaming=True), name)
        else:
            yield from _dataset_rows(datasets.load_dataset(name), split)
    except VideoR1Error:
        raise
    except Exception as error:  # the hub's client lets errors of several libraries through; all mean this
        raise ManifestError(
            f"{name}: neither a manifest file nor a data set that can be loaded "
            f"({type(error).__name__}: {error})"
        ) from error


def _folder_rows(dataset: Any, folder: str) -> Iterator[tuple[int, Any]]:
    """The metadata of a streamed folder of files, each row with the place of its file."""
    inside = os.path.join(os.path.realpath(folder), "")

    def place(path: str) -> str:
        real = path if is_address(path) else os.path.realpath(path)
        return OwnPlace(real) if is_address(path) or real.startswith(inside) else real

    held = held_files(dataset.features)
    for name, (_, alone) in held.items():
        feature = type(dataset.features[name])(decode=False) if alone else None
        dataset = dataset.cast_column(name, feature) if alone else dataset.remove_columns(name)
    for number, row in enumerate(dataset, start=1):
        found = {
            name: InTable(name, kind, (place(row[name]["path"]),) if alone else None)
            for name, (kind, alone) in held.items()
        }
        yield number, {**row, **found}


def _no_split(split: str, found: Iterable[object]) -> str:
    return (
        f"the data set has no split {split!r}, only {', '.join(map(str, found))}; of Parquet files, a "
        "pattern names those of one, such as hf://datasets/OWNER/NAME/data/test-*.parquet"
    )


def _dataset_rows(dataset: Any, split: str) -> Iterator[tuple[int, Any]]:
    """Of a Dataset or IterableDataset, or of one of several by split."""
    import datasets

    if isinstance(dataset, dict):  # one data set per split
        if split not in dataset:
            raise ManifestError(_no_split(split, dataset))
        dataset = dataset[split]
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ManifestError(
            "a manifest is a file, a data set id, a Dataset or IterableDataset, or a list of rows, not "
            f"{type(dataset).__name__}"
        )
    held = held_files(dataset.features or {})
    if held and isinstance(dataset, datasets.IterableDataset):
        raise ManifestError(
            f"a streamed data set brings the files in its columns {', '.join(held)} with each row; give the "
            "data set's name, its folder or its Parquet files instead: rows are then read without them, and "
            "each file when it is needed (or leave the columns out: remove_columns)"
        )
    stand_ins = {name: InTable(name, kind, None) for name, (kind, _) in held.items()}
    batches = dataset.remove_columns(list(held)).with_format(None).iter(_ROWS_PER_BATCH)
    rows = (
        dict(zip(batch, values, strict=True))
        for batch in cast("Iterator[dict[str, list]]", batches)
        for values in zip(*batch.values(), strict=True)
    )
    for number, row in enumerate(rows, start=1):
        yield number, {**row, **stand_ins}


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as stream:
            start = stream.read(_READ_CHARACTERS)
            while start and start.isspace():
                start = stream.read(_READ_CHARACTERS)
            stream.seek(0)
            rows = _list_rows(stream) if start.lstrip().startswith("[") else _line_rows(stream)
            for number, row in rows:
                yield number, row
    except UnicodeDecodeError as error:
        yield number + 1, Unreadable(f"the file is not UTF-8 text from here on ({error.reason})")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error


def _line_rows(stream: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.strip()
        if not line:
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line == "{":
                yield number, Unreadable(f"the file is one JSON object spread over lines; {_NOT_A_MANIFEST}")
                return
            yield number, Unreadable(f"line {number} is not JSON: {error}")


def _list_rows(stream: TextIO) -> Iterator[tuple[int, Any]]:
    """Rows of one JSON list, parsed as the text comes in: a long list is never in memory as a whole."""
    decoder = json.JSONDecoder()
    text = stream.read(_READ_CHARACTERS)
    place = text.index("[") + 1
    lines = 1  # line number of text[0]
    number, after_row = 0, False
    size, complete = _READ_CHARACTERS, False
    while True:
        while place < len(text) and (text[place].isspace() or (after_row and text[place] == ",")):
            after_row = after_row and text[place] != ","
            place += 1
        failure: Exception | None = None
        if place < len(text):
            if text[place] == "]" and (after_row or number == 0):
                if (text[place + 1 :] + stream.read(_READ_CHARACTERS)).strip():
                    yield number + 1, Unreadable("there is text after the end of the list")
                return
            if after_row:
                failure = ValueError("a comma is missing")
                complete = True
            else:
                try:
                    row, end = decoder.raw_decode(text, place)
                    if end < len(text) or complete:  # a number at the very end may go on in the next piece
                        number, after_row, place = number + 1, True, end
                        size = _READ_CHARACTERS
                        yield number, row
                        continue
                except (ValueError, RecursionError) as error:
                    failure = error
        if complete:
            line = lines + text.count("\n", 0, getattr(failure, "pos", place))
            reason = getattr(failure, "msg", str(failure)) if failure else "the list is not closed"
            yield (
                number + 1,
                Unreadable(f"the JSON is broken near line {line}: {reason}; nothing after it was read"),
            )
            return
        more = stream.read(size)
        size *= 2  # a long row is parsed again with each piece: pieces that grow keep the sum of work linear
        complete = not more
        lines += text.count("\n", 0, place)
        text, place = text[place:] + more, 0
