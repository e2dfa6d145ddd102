"""Files inside other files: members of tar archives (WebDataset's shards), cells of Parquet tables.

    tar://0001.mp4::shards/000.tar ─► {"0001.mp4": (offset, size), …} ─► Part
    parquet://video/17::data/train-0.parquet ─► column `video`, row 17 from 0 ─► its bytes

The notation of archives is fsspec's. Nothing is unpacked, and names inside an archive are never used as
paths. A cell holds bytes, as `datasets` writes images and videos, or a struct with `bytes`, or a list of
these: 17.2 is the third item in row 17. Parquet is read by row groups.
"""

import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from video_r1.data.sources.media_types import in_order

Members = dict[str, tuple[int, int]]
"""(first byte, bytes) of each name in an archive; (-1, 0) for anything but a plain file."""
TAR = "tar://"
TABLE = "parquet://"
_PACKED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_NO_FILE = (-1, 0)
_BLOCK = 512
_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_ABOUT_THE_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX_HEADERS)
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: size means nothing
_MOST_DIGITS = 24  # of a size
_LONGEST_HEADER = 1 << 20
_INDEX_BYTES, _ENTRY_BYTES = 4 << 30, 256  # limit of an index; memory of an entry without its name
_BATCH_BYTES = 64 << 20  # of cells read at once
_UNPACKED = 100  # most bytes of a column for each compressed byte
MOST_FRAMES = 5000  # of a folder in an archive


class Part(NamedTuple):
    """A media file: a range of bytes of a file. size: -1 for all to its end."""

    path: str
    offset: int
    size: int
    name: str = ""

    @property
    def url(self) -> str:
        """Return what FFmpeg opens."""
        end = self.offset + self.size
        return f"subfile,,start,{self.offset},end,{end},,:{self.path}" if self.offset else self.path

    def read(self, most: int = 1 << 30) -> bytes:
        """Return the first `most` bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(most if self.size < 0 else min(most, self.size))


def whole_file(path: str) -> Part:
    """Return a file as a Part. Raise ValueError, in words, if it is missing, empty or not a plain file."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    if stat.S_ISDIR(facts.st_mode):
        raise ValueError("is a folder, not a media file")
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("is not a regular file")
    if facts.st_size == 0:
        raise ValueError("the file is empty (0 bytes)")
    return Part(path, 0, facts.st_size)


def split_member(path: object) -> tuple[str, str] | None:
    """Split `tar://member::archive`, or the path of a table cell, at the `::`; None for other paths."""
    if not (isinstance(path, str) and path.startswith((TAR, TABLE)) and "::" in path):
        return None
    begin, _, archive = path.partition("::")
    return begin, archive


