"""SFT of the packaged base, annotation by the result, and SFT on the annotation.

The teacher runs in this process, and behind a real `vllm serve` on loopback.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_endpoint
import pytest
import torch
from chat_endpoint import SMALL, write_questions
from server_process import ServerProcess

from video_r1.annotation.annotate import Counts
from video_r1.cli import main
from video_r1.data import reading
from video_r1.data.decoding.decoders import read_media, read_media_at
from video_r1.data.manifests.records import load_manifest
from video_r1.data.prompts import PromptBuilder
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_processor
from video_r1.processes import Interrupted
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.frames import FrameBudget

SIZES: dict[str, Any] = {**SMALL, "media_seconds": 60.0, "max_prompt_length": 512}
PROCESS = "<think>places: left, right. it goes right. right is B.</think>"
FILES = ("cot.json", "cot.rejected.jsonl")


def words(**settings: Any) -> list[str]:
    return [word for name, value in {**SIZES, **settings}.items() for word in (f"--{name}", str(value))]


def sft(model: Path, manifest: Path, out: Path, steps: int, **settings: Any) -> int:
    learning = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "weight_decay": 0, "max_grad_norm": 1}
    size = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "max_steps": steps}
    numbers = {"dtype": "float32", "bf16": "false", "use_cpu": "true"}
    places = {"model_name_or_path": model, "train_manifest": manifest, "output_dir": out}
    return main(["sft", *words(**places, **learning, **size, **numbers, **settings)])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base after so much SFT on three questions that it knows them by heart."""
    folder = tmp_path_factory.mktemp("teacher")
    manifest = write_questions(folder, 3, clips=2)
    manifest.write_text(json.dumps([{**row, "process": PROCESS} for row in json.loads(manifest.read_text())]))
    assert sft(base_folder(), manifest, folder / "sft", steps=40) == 0
    return folder / "sft"


def annotate(teacher: Path | str, manifest: Path, out: Path, **changes: Any) -> Counts:
    drawn = {
        "samples": 3,
        "length_range": [3, 100],
        "dtype": "float32",
        "batch_size": 2,
        "max_new_tokens": 64,
    }
    return chat_endpoint.annotate(str(teacher), manifest, out, **SIZES, **drawn, **changes)


@pytest.mark.slow
def test_a_checkpoint_annotates_and_sft_takes_the_result_as_it_is(teacher: Path, tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 5, clips=2, bad=(4,))
    out = tmp_path / "cot.json"
    counts = annotate(teacher, manifest, out)
    assert counts.questions == {"kept": 4, "media": 1}
    assert counts.rationales.total() == 12
    samples = load_manifest(out)
    assert [sample.problem_id for sample in samples] == ["q0", "q1", "q2", "q3"]
    assert {sample.process for sample in samples} == {PROCESS}
    assert sft(base_folder(), out, tmp_path / "student", steps=1) == 0
    assert (tmp_path / "student" / "metrics.jsonl").stat().st_size > 0


@pytest.mark.slow
def test_interrupted_between_and_within_batches(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final files are those of an uninterrupted run, and no more is decoded than the next batch."""
    manifest = write_questions(tmp_path, 7, clips=3, bad=(5,))
    annotate(teacher, manifest, tmp_path / "whole" / "cot.json", temperature=1.3, top_p=1.0)
    expected = [(tmp_path / "whole" / name).read_bytes() for name in FILES]

    read: list[str] = []
    sample, calls = TransformersEngine.sample, []
    monkeypatch.setattr(
        reading, "read_media_at", lambda sample, *how: read.append("") or read_media_at(sample, *how)
    )

    def interrupted(self: Any, prompts: Any, *arguments: Any) -> Any:
        calls.append(len(prompts))
        assert len(read) <= 2 * (len(calls) + 1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, prompts, *arguments)

    out = tmp_path / "cot" / "cot.json"
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="the answers so far are in"):
        patch.setattr(TransformersEngine, "sample", interrupted)
        annotate(teacher, manifest, out, temperature=1.3, top_p=1.0)
    assert not out.exists()
    journal = out.with_name("cot.journal.jsonl")
    assert journal.read_bytes().count(b"\n") == 1 + 4
    journal.write_bytes(journal.read_bytes()[:-9])  # as if it was killed while it wrote
    annotate(teacher, manifest, out, temperature=1.3, top_p=1.0)
    assert [(tmp_path / "cot" / name).read_bytes() for name in FILES] == expected


@pytest.fixture(scope="module")
def server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path_factory.mktemp("server"))
    process.command = [str(teacher) if word == str(base_folder()) else word for word in process.command]
    process.command.append("--trust-request-mm-kwargs")
    process.start()
    try:
        process.wait()
        yield process
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.vllm
def test_a_teacher_on_vllm(server: ServerProcess, teacher: Path, tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 4, clips=2)
    for path in server.recorded.iterdir():
        path.unlink()
    counts = annotate(server.url, manifest, tmp_path / "cot.json", frames_as="video", temperature=0.3)
    assert counts.rationales.total() == 12 and counts.questions.total() == 4
    assert counts.questions == {"kept": 4}
    assert {sample.process for sample in load_manifest(tmp_path / "cot.json")} == {PROCESS}

    clip = load_manifest(manifest)[0]
    prompt = PromptBuilder(load_processor(teacher)).build(
        clip, read_media(clip, FrameBudget(max_frames=4, frame_pixels=3136))
    )
    given = [torch.load(path) for path in server.recorded.glob("*.pt")]
    (video,) = [call for call in given if "pixel_values_videos" in call][:1]
    for name in ("video_grid_thw", "second_per_grid_ts"):  # the same frames, at the same rate
        assert torch.allclose(video[name][:1].float(), prompt.features[name].float()), name
    expected = prompt.features["pixel_values_videos"]
    difference = (video["pixel_values_videos"][: len(expected)].float() - expected).abs().mean()
    assert difference < 0.05  # standard deviations of a pixel: JPEG
