"""The limits of reading one file: time, memory, streams, and what becomes of the process that decodes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged_media import good_files, many_streams
from media_files import SMALL, sample, saved, write_video
from PIL import Image

from video_r1.data.decoding import decoders
from video_r1.data.decoding.decoders import Decoders, read_media
from video_r1.data.decoding.media import decode_media
from video_r1.errors import MediaError, VideoR1Error
from video_r1.settings.frames import FrameBudget

LARGE = FrameBudget(frame_pixels=640 * 360, image_pixels=2000 * 2000)


@pytest.fixture(scope="module")
def own_decoders() -> Iterator[Decoders]:
    own = Decoders()
    yield own
    own.close()


@pytest.fixture
def workers(own_decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> Decoders:
    """Decoders without a worker yet."""
    monkeypatch.setattr(decoders._decoders, "one", own_decoders)
    while own_decoders.idle:
        own_decoders._stop(own_decoders.idle.pop())
    return own_decoders


@pytest.fixture(scope="module")
def slow_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of one keyframe that takes seconds to decode."""
    options = {"x264-params": "keyint=1000:scenecut=0:bframes=0", "preset": "ultrafast"}
    return write_video(
        tmp_path_factory.mktemp("slow") / "a.mp4", 240, codec_options=options, size=(1280, 720)
    )


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_reads_what_this_process_reads(tmp_path: Path) -> None:
    clip = sample(write_video(tmp_path / "a.mp4", 50, size=(320, 180)), start=0.2, end=1.7)
    image = sample(saved(Image.new("RGB", (300, 200), (9, 8, 7)), tmp_path / "ü\udcff.png"), "image")
    for question in (clip, image):
        there, here = read_media(question, LARGE), decode_media(question, LARGE)
        assert torch.equal(there.frames, here.frames) and torch.equal(there.timestamps, here.timestamps)
        assert (there.duration, there.kind) == (here.duration, here.kind)


def test_a_file_that_takes_too_long_is_given_up_and_its_worker_killed(
    slow_clip: Path, workers: Decoders, tmp_path: Path
) -> None:
    good = sample(write_video(tmp_path / "good.mp4", 8))
    read_media(good, SMALL)
    (worker,) = workers.idle
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"takes longer than 0.05 s to decode$"):
        read_media(sample(slow_clip), replace(LARGE, seconds=0.05))
    assert time.monotonic() - start < 10
    assert not is_running(worker.number) and not workers.idle
    assert len(read_media(good, SMALL).frames) == 4
    assert len(workers.idle) == 1 and workers.idle[0].number != worker.number


def test_a_file_that_takes_too_much_memory_is_refused_and_the_worker_lives(
    tmp_path: Path, workers: Decoders
) -> None:
    picture = sample(saved(Image.new("RGB", (6000, 6000)), tmp_path / "a.png"), "image")
    with pytest.raises(MediaError, match="takes more memory to decode than is allowed"):
        read_media(picture, replace(LARGE, memory=100 << 20))
    (worker,) = workers.idle
    assert len(read_media(picture, LARGE).frames) == 1
    assert [other.number for other in workers.idle] == [worker.number]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_a_file_that_kills_two_is_named(
    slow_clip: Path, workers: Decoders
) -> None:
    read_media(sample(slow_clip, start=0, end=0.3), LARGE)  # the server runs
    assert workers.server is not None
    server = workers.server[0].pid

    def kill_workers(most: int) -> None:
        killed = set()
        while len(killed) < most:
            for child in set(child_processes(server)) - killed:
                time.sleep(0.05)  # it has its request by now
                os.kill(child, signal.SIGSEGV)
                killed.add(child)
            time.sleep(0.005)

    for most in (1, 2):
        workers._stop(workers.idle.pop())
        killer = threading.Thread(target=kill_workers, args=(most,), daemon=True)
        killer.start()
        if most == 1:
            assert len(read_media(sample(slow_clip), LARGE).frames) == 16
        else:
            with pytest.raises(MediaError, match=r"makes the decoder crash \(SIGSEGV\)"):
                read_media(sample(slow_clip), LARGE)
        killer.join(30)
        assert not killer.is_alive()


