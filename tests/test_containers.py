"""Tables and archives that hold clips: replaced at their address, many of them, and pipes in their place."""

from __future__ import annotations

import os
import tarfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_files import SMALL, sample

from video_r1.data.decoding.frame_cache import cache_key
from video_r1.data.making.clip_index import ClipIndex
from video_r1.data.sources import remote
from video_r1.data.sources.remote import NoAnswer, RemoteCache
from video_r1.errors import MediaError

pytestmark = pytest.mark.usefixtures("own_copies")

COMMIT = "hf://datasets/owner/name@" + 40 * "a" + "/data/t.parquet"


def table(path: Path, *clips: bytes) -> Path:
    pq.write_table(pa.table({"video": [*clips]}), path)
    return path


def archive(path: Path, *clips: bytes) -> Path:
    with tarfile.open(path, "w") as opened:
        for number, clip in enumerate(clips):
            file = path.with_name("member")
            file.write_bytes(clip)
            opened.add(file, f"{number}.mp4")
    return path


@pytest.mark.parametrize(
    ("make", "inside"), [(table, "parquet://video/1::"), (archive, "tar://1.mp4::")], ids=["table", "archive"]
)
def test_one_that_is_replaced_at_its_address(tmp_path: Path, memory: Any, make: Any, inside: str) -> None:
    """By one of the same size: a command that begins afterwards has the new clips, and no old frames."""
    address = f"{inside}memory://b/held"

    def read() -> tuple[bytes, str | None]:
        """As a new process does."""
        remote.open_remote_cache.cache_clear()
        with RemoteCache(tmp_path / "copies", 10**9).file(address) as path:
            return Path(path).read_bytes(), cache_key(sample(address), SMALL, 8)

    memory.put_file(str(make(tmp_path / "held", b"old 0", b"old 1")), "/b/held")
    first, before = read()
    assert read() == (first, before) == (b"old 1", before)
    memory.put_file(str(make(tmp_path / "held", b"new 0", b"new 1")), "/b/held")
    second, after = read()
    assert second == b"new 1" and after != before
    memory.rm("/b/held")  # or out of reach: the copies are what it was
    assert read() == (second, after)
    with (
        pytest.raises(MediaError, match="there is no such file"),
        RemoteCache(tmp_path / "x", 10**9).file(address),
    ):
        pass


def test_a_place_that_does_not_answer_is_asked_once(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is known of it already is told meanwhile."""
    for name in "abc":
        memory.put_file(str(table(tmp_path / "t", b"0", name.encode())), f"/b/{name}")
    before = RemoteCache(tmp_path / "copies", 10**9)
    states = {name: before.state(f"memory://b/{name}") for name in "abc"}
    cache, asked = RemoteCache(tmp_path / "copies", 10**9), list[str]()
    assert cache.state("memory://b/a") == states["a"]

    def told(address: str) -> dict[str, str]:
        asked.append(address)
        told = Future[object]()
        threading.Thread(target=lambda: told.set_result(cache.state("memory://b/a")), daemon=True).start()
        assert told.result(20) == states["a"]
        raise NoAnswer(address, "cannot be fetched")

    monkeypatch.setattr(remote, "stamps_at", told)
    assert cache.state("memory://b/b") == states["b"] and cache.state("memory://b/c") == states["c"]
    assert asked == ["memory://b/b"]
    assert cache.state("other://b/c") == () and asked[1:] == ["other://b/c"]


def test_another_users_copy_is_read(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.put_file(str(table(tmp_path / "t", b"0", b"1")), "/b/t")
    cache = RemoteCache(tmp_path / "copies", 10**9)

    def refuse(path: Path, *times: None) -> None:
        if times:  # `Path.touch` of a file of our own
            return plain(path, *times)
        refused.append(path)
        raise PermissionError(1, "Operation not permitted")

    plain, refused = os.utime, list[Path]()
    monkeypatch.setattr(os, "utime", refuse)
    for _ in range(2):
        with cache.file("parquet://video/1::memory://b/t") as path:
            assert Path(path).read_bytes() == b"1"
    assert refused


def test_it_is_asked_once_a_process_and_not_of_a_commit(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    told = remote.stamps_at
    monkeypatch.setattr(remote, "stamps_at", lambda address: asked.append(address) or told(address))
    memory.put_file(str(table(tmp_path / "t", b"0", b"1")), "/b/t")
    cache = RemoteCache(tmp_path / "copies", 10**9)
    for row in (0, 1, 0):
        with cache.file(f"parquet://video/{row}::memory://b/t") as path:
            assert Path(path).read_bytes() == str(row).encode()
    assert cache.state(COMMIT) == () and cache.state("memory://b/none") == ()
    assert asked == ["memory://b/t", "memory://b/none"]
    assert RemoteCache(tmp_path / "copies", 10**9).state("memory://b/t") == cache.state("memory://b/t") != ()


@pytest.mark.parametrize("inside", ["parquet://video/1::", "tar://1.mp4::", "tar://."])
def test_a_pipe_is_no_table_and_no_archive(tmp_path: Path, inside: str) -> None:
    pipe = tmp_path / "a.tar"
    os.mkfifo(pipe)
    cache = RemoteCache(tmp_path / "copies", 10**9)
    with pytest.raises(MediaError, match="no plain file"):
        if inside.startswith("tar"):
            cache.part(f"{inside}::{pipe}" if "::" not in inside else f"{inside}{pipe}")
        else:
            with cache.file(f"{inside}{pipe}"):
                pass
    assert ClipIndex(str(tmp_path)).paths == set()
