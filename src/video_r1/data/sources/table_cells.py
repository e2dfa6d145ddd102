"""Files that lie in the cells of a Parquet table, as `datasets` writes images and videos.

    parquet://video/17::data/train-0.parquet ─► column `video`, row 17 from 0 ─► its bytes

A cell holds bytes, or a struct with `bytes` in it, or a list of these: 17.2 is the third one in row 17.
Parquet is read by groups of rows, so that whoever wants one cell of a group is given all of them.
"""

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

SCHEME = "parquet://"


def cell_path(column: str, row: int, table: str, item: int | None = None) -> str:
    return f"{SCHEME}{column}/{row}{'' if item is None else f'.{item}'}::{table}"


def cell_of(begin: str) -> tuple[str, int, int | None]:
    """(column, row, item of its list) of `parquet://column/row.item`. Raises ValueError in words."""
    found = re.fullmatch(rf"(?:{SCHEME})?(.+)/([0-9]+)(?:\.([0-9]+))?", begin, re.DOTALL)
    if not found:
        raise ValueError(f"{begin!r} names no cell: parquet://COLUMN/ROW::TABLE, rows from 0")
    return found[1], int(found[2]), int(found[3]) if found[3] else None


def cells_beside(
    file: BinaryIO, column: str, row: int
) -> Iterator[tuple[tuple[int, int | None], bytes | None]]:
    """((row, item), bytes) of all that are read together with that row's cell. Raises ValueError in words."""
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
                for number, cell in enumerate(values, start=first):
                    if isinstance(cell, pa.ListScalar):
                        files = enumerate(cell.values or ())
                        yield from (((number, item), _content(one)) for item, one in files)
                    else:
                        yield (number, None), _content(cell)
                return
            first += rows
    except pa.ArrowInvalid as error:  # a ValueError of its own
        raise ValueError(f"the table is no Parquet file, or damaged ({error})") from error
    raise ValueError(f"the table has {first:,} rows, and none of the number {row:,} (from 0)")


def _content(cell: Any) -> bytes | None:
    value = cell["bytes"] if "bytes" in getattr(cell, "keys", tuple)() else cell
    found = value.as_py()
    return found if isinstance(found, bytes) else None
