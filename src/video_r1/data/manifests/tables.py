"""Rows of Parquet tables, data sets and folders, without the files in them, which are read later.

    data/train-*.parquet ─► footers: how many rows ─► the light columns, by ranges ─► rows
                                                      columns that hold files ─► InTable: column, row, table

A table is a local file or a URL. Its footer and the columns without files are read at once; each file is
read later from its cell (sources/archives.py, sources/remote.py), one row group for one clip.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from video_r1.availability import ask_the_hub
from video_r1.console import Progress
from video_r1.data.sources.archives import TABLE, cell_path
from video_r1.data.sources.media_paths import data_type_of, is_pattern, is_saved
from video_r1.data.sources.remote import at_address, is_address
from video_r1.errors import ManifestError, MediaError, VideoR1Error
from video_r1.processes import process_index

if TYPE_CHECKING:
    import datasets

ENDING = ".parquet"
MEDIA_KINDS = ("image", "video")
_TABLES_AT_A_TIME = 8
# Of Parquet files. Rows are limited to so many times the file's bytes; fewer are always read.
_LARGEST_RATIO, _LEAST_LIMIT, _ROW_BYTES = 100, 1 << 28, 200
_BATCH_BYTES, _LEAST_ROWS, _MOST_ROWS = 1 << 29, 4, 64  # of a batch, in which each cell may be a whole column
_TAR = re.compile(r"\.(tar|tgz)(\.|$)")
_BYTES = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Placeholder for a row that cannot be read, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class InTable:
    """Placeholder for a file inside a row (an Image or Video of `datasets`, or bytes).

    places: paths of the file's cell in a Parquet table, or of each file in a list; `OwnPlace`, except for a
    link that leads out of a folder of files. None for tables in memory, and for lists of bytes without
    names, whose lengths are unknown until they are read.
    """

    column: str
    kind: str  # "image", "video", "audio"
    places: tuple[str, ...] | None

    def __str__(self) -> str:
        return "a file in the table"


class OwnPlace(str):
    """The path of a file inside a table: it may be read wherever the table may, unlike a path in a row."""

    __slots__ = ()


def name_of(source: str) -> str:
    """Return the file name of a path or URL; of a chain joined by `::`, that of the first part."""
    return posixpath.basename(source.partition("::")[0].partition("?")[0])


def tables_of(source: str) -> list[str]:
    """Return the tables of a path, a URL or a glob pattern, sorted. Raises ManifestError."""
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
    """Yield the rows of tables; columns that hold files contain `InTable`.

    features: column types by `datasets`, where the tables do not have them. Raises ManifestError if a table
    cannot be read.
    """
    tables = [table if is_address(table) else os.path.realpath(table) for table in tables]
    quiet = process_index() != 0 or not any(map(is_address, tables))
    pool = ThreadPoolExecutor(_TABLES_AT_A_TIME, thread_name_prefix="tables")
    submitted = (pool.submit(_rows_of, table, features or {}) for table in tables)
    waiting = deque(islice(submitted, _TABLES_AT_A_TIME))
    try:
        with Progress(len(tables), "reading tables", "tables", quiet=quiet) as bar:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(islice(submitted, 1))
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def held_files(features: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Return the columns that hold files: their kind ("image", "video" or "audio"; guessed from the column's
    name for plain bytes), and whether a cell is a single file rather than a list.
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
    """Return the row without its files. A row without `path` gets the place of its only file, or of the file
    in the column named like its data_type. Raises ValueError if that is ambiguous.
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
            f"path is missing, and {len(media)} columns hold files ({', '.join(media)}): give path, or "
            "rename the right column to image or video, like the row's data_type"
        )
    ((name, one),) = meant.items()
    if one.places is None:
        raise ValueError(
            f"path is missing, and the files in the column {name} cannot be read one by one: a cell holds "
            "several without names, or the table is in memory (then give the dataset's name, its folder or "
            "its Parquet files instead; Dataset.to_parquet writes one)"
        )
    return {**row, "path": one.places[0] if len(one.places) == 1 else [*one.places]}


