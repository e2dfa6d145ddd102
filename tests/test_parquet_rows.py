"""Manifests whose media lie in their own tables: what is read of them, and which file a row gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_hub import COMMIT, ID, made_hub
from media_files import SMALL, sample, write_video

from video_r1.cli import main
from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests import tables as manifest_tables
from video_r1.data.manifests.records import Sample, check_manifest, load_manifest
from video_r1.data.manifests.tables import table_rows
from video_r1.data.sources.media_paths import media_root_of
from video_r1.errors import ManifestError
from video_r1.lab.smoke import first_rows

pytestmark = pytest.mark.usefixtures("own_copies")
SHARDS, ROWS, GROUP = 3, 4, 2
FILLER = 300_000  # bytes behind each clip, as long as which clips of a real table are


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{n}.mp4", 8, first=n) for n in range(SHARDS * ROWS)]


def question(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "problem_id": number, "problem": f"What is in {number}?", "data_type": "video",
        "problem_type": "free-form", "solution": "<answer>x</answer>", **fields,
    }  # fmt: skip


def write_shards(folder: Path, clips: list[Path]) -> Path:
    """A data set of several Parquet files, each of several groups of rows, as `push_to_hub` lays it out."""
    (folder / "data").mkdir(parents=True)
    for shard in range(SHARDS):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        filler = os.urandom(FILLER)
        cells = [{"bytes": clips[n].read_bytes() + filler, "path": f"{n}.mp4"} for n in numbers]
        rows = [question(n, video=cell, data_source="made") for n, cell in zip(numbers, cells, strict=True)]
        made = datasets.Dataset.from_list(rows).cast_column("video", datasets.Video(decode=False))
        made.to_parquet(folder / "data" / f"train-{shard:05}-of-{SHARDS:05}.parquet", batch_size=GROUP)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, clips: list[Path]) -> Path:
    return write_shards(tmp_path_factory.mktemp("shelf") / "set", clips)


def frames_of(one: Sample, folder: Path) -> torch.Tensor:
    return read_media(one, replace(SMALL, seconds=0, remote_cache=str(folder))).frames


def test_a_folder_of_tables_is_a_manifest(
    shelf: Path, clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = load_manifest(shelf)
    assert [one.problem_id for one in samples] == list(range(SHARDS * ROWS))
    assert samples[0].data_source == "made" and "video" not in samples[0].extra
    assert type(samples[5].path) is str
    assert samples[5].path == f"parquet://video/1::{shelf}/data/train-00001-of-00003.parquet"
    for number in (5, 6, 11):
        expected = read_media(sample(clips[number]), replace(SMALL, seconds=0)).frames
        assert torch.equal(frames_of(samples[number], tmp_path), expected)
    assert load_manifest(shelf) == samples and media_root_of(shelf, None) == str(shelf)
    first = load_manifest(first_rows(str(shelf), str(shelf), tmp_path / "first.json"), shelf)
    assert first and first == samples[: len(first)]
    pattern = str(shelf / "data" / "train-0000[02]-*.parquet")
    assert [one.problem_id for one in load_manifest(pattern)] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert main(["data", "check", str(shelf)]) == 0
    with pytest.raises(ManifestError, match="no file fits that pattern"):
        load_manifest(str(shelf / "data" / "test-*.parquet"))
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", None)  # nothing is read to find that out
        with pytest.raises(ManifestError, match="no split 'test', only train; name the files of one"):
            load_manifest(shelf, split="test")


CODE = """
import json, sys
from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import load_manifest
from video_r1.settings.frames import FrameBudget

for manifest in sys.argv[1].split():
    samples = load_manifest(manifest)
    print(json.dumps([one.path for one in samples]), flush=True)
    input()
