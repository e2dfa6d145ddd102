"""Raw rows of a manifest, numbered, before any check: from JSON, JSON lines, `datasets` or a list.

JSON files are parsed row by row with the standard library. An Arrow table, which is what `datasets`
makes of a JSON file, gives each column one type: it would refuse the whole file, or convert silently,
exactly where a row has to be reported (an id that is a number here and a string there, options that are
a string). What has its types already, on the hub or in memory, is read through `datasets`.
"""

from __future__ import annotations

import json
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from video_r1.data.remote import fetch, is_address, on_this_machine
from video_r1.errors import ManifestError, MediaError
from video_r1.hub import ask_the_hub, is_hub_id

if TYPE_CHECKING:
    import datasets

_READ_CHARACTERS = 1 << 20
_ROWS_PER_BATCH = 1000
_NOT_A_MANIFEST = "it must be a JSON list of rows, or have one JSON row on each line"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands where a row should be; `reason` says why there is none."""

    reason: str


@dataclass(frozen=True, slots=True)
class InTable:
    """Stands where a table has a file itself (an Image or Video of `datasets`), not its name.

    row: from 0; None where the cell holds several.
    """

    column: str
    kind: str  # "image", "video", "audio"
    row: int | None

    def __str__(self) -> str:
        return "a file in the table"


def read_rows(source: Any, split: str, *, stand_ins: bool = False) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a manifest: (row number from 1, whatever stands there or `Unreadable`).

    In JSON lines the row number is the line number. source, split: as for `records.load_manifest`. stand_ins:
    columns that hold files are `InTable`; else they are left out, as media are found through `path` alone.
    Raises ManifestError when the source cannot be opened at all.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        yield from enumerate(source, start=1)
        return
    if not isinstance(source, (str, Path)):
        yield from _dataset_rows(source, split, stand_ins)
        return
    source = on_this_machine(str(source))
    if is_address(source):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, posixpath.basename(source.partition("::")[0].partition("?")[0]) or "manifest")
            try:
                fetch(source, copy)
            except MediaError as error:
                raise ManifestError(str(error)) from error
            yield from read_rows(copy, split, stand_ins=stand_ins)
        return
    path = Path(source)
    if path.is_file():
        if path.suffix == ".parquet":
            yield from _dataset_rows(_load("parquet", split="train", data_files=str(path)), split, stand_ins)
        else:
            yield from _file_rows(path)
    elif path.suffix in (".json", ".jsonl", ".ndjson", ".parquet") or path.is_absolute():
        if not path.is_dir():
            lab = f"; video-r1 lab make {path.parent} makes it" if path.parent.name == "lab" else ""
            raise ManifestError(f"{path}: no such manifest file{lab}")
        yield from _dataset_rows(_load(str(path)), split, stand_ins)
    elif not path.exists() and "/" in source and not is_hub_id(source):
        raise ManifestError(f"{path}: no such manifest, and not the id of a data set on the hub")
    else:
        yield from _dataset_rows(_load(source), split, stand_ins)


def _load(name: str, **arguments: Any) -> Any:
    if not Path(name).exists() and "data_files" not in arguments:
        ask_the_hub()
    import datasets  # takes two seconds, and a JSON manifest does without it

    try:
        return datasets.load_dataset(name, **arguments)
    except Exception as error:  # the hub's client lets errors of several libraries through; all mean this
        what = arguments.get("data_files", name)
        raise ManifestError(
            f"{what}: neither a manifest file nor a data set that can be loaded "
            f"({type(error).__name__}: {error})"
        ) from error


def _dataset_rows(dataset: datasets.Dataset | Any, split: str, stand_ins: bool) -> Iterator[tuple[int, Any]]:
    import datasets

    if isinstance(dataset, dict):  # one data set per split
        if split not in dataset:
            raise ManifestError(f"the data set has no split {split!r}, only {', '.join(map(str, dataset))}")
        dataset = dataset[split]
    if not isinstance(dataset, datasets.Dataset):
        raise ManifestError(
            f"a manifest is a file, a data set id, a Dataset or a list of rows, not {type(dataset).__name__}"
        )
    media_columns = {
        name: (one, one is feature)
        for name, feature in dataset.features.items()
        if isinstance(
            one := getattr(feature, "feature", feature), (datasets.Image, datasets.Audio, datasets.Video)
        )  # one, or a list of them
    }
    dataset = dataset.remove_columns(list(media_columns)).with_format(None)
    kinds = {name: (type(one).__name__.lower(), alone) for name, (one, alone) in media_columns.items()}
    kinds = kinds if stand_ins else {}
    batches = cast("Iterator[dict[str, list]]", dataset.iter(_ROWS_PER_BATCH))
    rows = (
        dict(zip(batch, values, strict=True))
        for batch in batches
        for values in zip(*batch.values(), strict=True)
    )
    for number, row in enumerate(rows):
        held = {name: InTable(name, kind, number if alone else None) for name, (kind, alone) in kinds.items()}
        yield number + 1, row | held


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