def _rows_of(table: str, features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read a table's rows without its files. Raises ManifestError."""
    import pyarrow as pa

    def inside(system: Any, path: str) -> Any:
        try:
            with system.open(path, "rb", cache_type="none") as file:  # no read-ahead into other columns
                return _light_rows(file, table, features)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise MediaError(table, f"not a Parquet file, or damaged ({error})") from error

    try:
        return at_address(table if is_address(table) else f"file://{table}", inside)
    except MediaError as error:
        raise ManifestError(f"{table}: {error.reason}") from error


def _light_rows(file: BinaryIO, name: str, features: Mapping[str, Any]) -> list[dict[str, Any]]:
    import datasets
    import pyarrow.parquet as pq

    limit = max(_LEAST_LIMIT, _LARGEST_RATIO * file.seek(0, os.SEEK_END))
    table = pq.ParquetFile(file, pre_buffer=True)  # reads near columns as one range
    own: datasets.Features = datasets.Features.from_arrow_schema(table.schema_arrow)
    names = table.schema_arrow.names
    held = held_files({column: features.get(column, own[column]) for column in names})
    light = [column for column in names if column not in held]
    columns: dict[str, list[Any]] = {column: [] for column in light}
    for batch in _batches(table, light, limit, name):
        for column, values in batch.to_pydict().items():
            columns[column] += values
    columns = datasets.Features({column: own[column] for column in light}).decode_batch(columns)
    count = table.metadata.num_rows
    leaves = [table.schema.column(number).path for number in range(len(table.schema))]
    for column, (kind, alone) in held.items():
        items: Iterable[Sequence[int | None] | None] = repeat((None,) if alone else None, count)
        beside = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
        if beside and not alone:
            cells = (batch.column(column) for batch in _batches(table, beside[:1], limit, name))
            items = [range(len(files or ())) for some in cells for files in some.to_pylist()]
        columns[column] = [
            InTable(column, kind, each if each is None else tuple(
                OwnPlace(cell_path(column, row, name, item)) for item in each
            ))
            for row, each in enumerate(items)
        ]  # fmt: skip
    return [{column: values[row] for column, values in columns.items()} for row in range(count)]


def _batches(table: Any, columns: Sequence[str], limit: int, name: str) -> Iterator[Any]:
    """Yield the rows of columns, few at a time: some hundred bytes of a file may stand for gigabytes.

    Raises MediaError if they unpack to more than `limit` bytes, by the footer or as they come.
    """
    groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    tops = {column.partition(".")[0] for column in columns}
    sizes = [one.total_uncompressed_size for one in chunks if one.path_in_schema.partition(".")[0] in tops]
    rows = min(_MOST_ROWS, max(_LEAST_ROWS, _BATCH_BYTES // max(sizes, default=1)))
    too_large = MediaError(name, f"its rows unpack to over {limit / 1e9:.2g} GB; write them as JSON lines")
    if sum(sizes) > limit:
        raise too_large
    unpacked = 0
    for batch in table.iter_batches(rows, columns=columns, use_threads=False):
        unpacked += batch.nbytes + _ROW_BYTES * batch.num_rows
        if unpacked > limit:
            raise too_large
        yield batch


def named_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a folder that `datasets` reads or saved, or of a hub dataset, downloading no files:
    tables without the columns that hold files, only the metadata of an imagefolder or videofolder.
    """
    if not Path(name).exists():
        ask_the_hub()
    import datasets  # takes two seconds; JSON manifests do not need it

    try:
        if is_saved(name):
            yield from dataset_rows(datasets.load_from_disk(name), split)
            return
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
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ManifestError(
            f"{name}: neither a manifest file nor a loadable dataset ({type(error).__name__}: {error})"
        ) from error


def _folder_rows(dataset: Any, folder: str) -> Iterator[tuple[int, Any]]:
    """Yield the metadata rows of a streamed folder of files, each with the place of its file."""
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
        f"the dataset has no split {split!r}, only {', '.join(map(str, found))}; name the files of one, such "
        "as hf://datasets/OWNER/NAME/data/test-*.parquet, or its folder in what save_to_disk wrote"
    )


def dataset_rows(dataset: Any, split: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a Dataset or IterableDataset, or of one split of a DatasetDict."""
    import datasets

    if isinstance(dataset, dict):  # a DatasetDict
        if split not in dataset:
            raise ManifestError(_no_split(split, dataset))
        dataset = dataset[split]
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ManifestError(
            "a manifest is a file, a dataset id, a Dataset or IterableDataset, or a list of rows, not "
            f"{type(dataset).__name__}"
        )
    held = held_files(dataset.features or {})
    if held and isinstance(dataset, datasets.IterableDataset):
        raise ManifestError(
            f"a streamed dataset sends the files in its columns {', '.join(held)} with each row; give the "
            "dataset's name, its folder or its Parquet files instead, whose files are read when they are "
            "needed (or drop the columns: remove_columns)"
        )
    stand_ins = {name: InTable(name, kind, None) for name, (kind, _) in held.items()}
    for number, row in enumerate(dataset.remove_columns(list(held)).with_format(None), start=1):
        yield number, {**cast("dict[str, Any]", row), **stand_ins}
