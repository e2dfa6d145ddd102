"""Files that lie in the cells of a Parquet table, as `datasets` writes images and videos.

    parquet://video/17::data/train-0.parquet ─► column `video`, row 17 from 0 ─► its bytes

A cell holds bytes, or a struct with `bytes` in it. Parquet is read by groups of rows, so that whoever wants
one cell of a group is given all of them.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

SCHEME = "parquet://"


def cell_path(column: str, row: int, table: str) -> str:
    return f"{SCHEME}{column}/{row}::{table}"


def cell_of(begin: str) -> tuple[str, int]:
    """(column, row) of `parquet://column/row`. Raises ValueError in words."""
    column, _, row = begin.removeprefix(SCHEME).rpartition("/")
    if not column or not (row.isascii() and row.isdecimal()):
        raise ValueError(f"{begin!r} names no cell: parquet://COLUMN/ROW::TABLE, rows from 0")
    return column, int(row)


def cells_beside(file: BinaryIO, column: str, row: int) -> Iterator[tuple[int, bytes | None]]:
    """(row, bytes) of all cells that are read together with that one. Raises ValueError in words."""
    import pyarrow as pa  # a dependency of `datasets`, and slow to import
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise ValueError(
                f"the table has no column {column!r}, only {', '.join(table.schema_arrow.names)}"
            )
        first = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row < first + rows:
                cells = table.iter_batches(16, [group], [column], use_threads=False)
                values = (cell for batch in cells for cell in batch.column(0))
                yield from ((first + place, _content(cell)) for place, cell in enumerate(values))
                return
            first += rows
    except pa.ArrowInvalid as error:  # a ValueError of its own
        raise ValueError(f"the table is no Parquet file, or damaged ({error})") from error
    raise ValueError(f"the table has {first:,} rows, and none of the number {row:,} (from 0)")


def _content(cell: Any) -> bytes | None:
    value = cell["bytes"] if "bytes" in getattr(cell, "keys", tuple)() else cell
    found = value.as_py()
    return found if isinstance(found, bytes) else None
