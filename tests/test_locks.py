"""Locks on the file systems of clusters: NFS, where an exclusive one needs a file that is open for writing,
and those that have none.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from video_r1 import files
from video_r1.data.decoding.frame_cache import FrameCache
from video_r1.data.decoding.media import Media
from video_r1.data.sources.remote import RemoteCache
from video_r1.errors import RequestError

FLOCK = fcntl.flock


def flock_of_nfs(file: Any, how: int) -> None:
    if how & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    FLOCK(file, how)


def without_locks(file: Any, how: int) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


@pytest.fixture(params=[flock_of_nfs, without_locks])
def system(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """One without locks is told of once."""
    monkeypatch.setattr(fcntl, "flock", request.param)
    monkeypatch.setattr(files, "_without_locks", set())
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    due = ["cannot be locked", "Operation not supported", "let no two commands write to that folder at once"]
    assert len(said) == (request.param is without_locks)
    assert all(words in message for message in said for words in due)


@pytest.mark.usefixtures("system")
def test_copies_of_remote_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(6):
        memory.pipe(f"/locks/{number}", bytes([number]) * 300)
    cache = RemoteCache(tmp_path / "copies", 1000)
    for number in (0, 1, 2, 3, 4, 5, 5, 0):  # some are removed for others
        with cache.file(f"memory://locks/{number}") as path:
            assert Path(path).read_bytes() == bytes([number]) * 300
    assert len([*cache.folder.glob("??/*")]) <= 3
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"video": [b"one", b"two"]}), table)
    with cache.file(f"parquet://video/1::{table}") as path:
        assert Path(path).read_bytes() == b"two"


@pytest.mark.usefixtures("system")
def test_frames_that_are_kept(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 100_000)
    media = Media(torch.zeros(4, 3, 56, 56, dtype=torch.uint8), torch.arange(4.0).double(), 1.0, "video")
    for number in range(4):
        cache.put(f"{number}{number}" * 20, media)
        assert cache.get(f"{number}{number}" * 20) is not None
    assert len([*tmp_path.glob("??/*")]) == 2


def test_a_folder_that_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "lockf", without_locks)
    monkeypatch.setattr(files, "_without_locks", set())
    for _ in range(2):
        with files.claimed(tmp_path):
            pass
    assert [str(tmp_path / ".lock") in message for message in caplog.messages] == [True]

    def taken(file: Any, how: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fcntl, "lockf", taken)
    with pytest.raises(RequestError, match="is being written by another command"), files.claimed(tmp_path):
        pass