media = read_media(samples[4], FrameBudget(remote_cache=sys.argv[2]))
print(json.dumps([media.frames.shape[0]]), flush=True)
"""


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_read_where_it_lies(shelf: Path, clips: list[Path], tmp_path: Path) -> None:
    """Through the hub's own client and `datasets`: rows without media, one group of rows for one clip."""
    with made_hub(shelf) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        pattern = f"hf://datasets/{ID}/data/train-*-of-00003.parquet"
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, f"{ID} {pattern}", str(tmp_path / "cache")],
            env={**environment, "HF_HUB_OFFLINE": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        whole = sum(file.stat().st_size for file in shelf.rglob("*.parquet"))
        for revision in (f"@{COMMIT}", ""):  # a name means its newest commit, a pattern what it says
            names = [f"data/train-{shard:05}-of-00003.parquet" for shard in range(SHARDS)]
            assert json.loads(process.stdout.readline()) == [
                f"parquet://video/{row}::hf://datasets/{ID}{revision}/{name}"
                for name in names
                for row in range(ROWS)
            ]
            assert set(hub.sent) == set(names) and sum(hub.sent.values()) < whole / 10
            hub.sent.clear()
            process.stdin.write("\n")
            process.stdin.flush()
        assert json.loads(process.stdout.readline()) == [4]
        _, said = process.communicate(timeout=60)
        assert set(hub.sent) == {"data/train-00001-of-00003.parquet"}
        group = whole / SHARDS * GROUP / ROWS
        assert hub.sent.total() < 1.3 * group
        assert "reading tables: 3/3" in said


def one_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))
    rows = [question(n) for n in range(count)]
    plain = {name: [row[name] for row in rows] for name in rows[0] if name not in columns}
    pq.write_table(pa.table({**plain, **columns}), path, row_group_size=GROUP)
    return path


CELL = {"bytes": b"mp4", "path": "a.mp4"}
TWO = "path is missing, and 2 columns hold files"


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"clip": [b"mp4"]}, "clip"),
        ({"clip": [CELL]}, "clip"),
        ({"video": [CELL], "image": [CELL]}, "video"),
        ({"video": [CELL], "image": [CELL], "data_type": ["image"]}, "image"),
        ({"video": [CELL], "key": [b"hash"]}, "video"),
        ({"clip": [CELL], "path": ["7.mp4"]}, "its path"),
        ({"clip": [CELL], "path": [None]}, "clip"),
        ({"a": [CELL], "b": [CELL]}, f"{TWO} (a, b): give path, or rename"),
        (
            {"video": [[b"mp4"]]},
            "path is missing, and the files in the column video cannot be read one by one",
        ),
        ({"times": [[1.0, 2.0]]}, "path is missing"),
    ],
)
def test_which_file_a_row_gets(columns: dict[str, list[Any]], column: str, tmp_path: Path) -> None:
    table = one_table(tmp_path / "t.parquet", columns)
    samples, _, problems = check_manifest(table)
    if " " in column and column != "its path":
        assert samples == [] and column in str(problems[0])
    else:
        own = tmp_path / "7.mp4" if column == "its path" else f"parquet://{column}/0::{table}"
        assert problems == [] and samples[0].path == str(own)
        assert not {"clip", "video", "image", "key"} & samples[0].extra.keys()


@pytest.mark.parametrize("declared", [True, False])
def test_rows_that_unpack_to_far_more_than_the_file_are_refused(declared: bool, tmp_path: Path) -> None:
    """By the footer, or as they come: a text of 1 MB that 400 rows share takes 1 kB of the file."""
    columns = {"problem": [str(n) * (1 << 20) for n in range(300)] if declared else ["x" * (1 << 20)] * 400}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 500_000
    before = pa.total_allocated_bytes()
    with pytest.raises(
        ManifestError, match=r"t.parquet: its rows unpack to over 0.27 GB; write them as JSON"
    ):
        load_manifest(tmp_path / "t.parquet")
    assert pa.total_allocated_bytes() - before < 1 << 28


def test_a_rows_own_text_is_no_place_of_its_own(tmp_path: Path) -> None:
    """What may be read without allow_urls is the table that the user named, not what its rows say."""
    named = "parquet://video/0::hf://datasets/other/name/t.parquet"
    (problem,) = check_manifest(one_table(tmp_path / "t.parquet", {"path": [named]})).problems
    assert "is a URL; these are refused unless allow_urls is set" in problem.text


def test_a_table_at_an_address(shelf: Path, clips: list[Path], memory: Any, tmp_path: Path) -> None:
    for file in shelf.rglob("*.parquet"):
        memory.pipe(f"/b/{file.name}", file.read_bytes())
    one = load_manifest("memory://b/train-00001-of-00003.parquet")[2]
    assert one.problem_id == 6 and one.path == "parquet://video/2::memory://b/train-00001-of-00003.parquet"
    expected = read_media(sample(clips[6]), replace(SMALL, seconds=0)).frames
    assert torch.equal(frames_of(one, tmp_path), expected)
    assert len(load_manifest("memory://b/*.parquet")) == SHARDS * ROWS
    memory.pipe("/b/none.parquet", b"text" * 100)
    for name, reason in (("none", "not a Parquet file, or damaged"), ("no", "there is no such file")):
        with pytest.raises(ManifestError, match=rf"memory://b/{name}.parquet: .*{reason}"):
            load_manifest(f"memory://b/{name}.parquet")