def child_processes(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:  # the process has just ended
        return []


@pytest.mark.parametrize("with_server", [True, False])
def test_workers_that_die_together_are_no_fault_of_a_file(
    tmp_path: Path, workers: Decoders, with_server: bool
) -> None:
    """As where a machine has no memory left."""
    clips = [sample(write_video(tmp_path / f"{number}.mp4", 8 + 2 * number)) for number in range(3)]
    for worker in [workers._take(new=True) for _ in clips]:
        workers._put_back(worker)
    assert workers.server is not None
    server, _ = workers.server
    numbers = [worker.number for worker in workers.idle]
    for number in [server.pid] * with_server + numbers:
        os.kill(number, signal.SIGKILL)
    found = [len(read_media(clips[0], SMALL).frames)]
    threads = [
        threading.Thread(target=lambda clip=clip: found.append(len(read_media(clip, SMALL).frames)))
        for clip in clips
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(numbers) == 3 and found == [4] * 4
    assert (workers.server[0] is not server) == with_server
    assert all(worker.server is workers.server[0] for worker in workers.idle)


def test_a_worker_that_hangs_before_it_begins_is_replaced(
    tmp_path: Path, workers: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_BEGIN_SECONDS", 0.5, raising=False)
    good = sample(write_video(tmp_path / "good.mp4", 8))
    read_media(good, SMALL)
    (hung,) = workers.idle
    os.kill(hung.number, signal.SIGSTOP)
    assert len(read_media(good, replace(SMALL, seconds=10)).frames) == 4
    assert not is_running(hung.number) and workers.idle[0].number != hung.number


def test_a_job_that_is_told_to_stop_reads_on(tmp_path: Path, workers: Decoders) -> None:
    """SIGTERM reaches all its processes; the one that reads has a step to finish."""
    good = sample(write_video(tmp_path / "good.mp4", 8))
    read_media(good, SMALL)
    assert workers.server is not None
    (worker,) = workers.idle
    for number in (workers.server[0].pid, worker.number):
        os.kill(number, signal.SIGTERM)
    assert len(read_media(good, SMALL).frames) == 4
    assert workers.idle == [worker] and is_running(worker.number) and is_running(workers.server[0].pid)


def test_a_server_that_is_ended_again_and_again(
    tmp_path: Path, workers: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange(channel: Any, *question: Any) -> Any:
        assert workers.server is not None
        workers.server[0].kill()
        raise EOFError

    monkeypatch.setattr(decoders, "_exchange", exchange)
    monkeypatch.setattr(decoders, "_ATTEMPTS", 2)
    with pytest.raises(VideoR1Error, match=r"a.mp4: the process .* was ended 2 times meanwhile") as error:
        read_media(sample(write_video(tmp_path / "a.mp4", 8)), SMALL)
    assert not isinstance(error.value, MediaError)


def test_many_threads_read_at_once(tmp_path: Path, workers: Decoders) -> None:
    clips = [sample(write_video(tmp_path / f"{n}.mp4", 8 + 2 * n)) for n in range(4)]
    expected = [decode_media(clip, SMALL).frames for clip in clips]
    wrong = []

    def read(first: int) -> None:
        for number in range(first, first + 20):
            if not torch.equal(read_media(clips[number % 4], SMALL).frames, expected[number % 4]):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 1 <= len(workers.idle) <= 3


@pytest.mark.slow
def test_the_workers_end_with_the_process_that_reads(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "a.mp4", 8)
    program = (
        "import sys, os\n"
        "from video_r1.data.decoding import decoders\n"
        "from video_r1.data.decoding.decoders import FrameBudget, read_media\n"
        "from video_r1.data.manifests.records import Sample\n"
        f"read_media(Sample(1, '', 'video', 'OCR', '', {str(clip)!r}), FrameBudget())\n"
        "print(decoders._decoders.one.idle[0].number, decoders._decoders.one.server[0].pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    numbers = [int(number) for number in done.stdout.split()]
    deadline = time.monotonic() + 20
    while any(map(is_running, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(numbers) == 2 and not any(map(is_running, numbers))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_thousands_of_streams_are_refused_at_once(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"many.{suffix}"
    path.write_bytes(many_streams(good_files(tmp_path), suffix, np.random.default_rng(0)))
    start = time.monotonic()
    with pytest.raises(MediaError, match="has more than 64 streams"):
        read_media(sample(path), SMALL)
    assert time.monotonic() - start < 20


def test_without_a_time_limit_no_process_is_started(tmp_path: Path, workers: Decoders) -> None:
    clip = sample(write_video(tmp_path / "a.mp4", 8))
    assert len(read_media(clip, replace(SMALL, seconds=0)).frames) == 4
    assert not workers.idle
