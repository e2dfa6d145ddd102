"""The reader: in order, once a clip, no further ahead than it may, and what cannot be used is an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import moving_square, write_clip
from tiny_questions import write_manifest

from video_r1.data import reading
from video_r1.data.manifests.records import Sample, load_manifest
from video_r1.data.reading import Batch, Clips, Reader, quarantined
from video_r1.errors import MediaError, PromptError
from video_r1.settings.frames import FrameBudget

BUDGET = FrameBudget(max_frames=4, frame_pixels=56 * 56, image_pixels=56 * 56)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Five clips, the second damaged, and three pictures."""
    return load_manifest(write_manifest(tmp_path_factory.mktemp("data"), bad=(1,)))


def number_and_frames(sample: Sample, media: Clips) -> tuple[int, int]:
    if sample.problem_id == 3:
        raise PromptError("too long")
    return int(sample.problem_id), len(media[0].frames)


def test_batches_come_in_order_with_what_cannot_be_used(samples: list[Sample]) -> None:
    with Reader(BUDGET) as reader:
        read = list(
            reader.batches([Batch(samples[:3]), Batch([]), Batch(samples[3:6])], number_and_frames, ahead=2)
        )
    (first, damaged, third), empty, (too_long, fifth, image) = read
    assert (first, third, fifth, image) == ((0, 4), (2, 4), (4, 4), (5, 1)) and empty == []
    assert isinstance(damaged, MediaError) and isinstance(too_long, PromptError)
    assert quarantined(samples[1], damaged) == {
        "problem_id": 1, "path": samples[1].path, "kind": "media", "reason": damaged.reason,
    }  # fmt: skip
    assert quarantined(samples[3], too_long)["kind"] == "prompt"
    assert quarantined(samples[3], too_long)["reason"] == "too long"


def test_each_frame_count_is_a_batch_of_its_own_from_one_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "clip.mp4", moving_square(16), fps=4.0)
    questions = [
        Sample(n, "?", "video", "OCR", "<answer>1</answer>", str(tmp_path / "clip.mp4")) for n in range(4)
    ]
    decoded = []
    real = reading.read_media_at
    monkeypatch.setattr(reading, "read_media_at", lambda s, b, c: decoded.append(c) or real(s, b, c))
    with Reader(BUDGET) as reader:
        read = reader.batches([Batch(questions[:2], (2, 6)), Batch(questions[2:], (2, 6))], lambda s, m: m)
        frames = [[len(media[0].frames) for media in medias if isinstance(media, tuple)] for medias in read]
    assert frames == [[2, 2], [6, 6]] * 2
    assert decoded == [(2, 6)]  # the second batch is about the clip of the first one


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_read_ahead_than_asked_for(samples: list[Sample], ahead: int) -> None:
    begun = []

    def batches() -> Iterator[Batch]:
        for sample in samples:
            begun.append(sample.problem_id)
            yield Batch([sample])

    with Reader(BUDGET) as reader:
        for taken, _ in enumerate(reader.batches(batches(), number_and_frames, ahead), start=1):
            assert len(begun) == min(taken + ahead, len(samples))


def test_what_is_built_raises_is_raised_and_a_closed_reader_can_be_used_again(samples: list[Sample]) -> None:
    def broken(sample: Sample, media: Clips) -> None:
        raise ZeroDivisionError

    reader = Reader(BUDGET, threads=1)
    with pytest.raises(ZeroDivisionError), reader:
        list(reader.batches([Batch([sample]) for sample in samples], broken))
    with reader:
        names = [reader.submit(lambda: threading.current_thread().name).result() for _ in range(2)]
        assert len(set(names)) == 1 and names[0].startswith("media")
        assert torch.equal(
            reader.submit(reader.media, samples[0]).result()[0].frames, reader.media(samples[0])[0].frames
        )
