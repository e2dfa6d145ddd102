"""Folders of frames as clips: which frames at which times, for every reader; bad folders; the studio."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from media_files import SMALL, picture, sample
from PIL import Image

from video_r1.data.check import check_media
from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.frame_cache import FrameCache, cache_key
from video_r1.data.making.clip_index import ClipIndex
from video_r1.data.making.layouts import Rejected
from video_r1.data.manifests.records import Sample, check_manifest
from video_r1.data.prompts import TextPrompts
from video_r1.data.sources.media_types import FOLDER_FPS, frame_names
from video_r1.errors import MediaError

ROW = {
    "problem_id": 1, "problem": "What?", "data_type": "video", "problem_type": "free-form",
    "solution": "<answer>x</answer>", "path": "clips/0001/",
}  # fmt: skip


def frames_in(folder: Path, numbers: Sequence[int], name: str = "{}.png", **size: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(picture(number, **size)).save(folder / name.format(number))
    return folder


def pixels(number: int) -> torch.Tensor:
    return torch.from_numpy(picture(number)).permute(2, 0, 1)


def clip_of(folder: Path, **fields: Any) -> Sample:
    return replace(sample(folder), **fields)


NAMES = [
    (["10.jpg", "9.jpg", "1.png"], ["1.png", "9.jpg", "10.jpg"]),
    (["b2.jpg", "a10.jpg", "a9.jpg", ".DS_Store"], ["a9.jpg", "a10.jpg", "b2.jpg"]),
    (["img_00010.jpg", "img_00009.jpg"], ["img_00009.jpg", "img_00010.jpg"]),
    (["01.jpg", "1.jpg", "2.jpg"], ["01.jpg", "1.jpg", "2.jpg"]),
    (
        ["x2y10.jpg", "x2y9.jpg", "x10y1.jpg", "frame.jpg"],
        ["frame.jpg", "x2y9.jpg", "x2y10.jpg", "x10y1.jpg"],
    ),
]


@pytest.mark.parametrize(("names", "expected"), NAMES)
def test_frames_are_in_the_order_of_their_numbers(
    tmp_path: Path, names: list[str], expected: list[str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert frame_names(str(tmp_path)) == expected


@pytest.mark.parametrize("seconds", [0.0, 60.0])  # in this process; in a worker
def test_the_wanted_frames_at_their_times(tmp_path: Path, seconds: float) -> None:
    folder = frames_in(tmp_path / "clip", range(12))
    budget = replace(SMALL, seconds=seconds)
    media = read_media(clip_of(folder), budget)  # 12 at 2 a second: 6 s × 2
    assert torch.equal(media.frames, torch.stack([pixels(n) for n in range(12)]))
    assert media.timestamps.tolist() == [n / FOLDER_FPS for n in range(12)]
    assert (media.duration, media.kind) == (6.0, "video")
    slow = read_media(clip_of(folder, extra={"fps": 4}), budget)  # 3 s × 2 = 6 of 12
    assert slow.timestamps.tolist() == [0.0, 0.5, 1.0, 1.75, 2.25, 2.75] and slow.duration == 3.0
    assert torch.equal(slow.frames, torch.stack([pixels(n) for n in (0, 2, 4, 7, 9, 11)]))
    part = read_media(clip_of(folder, start=1.0, end=3.0), budget)  # frames 2 to 5
    assert part.timestamps.tolist() == [0.0, 0.5, 1.0, 1.5] and part.duration == 2.0
    assert torch.equal(part.frames, torch.stack([pixels(n) for n in range(2, 6)]))


def empty(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def with_file(folder: Path, name: str, content: bytes = b"text") -> Path:
    (frames_in(folder, range(4)) / name).write_bytes(content)
    return folder


def two_sizes(folder: Path) -> Path:
    frames_in(folder, range(3))
    return frames_in(folder, [3], width=112)


def with_a_folder(folder: Path) -> Path:
    (frames_in(folder, range(4)) / "more.png").mkdir()
    return folder


def with_a_link_out(folder: Path) -> Path:
    secret = frames_in(folder.parent / "elsewhere", [7]) / "7.png"
    (frames_in(folder, range(4)) / "4.png").symlink_to(secret)
    return folder


def thin(folder: Path) -> Path:
    for number in range(2):
        Image.new("RGB", (8, 8 * 201)).save(empty(folder) / f"{number}.png")
    return folder


BAD = [
    (empty, r"clip: is a folder without frames"),
    (lambda f: with_file(f, "notes.txt"), r"'notes.txt' in it, which is no image; keep frames alone"),
    (lambda f: with_file(f, "3.png"), r"its frame 3.png: is not an image in a format that Pillow reads"),
    (lambda f: with_file(f, "3.png", b"\x89PNG\r\n\x1a\n" + bytes(9)), r"its frame 3.png: "),
    (two_sizes, r"different sizes, 56×56 \(0.png\) and 112×56 \(3.png\); make them alike"),
    (with_a_folder, r"'more.png/' in it, which is no image"),
    (with_a_link_out, r"'4.png', a link that leads out of its folder"),
    (lambda f: frames_in(f, [0]), r"has 1 frame, at least 2 needed"),
    (thin, r"more than 200 times the other"),
]


@pytest.mark.parametrize(("make", "reason"), BAD)
def test_bad_folders(tmp_path: Path, make: Any, reason: str) -> None:
    folder = make(tmp_path / "clip")
    for seconds in (0.0, 60.0):
        with pytest.raises(MediaError, match=reason) as error:
            read_media(clip_of(folder), replace(SMALL, seconds=seconds))
        assert error.value.path == str(folder)
    result = check_media([clip_of(folder)], replace(SMALL, seconds=0))
    assert len(result.problems) == 1 and not result.usable


def test_an_image_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is a folder, not a media file"):
        read_media(sample(frames_in(tmp_path / "clip", range(2)), "image"), SMALL)


@pytest.mark.parametrize("fps", ["8", 0, float("nan")])
def test_a_row_names_a_folder_and_its_rate(tmp_path: Path, fps: Any) -> None:
    folder = frames_in(tmp_path / "clips" / "0001", range(4))
    for path in ("clips/0001/", "./clips/./0001"):
        found = check_manifest([{**ROW, "path": path, "fps": 8}], tmp_path)
        assert found.problems == [] and found.samples[0].path == str(folder) and found.samples[0].fps == 8.0
    (problem,) = check_manifest([{**ROW, "fps": fps}], tmp_path).problems
    assert "fps is" in problem.text and "above 0" in problem.text
    (tmp_path / "a.mp4").touch()  # of a file it is a field like any other
    assert check_manifest([{**ROW, "path": "a.mp4", "fps": fps}], tmp_path).problems == []


def test_answers_at_another_rate_are_others(tmp_path: Path) -> None:
    from video_r1.evaluation.question_loop import asked_with
    from video_r1.rollout.engine import SamplingSettings
    from video_r1.settings.decoding import AskSettings

    folder = frames_in(tmp_path / "clips" / "0001", range(4))
    (tmp_path / "a.mp4").touch()

    def questions(path: Path, **extra: Any) -> str:
        settings, sampling = AskSettings(model="m"), SamplingSettings()
        return asked_with([clip_of(path, extra=extra)], TextPrompts(), SMALL, settings, sampling)["questions"]

    assert len({questions(folder), questions(folder, fps=2), questions(folder, fps=4)}) == 3
    assert questions(tmp_path / "a.mp4") == questions(
        tmp_path / "a.mp4", fps=4
    )  # as before there were folders


def test_folders_do_not_lead_out(tmp_path: Path) -> None:
    frames_in(tmp_path / "outside", range(4))
    root = empty(tmp_path / "root")
    (root / "clips").symlink_to(tmp_path / "outside")
    for path in ("clips", "clips/", "../outside/", "./"):
        (problem,) = check_manifest([{**ROW, "path": path}], root).problems
        assert "leads out of the media root" in problem.text


def test_the_cache_sees_a_frame_that_changed(tmp_path: Path) -> None:
    folder, cache = frames_in(tmp_path / "clip", range(4)), FrameCache(tmp_path / "cache", 10**9)
    budget = replace(SMALL, seconds=0)
    (first,) = cache.read(clip_of(folder), budget, (4,))
    Image.fromarray(picture(99)).save(folder / "2.png")  # the folder itself does not change by that
    (changed,) = cache.read(clip_of(folder), budget, (4,))
    assert torch.equal(changed.frames[2], pixels(99)) and not torch.equal(first.frames[2], pixels(99))
    keys = {cache_key(clip_of(folder, extra=extra), budget, 4) for extra in ({}, {"fps": 4}, {"fps": 8})}
    assert len(keys) == 3


def test_make_finds_folders(tmp_path: Path) -> None:
    for name in ("a/0001", "b/0002", "b/0001"):
        frames_in(tmp_path / name, range(2), "frame_{}.png")
    (tmp_path / "0002.mp4").touch()
    index = ClipIndex(str(tmp_path))
    assert index.find("a/0001/") == "a/0001" and index.find("a/0001.mp4") == "a/0001"
    assert index.find("0002") == "0002.mp4"  # a file goes before a folder
    assert index.find("b/0002") == "b/0002"
    with pytest.raises(Rejected, match="may be a/0001, b/0001"):
        index.find("0001")
    with pytest.raises(Rejected, match="no file"):
        index.find("b/0002", "image")


def test_a_question_about_a_folder(tmp_path: Path) -> None:
    from video_r1.evaluation.ask import question_sample
    from video_r1.settings.decoding import AskSettings

    folder = frames_in(tmp_path / "clip", range(4))
    found = question_sample(AskSettings(path=str(folder), model="m", question=["?"], clip_fps=4.0), "?")
    assert (found.data_type, found.path, found.fps) == ("video", str(folder), 4.0)


def test_the_studio_shows_its_frames(tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the extra studio is not installed")
    from studio_server import studio_client

    folder = frames_in(tmp_path / "clips" / "0001", range(12))
    bad = with_file(tmp_path / "clips" / "bad", "notes.txt")
    rows = [{**ROW, "fps": 4}, {**ROW, "problem_id": 2, "path": f"clips/{bad.name}"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with studio_client(tmp_path) as client:
        shown = client.get("/api/rows", params={"manifest": "train.json"}).json()["shown"]
        assert shown[0]["files"] == [{"count": 12, "fps": 4.0}] and shown[0]["problems"] == []
        assert shown[1]["files"] == [None] and "notes.txt" in shown[1]["problems"][0]
        place = {"manifest": "train.json", "row": 0}
        answer = client.get("/api/clip", params={**place, "frame": 11})
        assert answer.headers["content-type"] == "image/png"
        assert answer.content == (folder / "11.png").read_bytes()
        for frame in (12, -1):
            assert client.get("/api/clip", params={**place, "frame": frame}).status_code == 404
        assert client.get("/api/clip", params={"manifest": "train.json", "row": 1}).status_code == 415
