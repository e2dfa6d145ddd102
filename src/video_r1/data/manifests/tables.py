"""Rows of Parquet tables, data sets and folders, without the files in them, which are read later.

    data/train-*.parquet ─► footers: how many rows ─► the light columns, by ranges ─► rows
                                                      columns that hold files ─► InTable: column, row, table

A table is a file of this machine or behind an address. Its footer is read, and the columns that hold no
files; each file is read later at its cell (table_cells.py, remote.py), one group of rows for one clip.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from video_r1.availability import ask_the_hub
from video_r1.console import Progress
from video_r1.data.sources.archives import TABLE, cell_path
from video_r1.data.sources.media_paths import data_type_of, is_pattern
from video_r1.data.sources.remote import Found, at_address, is_address
from video_r1.errors import ManifestError, MediaError, VideoR1Error
from video_r1.processes import process_index

if TYPE_CHECKING:
    import datasets

ENDING = ".parquet"
MEDIA_KINDS = ("image", "video")
_TABLES_AT_A_TIME = 8
_ROWS_PER_BATCH = 1000
_TAR = re.compile(r"\.(tar|tgz)(\.|$)")
_BYTES = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands where a row should be; `reason` says why there is none."""

    reason: str


@dataclass(frozen=True, slots=True)
class InTable:
    """Stands where a row has a file itself (an Image or Video of `datasets`, or bytes), not its name.

    places: the paths that it has, of its cell in a Parquet table: one, or those of all in its list. None in
    memory, and of lists of bytes alone, whose lengths only reading them would tell. `OwnPlace`, but for a
    link that leads out of a folder of files.
    """

    column: str
    kind: str  # "image", "video", "audio"
    places: tuple[str, ...] | None

    def __str__(self) -> str:
        return "a file in the table"


class OwnPlace(str):
    """The path of a file that came with the row, not out of the row's own text: it may be read wherever the
    manifest itself could be.
    """

    __slots__ = ()


class _Light(NamedTuple):
    """The columns of a table that hold no files, the kind of each other one and whether a cell is one file,
    and of lists of files the lengths."""

    columns: dict[str, list[Any]]
    rows: int
    held: dict[str, tuple[str, bool]]
    lengths: dict[str, list[int]]

    def places(self, name: str, row: int, table: str) -> tuple[str, ...] | None:
        """Those of `InTable`."""
        if self.held[name][1]:
            return (OwnPlace(cell_path(name, row, table)),)
        if name not in self.lengths:
            return None
        return tuple(OwnPlace(cell_path(name, row, table, item)) for item in range(self.lengths[name][row]))


def name_of(source: str) -> str:
    """The name of a source's file, of the first one where addresses are joined by `::`."""
    return posixpath.basename(source.partition("::")[0].partition("?")[0])


def tables_of(source: str) -> list[str]:
    """The tables that a path, an address or a pattern with `*` names, sorted. Raises ManifestError."""
    if not is_pattern(source):
        return [source]
    if not is_address(source):
        found = glob.glob(source, recursive=True)
    else:
        try:
            found = at_address(source, lambda system, path: system.glob(path))
        except MediaError as error:
            raise ManifestError(str(error)) from error
    if not found:
        raise ManifestError(f"{source}: no file fits that pattern")
    first, joined, chain = source.partition("::")
    begin = first.partition("://")[0] + "://" if is_address(source) else ""
    return sorted((name if is_address(name) else begin + name) + joined + chain for name in found)


