"""The scripts of examples/, each run on a model and data of a few kilobytes."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from judge_endpoint import JudgeEndpoint
from tiny_questions import read_lines, training_arguments

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"num_generations": 4, "max_completion_length": 8, "length_reward": 0.0, "preflight_questions": 0}


def run(name: str, *words: Any, **settings: Any) -> Any:
    """Its `main`, with these words as on the command line."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*map(str, words), **settings)


def small(out: Path, **changes: Any) -> dict[str, Any]:
    settings = training_arguments(out, **{"max_steps": 2, **SMALL, **changes})
    return {name: value for name, value in settings.items() if name != "output_dir"}


def test_own_reward(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    run("own_reward", checkpoint, manifest, tmp_path, **small(tmp_path))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert any("reward/tells_an_order" in line for line in lines)
    assert not any("reward/tells_an_order/image" in line for line in lines)


@pytest.mark.slow
def test_own_data(
    checkpoint: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for number, name in enumerate(["left-0", "right-1", "left-2"]):
        shutil.copy(manifest.parent / f"{number}.mp4", clips / f"{name}.mp4")
    run("own_data", checkpoint, clips, tmp_path / "run", **small(tmp_path, per_device_train_batch_size=2))
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2 + 1  # and the validation
    assert "eval_accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_lora(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    run("lora", checkpoint, manifest, tmp_path / "run", tmp_path / "merged", **small(tmp_path))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_judge(checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("video_r1.rewards.judge.extract_answer", str.strip)  # random weights give none
    monkeypatch.setattr("judge_endpoint.GIVEN", re.compile(r"Given answer: (.*)\nDoes", re.DOTALL))
    endpoint = JudgeEndpoint()
    try:
        run("judge", checkpoint, manifest, tmp_path, endpoint.url, **small(tmp_path, max_steps=3))
    finally:
        endpoint.close()
    together = {name for line in read_lines(tmp_path / "metrics.jsonl") for name in line}
    assert "reward/judge/free-form" in together and "reward/judge/numerical" not in together
    asked = [request["messages"][0]["content"] for request in endpoint.requests]
    assert len(set(asked)) == len(asked) > 1  # each once
    assert all("Right answer: the square moves right" in text for text in asked[1:])
    assert all(request["chat_template_kwargs"] for request in endpoint.requests)


def test_evaluate_any(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    settings = {"frame_pixels": 56 * 56, "image_pixels": 56 * 84, "max_new_tokens": 8}
    found = run("evaluate_any", checkpoint, manifest, tmp_path, **settings)
    assert list(found) == ["ordered", "shuffled", "reversed", "blind"]
    assert all(0 <= accuracy <= 1 for accuracy in found.values())


def test_plain_loop(checkpoint: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps on the packaged model and synthetic clips; one on a manifest."""
    run("plain_loop")
    run("plain_loop", checkpoint, manifest, steps=1, questions=2)
    lines = re.findall(r"^step (\d): mean reward \d\.\d+ of (\d)", capsys.readouterr().out, re.MULTILINE)
    assert lines == [("1", "4"), ("2", "4"), ("3", "4"), ("1", "2")]
