"""The cache of resized frames: same pixels, size limit, damage, parallel writers; several frame counts."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import moving_square, write_clip

from video_r1.data.decoding import frame_cache
from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.decoding.frame_cache import FrameCache, cache_key, open_frame_cache
from video_r1.data.decoding.media import Media, decode_media
from video_r1.data.manifests.records import Sample
from video_r1.data.sources.bounded_folder import PARTIAL
from video_r1.errors import ConfigError, MediaError
from video_r1.settings.frames import FrameBudget

BUDGET = FrameBudget(fps=8.0, max_frames=8, frame_pixels=56 * 56, image_pixels=56 * 56, seconds=0)
LARGE = 10**9


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("media") / "clip.mp4", moving_square(frames=40))


def sample(path: Path, **fields: object) -> Sample:
    base = Sample(
        1, "?", "image" if path.suffix == ".png" else "video", "free-form", "<answer>x</answer>", str(path)
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def same(first: Media, second: Media) -> bool:
    return (
        torch.equal(first.frames, second.frames)
        and torch.equal(first.timestamps, second.timestamps)
        and (first.duration, first.kind) == (second.duration, second.kind)
    )


def read(cache: FrameCache, question: Sample) -> Media:
    return cache.read(question, BUDGET, (BUDGET.max_frames,))[0]


def entries(cache: FrameCache) -> list[Path]:
    """List all entries; drafts, which are beside them, do not count."""
    return sorted(path for path in cache.folder.glob("*/*.safetensors") if PARTIAL not in path.name)


@pytest.mark.parametrize("counts", [(16, 4, 8), (2, 32)])
@pytest.mark.parametrize("window", [{}, {"start": 2.0, "end": 2.3}])
def test_several_frame_counts_from_one_decoding(
    clip: Path, counts: tuple[int, ...], window: dict[str, float]
) -> None:
    question = sample(clip, **window)
    together = read_media_at(question, BUDGET, counts)
    apart = [decode_media(question, replace(BUDGET, max_frames=count)) for count in counts]
    assert [len(media.frames) for media in apart] == [len(media.frames) for media in together]
    assert all(same(a, b) for a, b in zip(apart, together, strict=True))


def test_the_second_read_decodes_nothing(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(moving_square()[0]).save(picture)
    cache = FrameCache(tmp_path / "cache", LARGE)
    for question in (sample(clip), sample(clip, start=1.0, end=2.0), sample(picture)):
        first = read(cache, question)
        assert same(first, decode_media(question, BUDGET))
        with monkeypatch.context() as patched:
            patched.setattr(frame_cache, "read_media_at", None)
            assert same(read(FrameCache(tmp_path / "cache", LARGE), question), first)
    assert len(entries(cache)) == 3
    # Only the frame count that is not there yet is decoded.
    asked = []
    real = frame_cache.read_media_at
    monkeypatch.setattr(frame_cache, "read_media_at", lambda s, b, c: asked.append(c) or real(s, b, c))
    several = cache.read(sample(clip), BUDGET, (4, 8, 16))
    assert asked == [[4, 16]]
    assert [len(media.frames) for media in several] == [4, 8, 16]


def test_what_decides_the_pixels_decides_the_entry(clip: Path, tmp_path: Path) -> None:
    question = sample(clip)
    keys = [cache_key(question, BUDGET, 8), cache_key(question, BUDGET, 4)]
    keys += [
        cache_key(replace(question, start=1.0), BUDGET, 8),
        cache_key(replace(question, end=1.0), BUDGET, 8),
    ]
    areas = ({"frame_pixels": 84 * 84}, {"size_multiple": 56}, {"least_pixels": 784})
    for change in ({"fps": 4.0}, {"min_frames": 2}, *areas):
        keys.append(cache_key(question, replace(BUDGET, **change), 8))
    image = tmp_path / "image.png"
    image.write_bytes(b"")
    keys += [cache_key(sample(image), replace(BUDGET, **change), 8) for change in ({}, {"least_pixels": 784})]
    copy = tmp_path / "clip.mp4"
    copy.write_bytes(clip.read_bytes())
    keys.append(cache_key(sample(copy), BUDGET, 8))
    os.utime(copy, (1, 1))
    keys.append(cache_key(sample(copy), BUDGET, 8))
    assert len(set(keys)) == len(keys)
    # Neither the question nor what reading may cost.
    assert cache_key(replace(question, problem_id=2, problem="!"), replace(BUDGET, seconds=9.0), 8) == keys[0]
    assert cache_key(sample(tmp_path / "gone.mp4"), BUDGET, 8) is None


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "no checksum", "another duration"])
def test_a_damaged_entry_is_decoded_again(
    clip: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FrameCache(tmp_path, LARGE)
    good = read(cache, sample(clip, end=1.0))
    (path,) = entries(cache)
    content = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        content[-100] ^= 1
    elif damage == "cut off":
        content = content[: len(content) // 2]
    elif damage == "no checksum":
        content = content.replace(b'"checksum"', b'"chocksum"')
    else:
        content = content.replace(b'"duration":"1.0"', b'"duration":"5.0"')
    path.write_bytes(content)
    assert same(read(cache, sample(clip, end=1.0)), good)
    monkeypatch.setattr(frame_cache, "read_media_at", None)  # the entry was written again
    assert same(read(cache, sample(clip, end=1.0)), good)


def one_entry(number: int) -> tuple[str, Media]:
    frames = torch.full((4, 3, 56, 56), number, dtype=torch.uint8)
    return f"{number:02x}" * 20, Media(frames, torch.arange(4, dtype=torch.float64), 1.0, "video")


def test_the_least_recently_used_entries_go(tmp_path: Path) -> None:
    keys = [one_entry(number)[0] for number in range(12)]
    cache = FrameCache(tmp_path, 10 * 40_000)  # an entry has some bytes more than its 37,632 of frames
    for number, key in enumerate(keys[:9]):
        cache.put(*one_entry(number))
        os.utime(cache._path(key), (number, number))
    assert cache.get(keys[0]) is not None  # used just now
    cache.put(*one_entry(9))
    cache.put(*one_entry(10))
    kept = {path.stem for path in entries(cache)}
    assert keys[0] in kept
    assert {keys[9], keys[10]} <= kept
    assert keys[1] not in kept
    assert sum(path.stat().st_size for path in entries(cache)) <= 10 * 40_000
    stale = tmp_path / "00" / "left.1-1.partial"
    stale.write_bytes(b"half")
    os.utime(stale, (1, 1))
    (tmp_path / ".size").write_text("")  # as after a crash: the folder is measured again
    cache.put(*one_entry(1))
    assert not stale.exists()
    assert int((tmp_path / ".size").read_text()) == sum(path.stat().st_size for path in entries(cache))
    assert not list(tmp_path.glob(f"*/*{PARTIAL}*"))


def test_media_larger_than_the_cache_leave_it_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FrameCache(tmp_path, 60_000)
    cache.put(*one_entry(1))
    before = entries(cache)
    for number in (2, 3):
        key, media = one_entry(number)
        cache.put(key, replace(media, frames=media.frames.repeat(2, 1, 1, 1)))
    assert len(before) == 1 and entries(cache) == before
    assert not list(tmp_path.glob("*/*.partial*"))
    assert len(caplog.messages) == 1 and "are larger than frame_cache_gb" in caplog.messages[0]


def test_a_disk_that_takes_no_more_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FrameCache(tmp_path, LARGE)
    cache.put(*one_entry(1))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        cache.put(*one_entry(2))
        cache.put(*one_entry(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert len(entries(cache)) == 1
    assert not list(tmp_path.glob("*/*.partial*"))
    assert len(caplog.messages) == 1 and "cannot be written" in caplog.messages[0]
    cache.put(*one_entry(2))
    assert len(entries(cache)) == 2


def test_an_entry_that_goes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reads the header, then torch opens the file again for the tensors."""
    cache, (key, media) = FrameCache(tmp_path, 10**6), one_entry(1)
    cache.put(key, media)
    opened = torch.UntypedStorage.from_file

    def evicted(path: str, **arguments: Any) -> Any:
        Path(path).unlink()
        return opened(path, **arguments)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", evicted)
    assert cache.get(key) is None


