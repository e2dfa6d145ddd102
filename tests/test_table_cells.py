"""Images and videos in the cells of Parquet tables: the frames that their files have, groups read once, what
a row may name, and manifests made of such tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_tables import make
from media_files import SMALL, noise, sample, saved, write_video

from video_r1.cli import main
from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.frame_cache import cache_key
from video_r1.data.sources import remote
from video_r1.data.sources.archives import cells_beside
from video_r1.data.sources.media_paths import MediaPaths, data_type_of, path_below
from video_r1.errors import MediaError

ROWS, GROUP = 7, 3


pytestmark = pytest.mark.usefixtures("own_copies")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{n}.mp4", 20, first=n) for n in range(ROWS)]


def table(path: Path, clips: list[Path]) -> Path:
    """Cells as bytes and as structs; the last one of each is empty."""
    contents = [clip.read_bytes() for clip in clips[:-1]]
    structs = [{"bytes": content, "path": "x.mp4"} for content in contents]
    columns = {"name": [clip.stem for clip in clips], "raw": [*contents, None], "video": [*structs, None]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=GROUP)
    return path


def test_cells_have_the_frames_of_their_files(tmp_path: Path, clips: list[Path], monkeypatch: Any) -> None:
    found, read = table(tmp_path / "t.parquet", clips), []
    monkeypatch.setattr(remote, "cells_beside", lambda *at: read.append(at[1:]) or cells_beside(*at))
    budget = replace(SMALL, seconds=0, remote_cache=str(tmp_path / "cache"))
    for column in ("raw", "video"):
        for row in (1, 5, 0, 2, 3, 4, 1):
            media = read_media(sample(f"parquet://{column}/{row}::{found}"), budget)
            assert torch.equal(media.frames, read_media(sample(clips[row]), budget).frames)
    assert read == [("raw", 1), ("raw", 5), ("video", 1), ("video", 5)]  # one cell of each group of rows
    first = f"parquet://raw/0::{found}"
    key = cache_key(sample(first), budget, 8)
    table(found, [*clips[1:], clips[0]])  # another table in its place
    assert cache_key(sample(first), budget, 8) != key
    assert torch.equal(read_media(sample(first), budget).frames, read_media(sample(clips[1]), budget).frames)


def test_a_small_table_does_not_fill_the_cache(tmp_path: Path, clips: list[Path]) -> None:
    """A cell that is stored once and named 400 times; a cell of zeros that unpacks to 200 MB."""
    cells = {"raw": [noise(8).tobytes() * 5000] * 400}  # 960 kB: one entry of the dictionary
    pq.write_table(pa.table(cells), tmp_path / "many.parquet", compression="zstd")
    assert (tmp_path / "many.parquet").stat().st_size < 10_000
    budget = replace(SMALL, seconds=0, remote_cache=str(tmp_path / "cache"))
    with pytest.raises(MediaError):
        read_media(sample(f"parquet://raw/0::{tmp_path}/many.parquet"), budget)
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept < 12 << 20
    pq.write_table(pa.table({"raw": [bytes(200 << 20)]}), tmp_path / "bomb.parquet", compression="zstd")
    with pytest.raises(MediaError, match=r"the table unpacks [0-9,]+ bytes to 209,7"):
        read_media(sample(f"parquet://raw/0::{tmp_path}/bomb.parquet"), budget)


BAD = [
    ("raw/6::t.parquet", "there are no bytes in that cell"),
    ("video/6::t.parquet", "there are no bytes in that cell"),
    ("name/0::t.parquet", "there are no bytes in that cell"),
    ("raw/7::t.parquet", "the table has 7 rows, and none of the number 7 (from 0)"),
    ("no/0::t.parquet", "the table has no column 'no', only name, raw, video"),
    ("raw::t.parquet", "'parquet://raw' names no cell: parquet://COLUMN/ROW::TABLE, rows from 0"),
    ("raw/-1::t.parquet", "names no cell"),
    ("raw/0::text.parquet", "the table is no Parquet file, or damaged"),
    ("raw/0::no.parquet", "there is no such file"),
]


@pytest.mark.parametrize(
    ("path", "reason", "remotely"), [(*case, False) for case in BAD] + [(*case, True) for case in BAD[-2:]]
)
def test_what_cannot_be_read(
    tmp_path: Path, clips: list[Path], path: str, reason: str, remotely: bool, memory: Any
) -> None:
    cell, _, name = path.partition("::")
    table(tmp_path / "t.parquet", clips)
    (tmp_path / "text.parquet").write_text("text" * 100)
    for file in tmp_path.glob("*.parquet"):
        memory.pipe(f"/b/{file.name}", file.read_bytes())
    whole = f"parquet://{cell}::{'memory://b' if remotely else tmp_path}/{name}"
    with pytest.raises(MediaError, match=re.escape(reason)) as error:
        read_media(sample(whole), replace(SMALL, seconds=0, remote_cache=str(tmp_path / "cache")))
    assert error.value.path == whole


def test_a_column_says_what_its_cells_are() -> None:
    kinds = [
        data_type_of(f"parquet://{column}/3::images/t.parquet") for column in ("image", "Picture", "video")
    ]
    assert kinds == ["image", "image", "video"]


def test_the_table_stays_in_the_media_root(tmp_path: Path, clips: list[Path]) -> None:
    found = table(tmp_path / "root" / "data" / "t.parquet", clips)
    places = MediaPaths(str(tmp_path / "root"))
    whole = places.find("parquet://video/1::data/t.parquet")
    assert whole == f"parquet://video/1::{found}"
    assert path_below(places.root, whole) == "parquet://video/1::data/t.parquet"
    for name in ("../t.parquet", "/etc/t.parquet", "file:///etc/t.parquet"):
        with pytest.raises(ValueError, match=r"leads out of the media root|is absolute"):
            places.find(f"parquet://video/1::{name}")


def test_a_manifest_of_a_table_with_the_files_themselves(tmp_path: Path) -> None:
    pictures = [
        {"bytes": saved(noise(60 + n), tmp_path / f"{n}.png").read_bytes(), "path": "x"} for n in range(4)
    ]
    made = datasets.Dataset.from_dict({
        "question": ["q"] * 4, "answer": ["yes"] * 4,
        "image": [*pictures[:3], {"bytes": b"text", "path": "x"}],
    }).cast_column("image", datasets.Image())  # fmt: skip
    root = tmp_path / "root"
    (root / "data").mkdir(parents=True)
    made.to_parquet(root / "data" / "t.parquet")
    rows, (line,) = make(root, root / "data" / "t.parquet")
    assert [(row["path"], row["data_type"]) for row in rows] == [
        (f"parquet://image/{n}::data/t.parquet", "image") for n in range(3)
    ]
    assert line["row"] == 4 and "is not an image" in line["found"]
    assert main(["data", "check", str(root / "data" / "out.json"), "--media_root", str(root)]) == 0