def members_of(file: BinaryIO) -> Members:
    """Index a tar archive by reading its headers. Raise ValueError, in words, for a damaged or hostile one.

    In linear time and without recursion: `tarfile.open` does not return for a negative size (CVE-2025-8194)
    or a long PAX header, and fails on thousands of chained long names.
    """
    head = file.read(6)
    packed = next((name for magic, name in _PACKED if head.startswith(magic)), None)
    if packed is not None:
        raise ValueError(f"the archive is compressed ({packed}); decompress it")
    end = file.seek(0, os.SEEK_END)
    members: Members = {}
    room, place = _INDEX_BYTES, 0
    everywhere: dict[str, str] = {}  # PAX fields for all members that follow
    for_next: dict[str, str] = {}
    while place < end or not end:
        file.seek(place)
        try:
            info = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if place:
                break  # what follows the members is no header, and not read
            raise ValueError(f"the archive is no tar, or cut short{' (it is empty)' * (not end)}") from None
        place += _BLOCK
        name, size, kind = info.name, info.size, info.type
        fields: dict[str, str] = {}
        if kind not in _ABOUT_THE_NEXT:
            fields, for_next = everywhere | for_next, {}
            name, digits = fields.get("path", name), fields.get("size", "0")
            if kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in fields):
                raise ValueError("the archive has sparse files; pack it without --sparse")
            is_number = digits.isascii() and digits.isdigit() and len(digits) < _MOST_DIGITS
            size = int(digits if is_number else -1) if "size" in fields else size
        if size < 0:
            raise ValueError(f"the archive is damaged: a size before byte {place:,} is negative or too long")
        if kind in _ABOUT_THE_NEXT and size > _LONGEST_HEADER:
            raise ValueError(f"the archive has a header of {size:,} bytes at byte {place:,}")
        has_content = kind not in _WITHOUT_CONTENT
        if has_content and place + size > end:
            raise ValueError(
                f"the archive is no tar, or cut short: of {size:,} bytes at {place:,} it has {end - place:,}"
            )
        if kind == tarfile.GNUTYPE_LONGNAME:
            for_next["path"] = _text(file.read(size))
        elif kind in _PAX_HEADERS:
            (everywhere if kind == tarfile.XGLTYPE else for_next).update(_pax_fields(file.read(size), place))
        elif kind not in _ABOUT_THE_NEXT:
            room -= len(name) + _ENTRY_BYTES
            if room < 0:
                raise ValueError(
                    f"the archive has too many files: {len(members):,} take {_INDEX_BYTES:,} bytes"
                )
            members[posixpath.normpath(name)] = (place, size) if info.isreg() else _NO_FILE
        place += -(-size // _BLOCK) * _BLOCK * has_content
    return members


def _pax_fields(content: bytes, place: int) -> dict[str, str]:
    """Parse records `LENGTH KEY=VALUE\\n` of a PAX header."""
    fields, begin = {}, 0
    while begin < len(content) and content[begin]:
        digits, space, _ = content[begin : begin + 24].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = content[begin + len(digits) + 1 : begin + length - 1].partition(b"=")
        if not equals or begin + length > len(content):
            raise ValueError(f"the archive is damaged: its PAX header at byte {place:,} cannot be read")
        fields[_text(key)] = _text(value)
        begin += length
    return fields


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def member_of(members: Members, member: str) -> tuple[int, int]:
    """Return (first byte, bytes) of a member. Raise ValueError in words."""
    place = members.get(posixpath.normpath(member))
    if place is None:
        raise ValueError(f"there is no such file in the archive, which has {len(members):,}")
    if place == _NO_FILE:
        raise ValueError("is a folder, a link or another thing in the archive, no plain file")
    if place[1] == 0:
        raise ValueError("the file is empty (0 bytes)")
    return place


def part_of(members: Members, member: str, archive: str) -> Part | list[Part]:
    """Return a member, or the frames of a folder in the archive, in order. Raise ValueError in words."""
    name = posixpath.normpath(member)
    if members.get(name, _NO_FILE) == _NO_FILE:
        begin = "" if name == "." else name + "/"
        inside = {frame[len(begin) :]: place for frame, place in members.items() if frame.startswith(begin)}
        frames = {frame: place for frame, place in inside.items() if not frame.startswith(".")}
        if len(frames) > MOST_FRAMES:
            raise ValueError(f"is a folder of {len(frames):,} files; at most {MOST_FRAMES:,} frames are read")
        for frame, place in frames.items():
            if place == _NO_FILE:
                raise ValueError(f"is a folder with {frame!r} in it, a link or a folder; keep frames alone")
        if frames:
            return [Part(archive, *frames[frame], frame) for frame in in_order(list(frames))]
    return Part(archive, *member_of(members, member), member)


def cell_path(column: str, row: int, table: str, item: int | None = None) -> str:
    return f"{TABLE}{column}/{row}{'' if item is None else f'.{item}'}::{table}"


def cell_of(begin: str) -> tuple[str, int, int | None]:
    """Return (column, row, list item) of `parquet://column/row.item`. Raise ValueError in words."""
    match = re.fullmatch(rf"(?:{TABLE})?(.+)/([0-9]+)(?:\.([0-9]+))?", begin, re.DOTALL)
    if not match:
        raise ValueError(f"{begin!r} names no cell: parquet://COLUMN/ROW::TABLE, rows from 0")
    return match[1], int(match[2]), int(match[3]) if match[3] else None


def cells_beside(
    file: BinaryIO, column: str, row: int
) -> Iterator[tuple[tuple[int, int | None], bytes | None]]:
    """Yield ((row, item), bytes) of all cells in the group of that row. Raise ValueError in words."""
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
                size = _unpacked_bytes(table.metadata.row_group(group), column)
                batch = max(1, min(16, _BATCH_BYTES * rows // max(size, 1)))
                cells = table.iter_batches(batch, [group], [column], use_threads=False)
                values = (cell for batch in cells for cell in batch.column(0))
                for number, cell in enumerate(values, start=first):
                    if isinstance(cell, pa.ListScalar):
                        files = enumerate(cell.values or ())
                        yield from (((number, item), _content(part)) for item, part in files)
                    else:
                        yield (number, None), _content(cell)
                return
            first += rows
    except pa.ArrowInvalid as error:  # a ValueError of its own
        raise ValueError(f"the table is no Parquet file, or damaged ({error})") from error
    raise ValueError(f"the table has {first:,} rows, and none of the number {row:,} (from 0)")


def _unpacked_bytes(group: Any, column: str) -> int:
    """Return the bytes of a column in a group of rows by the footer. Raise ValueError for a bomb: media are
    compressed already, so tables of them hardly shrink.
    """
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    if size > max(_UNPACKED * packed, _BATCH_BYTES):
        raise ValueError(f"the table unpacks {packed:,} bytes to {size:,}, which is too much for media")
    return size


def _content(cell: Any) -> bytes | None:
    value = cell["bytes"] if "bytes" in getattr(cell, "keys", tuple)() else cell
    content = value.as_py()
    return content if isinstance(content, bytes) else None