def size_of(cache: FrameCache) -> int:
    """Bytes of all entries, while none comes or goes."""
    with (cache.folder / ".size").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in entries(cache))


def write_and_read(folder: Path, limit: int) -> None:
    """Twenty entries three times over, each checked when it is found."""
    cache = FrameCache(folder, limit)
    for number in range(60):
        key, media = one_entry(number % 20)
        found = cache.get(key)
        if found is None:
            cache.put(key, media)
        else:
            assert (found.frames == number % 20).all()
    assert len(entries(cache)) <= 12


def test_an_entry_is_for_whoever_may_read_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o002)
    try:
        cache = FrameCache(tmp_path, LARGE)
        cache.put(*one_entry(1))
    finally:
        os.umask(before)
    (entry,) = entries(cache)
    assert entry.stat().st_mode & 0o777 == 0o664

    def refused(*given: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)  # of another user's
    assert cache.get(one_entry(1)[0]) is not None and entry.exists()


@pytest.mark.slow
def test_parallel_writers_and_readers(tmp_path: Path) -> None:
    limit = 12 * 40_000
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=write_and_read, args=(tmp_path, limit)) for _ in range(3)]
    for process in processes:
        process.start()
    watching = FrameCache(tmp_path, limit)
    largest = 0
    while any(process.is_alive() for process in processes):
        largest = max(largest, size_of(watching))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 0 < largest <= limit
    assert not list(tmp_path.glob("*/*.partial*"))


def test_bad_media_and_bad_folders(clip: Path, tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache", LARGE)
    text = tmp_path / "text.mp4"
    text.write_text("no clip at all")
    for path in (text, tmp_path / "gone.mp4"):
        with pytest.raises(MediaError):
            read(cache, sample(path))
    assert entries(cache) == []
    with pytest.raises(ConfigError, match="frame_cache"):
        FrameCache(text / "below", LARGE)
    assert open_frame_cache(None, 1.0) is None
    opened = open_frame_cache(str(tmp_path / "other"), 0.5)
    assert opened is not None
    assert opened.limit == 500_000_000
