"""Rows with `play: reversed`: whoever reads the clip gets its frames backwards, at times that count on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import moving_square, write_clip

from video_r1.annotation.annotate import drawing
from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.decoding.frame_cache import FrameCache
from video_r1.data.manifests.records import Sample, check_manifest
from video_r1.data.prompts import TextPrompts, contrast_prompt
from video_r1.data.reading import Reader
from video_r1.evaluation.ask import question_sample
from video_r1.settings.decoding import AnnotateSettings, AskSettings
from video_r1.settings.frames import FrameBudget

BUDGET = FrameBudget(fps=8.0, max_frames=8, frame_pixels=56 * 56, image_pixels=56 * 56, seconds=0)
ROW = {
    "problem_id": 1, "problem": "Which way?", "data_type": "video", "problem_type": "multiple choice",
    "options": ["A. left", "B. right"], "solution": "<answer>A</answer>", "path": "clip.mp4",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4", moving_square(frames=40))
    (folder / "frames").mkdir()
    for number in range(6):
        Image.new("RGB", (56, 56), (40 * number, 0, 0)).save(folder / "frames" / f"{number}.png")
    return folder


def sample(folder: Path, **fields: Any) -> Sample:
    samples, _, problems = check_manifest([{**ROW, **fields}], folder)
    assert not problems
    return samples[0]


@pytest.mark.parametrize("fields", [{}, {"start": 1.0, "end": 3.3}, {"path": "frames"}])
def test_frames_run_backwards_and_times_count_on(folder: Path, fields: dict[str, Any]) -> None:
    forward = sample(folder, **fields)
    counts = (8, 4)
    pairs = zip(
        read_media_at(forward, BUDGET, counts),
        read_media_at(replace(forward, play="reversed"), BUDGET, counts),
        strict=True,
    )
    for there, back in pairs:
        assert torch.equal(back.frames, there.frames.flip(0))
        assert not torch.equal(back.frames, there.frames)
        assert (back.timestamps.diff() > 0).all()
        assert torch.equal(back.timestamps[[0, -1]], there.timestamps[[0, -1]])
        torch.testing.assert_close(back.timestamps.diff(), there.timestamps.diff().flip(0))
        assert back.duration == there.duration


def test_the_frame_cache_tells_the_directions_apart(folder: Path, tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache", 10**8)
    with Reader(BUDGET, cache) as reader:
        forward = sample(folder, play="forward")
        (there,), (back,), (again,) = map(
            reader.media, (forward, replace(forward, play="reversed"), replace(forward, play="reversed"))
        )
    assert torch.equal(back.frames, there.frames.flip(0)) and torch.equal(again.frames, back.frames)
    assert len(list(cache.folder.glob("*/*.safetensors"))) == 2


def test_contrasts_apply_on_top(folder: Path) -> None:
    asked = sample(folder, play="reversed")
    with Reader(BUDGET) as reader:
        (back,), (there,) = reader.media(asked), reader.media(replace(asked, play="forward"))
    prompts = TextPrompts()
    twice = contrast_prompt(asked, (back,), prompts, "reversed", torch.Generator(), "frame")
    assert twice is not None and torch.equal(twice.media[0].frames, there.frames)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"play": "backwards"}, "play is 'backwards'; it must be forward or reversed"),
        ({"play": "reversed", "data_type": "image"}, "play is for videos, and this is an image"),
    ],
)
def test_what_a_row_cannot_say(folder: Path, fields: dict[str, Any], said: str) -> None:
    assert said in [problem.text for problem in check_manifest([{**ROW, **fields}], folder).problems]


def test_an_annotation_does_not_go_on_with_the_other_direction(folder: Path) -> None:
    settings = AnnotateSettings(manifest="m.json", teacher="t", out="o.json")
    forward = sample(folder)
    assert drawing(settings, [forward]) != drawing(settings, [replace(forward, play="reversed")])


def test_ask_shows_a_clip_backwards(folder: Path) -> None:
    settings = AskSettings(model="m", path=str(folder / "clip.mp4"), question=["Which way?"], play="reversed")
    assert question_sample(settings, "Which way?").play == "reversed"