def test_a_folder_of_clips_with_metadata(tmp_path: Path, clips: list[Path]) -> None:
    """`datasets`' videofolder: only metadata are read, and the clips are the folder's own."""
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    for clip in clips[:2]:
        (folder / "train" / clip.name).write_bytes(clip.read_bytes())
    lines = [json.dumps({"file_name": clip.name, **question(n)}) for n, clip in enumerate(clips[:2])]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    samples = load_manifest(folder)
    assert [one.path for one in samples] == [str(folder / "train" / clip.name) for clip in clips[:2]]
    assert main(["data", "check", str(folder)]) == 0
    (folder / "train" / clips[1].name).unlink()
    (folder / "train" / clips[1].name).symlink_to(clips[1])  # out of the folder
    first, second = check_manifest(folder).samples, check_manifest(folder).problems
    assert first == samples[:1] and "allowed_roots" in second[0].text and len(second) == 1
    found = load_manifest(folder, allowed_roots=[clips[1].parent])
    assert [one.path for one in found] == [samples[0].path, str(clips[1])]


def test_the_media_root_of_a_pattern(memory: Any, tmp_path: Path) -> None:
    """The deepest folder that all of its tables are in; a file's name may have the signs of patterns."""
    for place in ("a", "b"):
        table = one_table(tmp_path / place / "t.parquet", {"clip": [CELL], "problem_id": [place]})
        memory.pipe(f"/set/{place}/t.parquet", table.read_bytes())
    for pattern in ("*/t.parquet", "**/t.parquet", "[ab]/*.parquet"):
        assert media_root_of(str(tmp_path / pattern), None) == str(tmp_path)
        assert media_root_of(f"memory://set/{pattern}", None) == "memory://set"
    for manifest in (f"{tmp_path}/*/t.parquet", "memory://set/*/t.parquet"):
        assert [one.problem_id for one in load_manifest(manifest)] == ["a", "b"]
    odd = (tmp_path / "a" / "t.parquet").rename(tmp_path / "a" / "t[1].parquet")
    assert len(load_manifest(odd)) == 1 and media_root_of(odd, None) == str(odd.parent)


def test_what_has_no_rows_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "000.tar").write_bytes(bytes(10240))
    with pytest.raises(ManifestError, match=r"write JSON rows with the path tar://MEMBER::ARCHIVE, such as"):
        load_manifest(tmp_path / "set")


def test_data_sets_given_in_python(shelf: Path, tmp_path: Path) -> None:
    streamed: Any = datasets.load_dataset(str(shelf), split="train", streaming=True)
    with pytest.raises(ManifestError, match="sends the files in its columns video with each row; give the"):
        load_manifest(streamed)
    held = datasets.Dataset.from_list([question(1, video=CELL)]).cast_column("video", datasets.Video())
    (problem,) = check_manifest(held).problems
    assert "or the table is in memory (then give the dataset's name, its folder" in problem.text
    rows = [question(n, path=f"{n}.mp4") for n in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain: Any = datasets.load_dataset("json", data_files=str(tmp_path / "t.jsonl"), streaming=True)
    assert load_manifest(plain, tmp_path) == load_manifest(rows, tmp_path)
    assert load_manifest(plain["train"], tmp_path) == load_manifest(rows, tmp_path)


def test_tables_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: Any) -> None:
    tables = [str(one_table(tmp_path / f"{n:02}.parquet", {"n": [n, n]})) for n in range(40)]
    read: Counter[str] = Counter()
    light_of = manifest_tables._rows_of
    monkeypatch.setattr(
        manifest_tables, "_rows_of", lambda table, *rest: read.update([table]) or light_of(table, *rest)
    )
    rows = table_rows(tables)
    assert [next(rows)["n"] for _ in range(3)] == [0, 0, 1]
    rows.close()  # type: ignore[attr-defined]
    assert len(read) < 20
    assert [row["n"] for row in table_rows(tables)] == [n for n in range(40) for _ in range(2)]
