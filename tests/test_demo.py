"""The demo with a few questions and steps; and what it says when a stage fails."""

import json
from pathlib import Path

import pytest
import torch

from video_r1.cli import main
from video_r1.errors import VideoR1Error
from video_r1.lab import demo
from video_r1.recipe import load_recipe


@pytest.mark.slow
def test_a_tiny_demo_goes_through_all_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "QUICK", demo.Size(train=40, test=12, sft=4, rl=2))
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    printed, errors = capfd.readouterr()
    assert [line for line in printed.splitlines() if line.startswith("== ")] == [
        "== lab", "== sft", "== grpo", "== tgrpo", "== eval-sft", "== eval-grpo", "== eval-tgrpo",
        "== eval-sft-lying", "== eval-grpo-lying", "== eval-tgrpo-lying",
    ]  # fmt: skip
    assert "it learns nothing" in printed and "Traceback" not in errors
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"sft", "grpo", "tgrpo"} and (tmp_path / "report.html").is_file()
    assert set(summary["accuracy"]["tgrpo"]) == {"ordered", "shuffled", "lying"}
    for run, scored in (("grpo", False), ("tgrpo", True)):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, demo.QUICK.rl + 1))
        assert any("temporal/drop" in line for line in steps) == scored, run


@pytest.mark.slow
def test_a_stage_that_fails_says_why_and_ends_the_demo(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VideoR1Error, match="sft: training failed; its error is printed above"):
        demo.train_stage("sft", 1, train_manifest=tmp_path / "missing.json", output_dir=tmp_path / "run")
    said = capfd.readouterr().err
    assert "missing.json" in said and "Traceback" not in said


def test_the_demo_trains_on_the_cpu_beside_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two processes cannot share one GPU. What starts them is a stand-in: there is no GPU here."""
    from torch.distributed.launcher import api

    asked: list[dict[str, str]] = []
    monkeypatch.setattr(
        api, "elastic_launch", lambda config, work: lambda command, texts: asked.append(texts)
    )
    demo.train_stage("rl", 3, output_dir=tmp_path)
    (texts,) = asked
    recipe = load_recipe("rl", "lab-tgrpo", texts)
    assert recipe.values()["use_cpu"] is True and recipe.values()["max_steps"] == 3
