"""Rows with several clips or images, from the manifest through whole runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from resume_runs import comparable
from test_evaluation import ScriptedEngine, evaluate
from tgrpo_trainers import make_trainer, weights
from tiny_models import moving_square, write_clip
from tiny_questions import read_lines, row
from transformers import AutoProcessor

from video_r1.data import reading
from video_r1.data.check import check_media
from video_r1.data.decoding import frame_cache
from video_r1.data.decoding.frame_cache import FrameCache
from video_r1.data.manifests.records import check_manifest, load_manifest
from video_r1.data.prompts import PromptBuilder
from video_r1.data.reading import Batch, Reader, quarantined
from video_r1.errors import MediaError, RequestError
from video_r1.evaluation.ask import question_sample, run_ask
from video_r1.evaluation.benchmarks.loading import load_questions
from video_r1.settings.decoding import AskSettings
from video_r1.settings.frames import FrameBudget

BUDGET = FrameBudget(fps=4.0, frame_pixels=56 * 56, image_pixels=56 * 84)


def write_files(folder: Path) -> Path:
    """Three clips, of which one is wide and short, and three pictures of different sizes."""
    for number in range(3):
        pixels = moving_square(frames=8 if number else 4, height=56, width=56 if number else 112)
        write_clip(folder / f"{number}.mp4", np.roll(pixels, 5 * number, axis=0), fps=4.0)
        Image.fromarray(moving_square()[number][: 28 * (number + 1)]).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("several"))


ROWS: list[dict[str, Any]] = [
    row(0, "multiple choice", "video", "") | {"path": ["0.mp4", "1.mp4"]},
    row(1, "free-form", "video", "")
    | {"path": ["2.mp4", "1.mp4"], "problem": "As in <video>, or as in <video>?"},
    row(2, "numerical", "image", "") | {"path": ["0.png", "1.png", "2.png"]},
    row(3, "OCR", "video", "1.mp4"),
]


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps(ROWS))
    return path


# ---- The manifest


def test_a_row_names_several_files(manifest: Path, folder: Path) -> None:
    samples = load_manifest(manifest)
    names = [[Path(path).name for path in sample.paths] for sample in samples]
    assert names == [["0.mp4", "1.mp4"], ["2.mp4", "1.mp4"], ["0.png", "1.png", "2.png"], ["1.mp4"]]
    assert [Path(file.path).name for file in samples[0].files] == names[0]
    assert replace(samples[0], more_paths=samples[1].paths).files != samples[0].files
    (alone,) = load_manifest([ROWS[3] | {"path": ["1.mp4"]}], folder)  # a list of one is that one
    assert alone == samples[3]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"path": []}, r"path is \[\]; it must be a string, or a list with a string for each clip or image"),
        ({"path": ["1.mp4", 3]}, r"path is \['1.mp4', 3\]; it must be a string, or a list"),
        ({"path": ["1.mp4", "../1.mp4"]}, r"'../1.mp4' leads out of the media root"),
        ({"start": 1.0}, "start and end are a window of one clip, and path names 2 videos; cut the clips"),
        (
            {"problem_type": "temporal grounding", "solution": '<answer>{"time": [0, 1]}</answer>'},
            "a temporal grounding problem is about one video, and path names 2",
        ),
        (
            {"problem": "Which is <video>?"},
            "path names 2 videos, and its text has the mark <video> 1 times; write it once for each",
        ),
        (
            {"messages": [{"role": "user", "content": "<video><video><video>?"}]},
            "has the mark <video> 3 times",
        ),
        (
            {"messages": [{"role": "system", "content": "<video>"}, {"role": "user", "content": "<video>?"}]},
            "has the mark <video> 1 times",  # only the user's count
        ),
    ],
)
def test_what_a_manifest_refuses(folder: Path, fields: dict[str, Any], problem: str) -> None:
    given = ROWS[1] | {"problem": "Which?"} | fields
    samples, _, problems = check_manifest([given], folder)
    assert samples == [] and len(problems) == 1
    with pytest.raises(Exception, match=problem):
        load_manifest([given], folder)


def test_each_file_is_opened_and_kept_once(
    manifest: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, decoded = load_manifest(manifest), []
    real = reading.read_media_at
    for module in (reading, frame_cache):
        monkeypatch.setattr(module, "read_media_at", lambda s, *how: decoded.append(s.path) or real(s, *how))
    result = check_media(samples, BUDGET, workers=1)
    assert result.files == len(decoded) == 6 and result.problems == []
    assert result.video_seconds == pytest.approx(1 + 2 + 2)
    decoded.clear()
    with Reader(BUDGET, FrameCache(tmp_path / "cache", 1 << 30)) as reader:
        shown = [reader.media(sample) for sample in samples]
    assert [[tuple(media.frames.shape[1:]) for media in each] for each in shown[:2]] == [
        [(3, 28, 56), (3, 56, 56)], [(3, 56, 56), (3, 56, 56)],
    ]  # fmt: skip
    assert torch.equal(shown[0][1].frames, shown[3][0].frames) and len(decoded) == 6
    (folder / "bad.mp4").write_text("no clip")
    (sample,) = load_manifest([ROWS[0] | {"path": ["0.mp4", "bad.mp4"]}], folder)
    (problem,) = check_media([sample, samples[3]], BUDGET, workers=1).problems
    assert "bad.mp4" in problem.text and problem.row == 1
    with Reader(BUDGET) as reader:
        ((read,),) = reader.batches([Batch([sample])], lambda sample, media: media)
    assert isinstance(read, MediaError) and quarantined(sample, read)["path"] == str(folder / "bad.mp4")
    (folder / "gone.json").write_text(json.dumps([ROWS[0] | {"path": ["0.mp4", "gone.mp4"]}, ROWS[3]]))
    found = load_questions(str(folder / "gone.json"), None, tmp_path, allow_missing=True)
    assert [question.problem_id for question in found.samples] == [3]


# ---- Runs


@pytest.mark.slow
def test_training_records_and_resumes_exactly(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "contrast_unit": "patch"}
    settings |= {"temporal_rule": "likelihood_gate", "log_rollouts": 4, "fps": 4.0}
    whole = make_trainer(checkpoint, str(manifest), tmp_path / "whole", **settings)
    whole.train()
    half = tmp_path / "parted"
    shutil.copytree(tmp_path / "whole", half)
    resumed = make_trainer(checkpoint, str(manifest), half, **settings)
    resumed.train(resume_from_checkpoint=str(half / "checkpoint-2"))
    assert comparable(half) == comparable(tmp_path / "whole") and not (half / "quarantine.jsonl").exists()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    groups = {line["problem_id"]: line for line in read_lines(half / "rollouts.jsonl") if line["step"] == 4}
    assert groups[0]["frames"]["clips"] == [4, 8] and len(groups[0]["permutation"]) == 12
    assert sorted(groups[0]["permutation"][:4]) == [0, 1, 2, 3] and groups[0]["path"][0].endswith("0.mp4")
    assert groups[2]["frames"]["clips"] == [1, 1, 1] and groups[2]["permutation"] is None
    assert "clips" not in groups[3]["frames"] and isinstance(groups[3]["path"], str)
    assert groups[0]["contrast"] == "shuffled" and groups[0]["ordered"][0]["word_drops"]


def test_evaluation_in_several_orders(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    builder = PromptBuilder(AutoProcessor.from_pretrained(checkpoint))
    engine = ScriptedEngine(lambda prompt, count: ["A"] * count)
    samples = load_manifest(manifest)
    orders = ["ordered", "shuffled", "reversed", "single", "blind"]
    summary = evaluate(samples, engine, builder, folder=tmp_path, order=orders, frames=[4, 8])
    records = read_lines(tmp_path / "predictions-8.jsonl")
    assert [record["order"] for record in records if record["problem_id"] == 0] == orders
    assert [record["order"] for record in records if record["problem_id"] == 2] == ["ordered"]
    assert summary["frames"]["8"]["shuffled"]["questions"] == 3
    shown = {prompt.order: prompt for prompt in engine.prompts if len(prompt.media) == 2}
    assert shown["blind"].frames == 0 and shown["single"].frames == 4
    changed = [replace(samples[0], more_paths=samples[1].paths[:1]), *samples[1:]]
    with pytest.raises(RequestError, match="questions"):  # answers about other clips are not gone on with
        evaluate(changed, engine, builder, folder=tmp_path, order=orders, frames=[4, 8])


def test_ask(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [str(folder / f"{number}.mp4") for number in range(2)]
    settings = AskSettings(
        model=str(checkpoint), path=clips[0], more_paths=clips[1:], question=["Is <video> as <video>?"],
        contrast=["reversed", "blind"], frame_pixels=56 * 56, max_new_tokens=4, samples=2,
    )  # fmt: skip
    run_ask(settings)
    assert "reversed" in capsys.readouterr().out
    assert question_sample(settings, "?").paths == tuple(str(Path(clip).resolve()) for clip in clips)
    with pytest.raises(RequestError, match=r"nowhere.mp4: no such file"):
        question_sample(AskSettings(path=clips[0], more_paths=["nowhere.mp4"]), "?")
    with pytest.raises(Exception, match="more_paths is given with start or end"):
        AskSettings(path=clips[0], more_paths=clips[1:], start=1.0)
