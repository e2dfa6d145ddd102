"""`video-r1 data check`: every file opened, every problem printed, the counts right; and progress."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from media_files import SMALL, write_video
from PIL import Image

from video_r1 import console as progress_module
from video_r1.console import Progress
from video_r1.data.check import check_media, format_counts, run_check
from video_r1.data.manifests.records import Sample, load_manifest


def row(problem_id: int, path: str, problem_type: str = "free-form", source: str = "lab/a", **more) -> dict:
    data_type = "image" if path.endswith(".png") else "video"
    return {
        "problem_id": problem_id, "problem": "What?", "data_type": data_type, "problem_type": problem_type,
        "solution": "<answer>3</answer>", "path": path, "data_source": source, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "good.mp4", 50)
    write_video(folder / "other.mp4", 25)
    write_video(folder / "still.mp4", 1)
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(folder / "good.png")
    (folder / "text.mp4").write_text("no video\n" * 50)
    return folder


def manifest(folder: Path, rows: list[dict], name: str) -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


ROWS = [
    row(1, "good.mp4"), row(2, "good.mp4", "numerical"), row(3, "good.mp4", start=0.0, end=1.0),
    row(4, "good.png", "OCR", source="lab/b"), row(5, "missing.mp4"), row(6, "text.mp4", "OCR"),
    row(7, "text.mp4"), row(8, "still.mp4"), row(9, "other.mp4", source=""),
]  # fmt: skip


def test_every_file_is_opened_once_and_each_question_of_a_bad_one_is_named(media, monkeypatch):
    from video_r1.data.decoding import decoders

    opened = []

    def noted(sample, *arguments, **named):
        opened.append((Path(sample.path).name, sample.start))
        return original(sample, *arguments, **named)

    original = decoders.read_media
    monkeypatch.setattr(decoders, "read_media", noted)
    result = check_media(load_manifest(manifest(media, ROWS, "m.json")), SMALL, 3)
    names = ["good.mp4", "good.mp4", "good.png", "missing.mp4", "other.mp4", "still.mp4", "text.mp4"]
    assert sorted(name for name, _ in opened) == names
    assert result.files == 7
    reasons = ["no such file", "not a video that FFmpeg", "not a video that FFmpeg", "has 1 frame"]
    assert [(p.row, p.problem_id) for p in result.problems] == [(5, 5), (6, 6), (7, 7), (8, 8)]
    assert all(reason in p.text for reason, p in zip(reasons, result.problems, strict=True))
    assert Counter((sample.problem_type, sample.data_type) for sample in result.usable) == {
        ("free-form", "video"): 3, ("numerical", "video"): 1, ("OCR", "image"): 1,
    }  # fmt: skip
    assert result.video_seconds == pytest.approx(2 + 1 + 1)


def test_the_command_prints_all_problems_and_counts(media, capsys):
    bad_row = row(1, "/abs.mp4", "regression") | {"solution": "<answer>nan</answer>"}
    assert run_check(manifest(media, [bad_row, *ROWS], "bad.json"), workers=2) == 1
    out = capsys.readouterr().out
    assert "row 1 (id 1): path '/abs.mp4' is absolute" in out
    assert "row 1 (id 1): the solution of a regression problem must be a finite number" in out
    assert "row 2 (id 1): problem_id is used before, in row 1" in out
    assert f"row 6 (id 5): {media.resolve() / 'missing.mp4'}: there is no such file" in out
    assert "row 9 (id 8): " in out
    assert "6 media files or windows opened" not in out and "7 media files or windows opened" in out
    assert "usable questions: 4; rows with problems: 2; questions with unusable media: 4" in out


def test_what_a_row_says_about_its_clip_is_inside_of_it(media, capsys):
    """good.mp4 has two seconds."""
    pictures = [Image.fromarray(np.full((56, 56, 3), level, np.uint8)) for level in (0, 100, 200)]
    for name in ("moves.webp", "moves.png"):
        pictures[0].save(media / name, save_all=True, append_images=pictures[1:])
    pictures[0].save(media / "pages.tiff", save_all=True, append_images=pictures[1:])
    spans = [(0, 1.5), (1, 2.9), (1, 3.5), (2, 2.5)]
    rows = [
        row(n, "good.mp4", "temporal grounding")
        | {"solution": f'<answer>{{"time": [{start}, {end}]}}</answer>'}
        for n, (start, end) in enumerate(spans)
    ]
    rows += [row(10, "moves.webp") | {"data_type": "image"}, row(11, "moves.png")]
    rows += [row(12, "pages.tiff") | {"data_type": "image"}]
    assert run_check(manifest(media, rows, "spans.json"), workers=2) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    assert [line.split(": ")[0] for line in found] == [
        f"row {n}" for n in ("3 (id 2)", "4 (id 3)", "5 (id 10)", "6 (id 11)")
    ]
    assert found[0].endswith("the solution goes from 1 s to 3.5 s; the clip has 2.0 s")
    assert all(
        "is an animation of 3 frames, of which an image shows only the first" in line for line in found[2:]
    )


def test_the_command_without_media(media, capsys):
    assert run_check(manifest(media, ROWS, "m2.json"), media=False) == 0
    out = capsys.readouterr().out
    assert "usable questions: 9; rows with problems: 0\n" in out
    assert "opened" not in out


def test_the_tables_of_counts(media):
    samples = [
        Sample(
            n,
            "q",
            "video" if n % 3 else "image",
            "OCR" if n % 2 else "numerical",
            "",
            "p",
            data_source=source,
        )
        for n, source in enumerate(["lab/a"] * 1500 + ["web"] * 4 + [""])
    ]
    assert format_counts(samples) == (
        "problem type  image  video    all\n"
        "numerical       251    502    753\n"
        "OCR             251    501    752\n"
        "all             502  1,003  1,505\n"
        "\n"
        "source       image  video    all\n"
        "lab/a          500  1,000  1,500\n"
        "web              2      2      4\n"
        "(no source)      0      1      1\n"
        "all            502  1,003  1,505"
    )


def test_one_letter_that_is_right_too_often_is_warned_of():
    """8 of 11 with three options: "A" is more than a guess. 4 of 4 with two may be chance."""
    letters = [(3, "A")] * 8 + [(3, "B")] * 3 + [(2, "B")] * 4 + [(4, letter) for letter in "ABCD" * 9]
    samples = [
        Sample(n, "q", "video", "multiple choice", f"<answer>{letter}</answer>", "p", tuple("ABCD"[:count]))
        for n, (count, letter) in enumerate(letters)
    ]
    assert [line for line in format_counts(samples).splitlines() if "warning" in line] == [
        "warning: 73 % of the 11 questions with 3 options have the answer A (a guess: 33 %): "
        "a model can learn to say A without looking; rl --shuffle_options true varies its position"
    ]


# --- progress --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_every_ten_seconds_with_rate_and_time_left(clock, capsys):
    with Progress(100, "reading", "files") as bar:
        for _ in range(100):
            clock[0] += 1.0
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 + 1
    assert lines[0] == "reading: 10/100, 1.00 files/s, 1:30 left"
    assert lines[-1] == "reading: 100/100, 1.00 files/s, 1:40 taken"
