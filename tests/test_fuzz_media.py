"""Hundreds of damaged clips and images: each decodes or is refused with a reason, in bounded time."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from damaged_media import KINDS, damaged_files
from media_files import SIDE, SMALL, sample, write_video

from video_r1.data.decoding import decoders
from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.media import Media
from video_r1.errors import MediaError
from video_r1.settings.frames import FrameBudget

SECONDS, MEMORY = 30.0, 1 << 30
BUDGET = FrameBudget(frame_pixels=SIDE * SIDE, image_pixels=SIDE * SIDE, seconds=SECONDS, memory=MEMORY)


def check_media(media: Media, data_type: str) -> None:
    frames = media.frames
    assert frames.shape[1:] == (3, *frames.shape[2:]) and frames[0, 0].numel() <= SIDE * SIDE
    assert len(frames) == len(media.timestamps) and media.timestamps.isfinite().all()
    if data_type == "video":
        assert len(frames) % 2 == 0 and 2 <= len(frames) <= BUDGET.max_frames and media.duration > 0
        assert (media.timestamps.diff() > 0).all()
    else:
        assert len(frames) == 1 and media.duration == 0


def most_resident_bytes() -> int:
    """The most memory that any of this process's workers has had at once."""
    status = [Path(f"/proc/{worker.number}/status").read_text() for worker in decoders._decoders.one.idle]
    return max(int(text.split("VmHWM:")[1].split()[0]) << 10 for text in status)


@pytest.mark.parametrize("count", [48, pytest.param(300, marks=pytest.mark.slow)])
def test_damaged_files_are_decoded_or_refused_with_a_reason(tmp_path: Path, count: int) -> None:
    outcomes: Counter[tuple[str, str]] = Counter()
    longest = 0.0
    good = sample(write_video(tmp_path / "whole.mp4", 24))
    for file in damaged_files(tmp_path, count):
        start = time.monotonic()
        try:
            media = read_media(sample(file.path, file.data_type), BUDGET)
        except MediaError as error:
            outcomes[file.kind, "refused"] += 1
            assert error.path == str(file.path)
            assert error.reason.isprintable() and 0 < len(error.reason) <= 300
            assert "crash" not in error.reason, (file, error.reason)
        else:
            outcomes[file.kind, "decoded"] += 1
            check_media(media, file.data_type)
        longest = max(longest, time.monotonic() - start)
    assert len(read_media(good, SMALL).frames) == 4
    refused = {kind: outcomes[kind, "refused"] for kind in KINDS}
    print(f"{count} files: {refused}; longest {longest:.1f} s; {most_resident_bytes() >> 20} MB at most")
    assert sum(outcomes.values()) == count
    assert longest < SECONDS + 15  # and what a worker needs to be ended and started
    assert most_resident_bytes() < MEMORY
    assert refused["bomb"] == sum(outcomes["bomb", outcome] for outcome in ("refused", "decoded"))
    assert sum(refused.values()) > count / 2