def table_rows(tables: Sequence[str], features: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of tables, one after another; a column that holds files has `InTable` in each.

    features: what `datasets` says of the columns, where the tables themselves do not.

    Raises ManifestError when one of them cannot be read.
    """
    tables = [table if is_address(table) else os.path.realpath(table) for table in tables]
    quiet = process_index() != 0 or not any(map(is_address, tables))
    pool = ThreadPoolExecutor(_TABLES_AT_A_TIME, thread_name_prefix="tables")
    try:
        footers = list(pool.map(lambda table: _read(table, _footer), tables))
        jobs = zip(tables, footers, strict=True)
        parts = _ahead(pool, partial(_light_of, features or {}), jobs)
        total = sum(footer.num_rows for footer in footers)
        with Progress(total, "reading rows", "rows", quiet=quiet) as bar:
            for table, part in zip(tables, parts, strict=True):
                for row in range(part.rows):
                    light = {name: values[row] for name, values in part.columns.items()}
                    held = {
                        name: InTable(name, kind, part.places(name, row, table))
                        for name, (kind, _) in part.held.items()
                    }
                    yield {**light, **held}
                bar.update(part.rows)
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ThreadPoolExecutor, act: Callable[[Any], _Light], jobs: Iterable[Any]) -> Iterator[_Light]:
    """What `act` makes of each job, in order, with a few of them under way."""
    jobs = iter(jobs)
    waiting = deque(pool.submit(act, job) for job in islice(jobs, _TABLES_AT_A_TIME))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(act, job) for job in islice(jobs, 1))


def held_files(features: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Which columns hold files: their kind ("image", "video" or "audio"; by their name where only bytes are
    known), and whether a cell is one file and no list of them.
    """
    found = {}
    for name, feature in features.items():
        one = getattr(feature, "feature", feature)
        if isinstance(feature, list):
            one = feature[0]
        kind = type(one).__name__.lower()
        if kind not in (*MEDIA_KINDS, "audio"):
            inner = one.get("bytes") if isinstance(one, Mapping) else one
            if getattr(inner, "dtype", "") not in _BYTES:
                continue
            kind = data_type_of(f"{TABLE}{name}")
        found[name] = kind, one is feature
    return found


def placed(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the files in it; one that names no `path` gets the place of its own: of its only one, or
    of the one in a column that is called as its data_type. Raises ValueError in words where none is meant.
    """
    held = {name: value for name, value in row.items() if isinstance(value, InTable)}
    if not held:
        return row
    row = {name: value for name, value in row.items() if name not in held}
    media = {name: value for name, value in held.items() if value.kind in MEDIA_KINDS}
    if row.get("path") or not media:
        return row
    meant = media if len(media) == 1 else {n: v for n, v in media.items() if n == row.get("data_type")}
    if len(meant) != 1:
        raise ValueError(
            f"path is missing, and {len(media)} columns hold files ({', '.join(media)}): give path, or call "
            "the one that is meant image or video, as the row's data_type"
        )
    ((name, one),) = meant.items()
    if one.places is None:
        raise ValueError(
            f"path is missing, and the files in the column {name} cannot be read one by one: a cell holds "
            "several that have no names, or the table is in memory (then give the data set's name, its "
            "folder or its Parquet files instead; Dataset.to_parquet writes one)"
        )
    return {**row, "path": one.places[0] if len(one.places) == 1 else [*one.places]}


def _read(table: str, act: Callable[[BinaryIO], Found]) -> Found:
    """What `act` returns of the open table. Raises ManifestError."""
    import pyarrow as pa

    def inside(system: Any, path: str) -> Any:
        try:
            with system.open(path, "rb", cache_type="none") as file:  # not what lies beside it
                return act(file)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise MediaError(table, f"the table is no Parquet file, or damaged ({error})") from error

    try:
        return at_address(table if is_address(table) else f"file://{table}", inside)
    except MediaError as error:
        raise ManifestError(f"{table}: {error.reason}") from error


def _light_of(said: Mapping[str, Any], job: tuple[str, Any]) -> _Light:
    table, footer = job
    return _read(table, lambda file: _light(file, footer, said))


def _footer(file: BinaryIO) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(file)


def _light(file: BinaryIO, footer: Any, said: Mapping[str, Any]) -> _Light:
    import datasets
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, metadata=footer, pre_buffer=True)  # reads near columns as one range
    own: datasets.Features = datasets.Features.from_arrow_schema(table.schema_arrow)
    names = table.schema_arrow.names
    held = held_files({name: said.get(name, own[name]) for name in names})
    light = [name for name in names if name not in held]
    columns = table.read(light, use_threads=False).to_pydict() if light else {}
    columns = datasets.Features({name: own[name] for name in light}).decode_batch(columns)
    return _Light(columns, footer.num_rows, held, _lengths(table, held))


def _lengths(table: Any, held: Mapping[str, tuple[str, bool]]) -> dict[str, list[int]]:
    """Of each column of lists of files how many a cell has, by the names that stand beside their bytes."""
    names = [table.schema.column(number).path for number in range(len(table.schema))]
    found = {}
    for column in (column for column, (_, alone) in held.items() if not alone):
        beside = [name for name in names if name.startswith(f"{column}.") and name.endswith(".path")]
        if beside:
            lists = table.read(beside[:1], use_threads=False).column(column).to_pylist()
            found[column] = [len(files or ()) for files in lists]
    return found


def named_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
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
            yield from dataset_rows(datasets.load_dataset(name), split)
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


def dataset_rows(dataset: Any, split: str) -> Iterator[tuple[int, Any]]:
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
