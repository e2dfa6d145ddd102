"""Benchmarks in one run with the small model: figures, the comparison with the paper, the temporal gap."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import lab_clips, write_benchmarks

from video_r1.cli import main
from video_r1.data.decoding.decoders import read_media_at
from video_r1.evaluation.paper import (
    compare_with_paper,
    comparison_table,
    setup_differences,
)
from video_r1.report.page import page_data
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import CONTROLS

SMALL = shlex.split(
    "--fps 2 --max_frames 8 --frame_pixels 3136 --image_pixels 3136 --dtype float32 --max_new_tokens 4 "
    "--media_seconds 0 --device cpu --batch_size 4"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, lab_clips(tmp_path_factory.mktemp("lab")))
    return folder


def command(root: Path, out: Path, *more: str) -> list[str]:
    return ["eval", "lab-base", "--media_root", str(root), "--out", str(out), *SMALL, *more]


def predictions(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("predictions-*.jsonl"))
    }


def test_all_controls_in_one_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every benchmark; a clip is decoded once, whatever is asked about it."""
    decoded: list[str] = []

    def counted(sample: Any, *arguments: Any) -> Any:
        decoded.append(sample.path)
        return read_media_at(sample, *arguments)

    monkeypatch.setattr("video_r1.data.reading.read_media_at", counted)
    run = command(root, tmp_path, "--bench", "mvbench,tempcompass", "--controls", "--allow_missing")
    assert main(run) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    for name, number in {"mvbench": 5, "tempcompass": 4}.items():
        figures = summary[name]["frames"]["8"]
        assert {order: figures[order]["questions"] for order in CONTROLS} == dict.fromkeys(CONTROLS, number)
        assert set(figures["temporal_gaps"]) == set(CONTROLS) - {"ordered", "shuffled"}
    assert len(decoded) <= 9  # neighbouring questions share a clip
    for row in page_data(tmp_path)["scores"]:
        assert set(row["orders"]) == set(CONTROLS) and set(row["gaps"]) == set(CONTROLS) - {"ordered"}


def test_direct_and_reasoned_answers_in_one_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are asked of every benchmark in every order, and continue a run that asked for one of them."""
    wanted = ["--bench", "vsibench,tempcompass", "--temporal_gap"]
    assert main(command(root, tmp_path, *wanted)) == 2
    refused = capsys.readouterr().err
    assert "VSI-Bench" in refused and "TempCompass" in refused  # the problems of all benchmarks at once
    wanted += ["--allow_missing"]
    assert main(command(root, tmp_path, *wanted)) == 0
    before, printed = predictions(tmp_path), capsys.readouterr().out
    assert "VSI-Bench, mean over task types (part)" in printed and "direct answers" not in printed
    assert "VSI-Bench: 6 of 5,130 questions" in page_data(tmp_path)["notes"]
    assert main(command(root, tmp_path, *wanted, "--answer", "direct,reasoned")) == 0
    assert predictions(tmp_path) == before
    printed = capsys.readouterr().out
    assert "ordered, with reasoning − direct: accuracy" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    for name, number in {"vsibench": 6, "tempcompass": 4}.items():
        gains = summary[name]["frames"]["8"]["reasoning_gains"]
        assert {order: gain["questions"] for order, gain in gains.items()} == {
            "ordered": number,
            "shuffled": number,
        }
    assert main(command(root, tmp_path, *wanted, "--answer", "direct")) == 0
    assert "VSI-Bench, mean over questions, direct answers (part)" in capsys.readouterr().out


def figure(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"accuracy": mean, "interval95": [low, high], "questions": 100}


def test_the_paper_beside_our_figures() -> None:
    ordered = figure(0.642, 0.61, 0.67)
    vsi = figure(0.35, 0.33, 0.37) | {f"{of}_mean": figure(0.30, 0.28, 0.32) for of in ("task", "kind")}
    vsi["kind_mean"] = figure(0.36, 0.33, 0.38)
    results = {
        "mmvu": {
            "frames": {"16": {"ordered": ordered}, "32": {"ordered": ordered}, "8": {"ordered": ordered}}
        },
        "vsibench": {"frames": {"64": {"ordered": vsi}, "16": {"shuffled": vsi}, "32": {"ordered": ordered}}},
        "videoholmes": {"frames": {"16": {"ordered": ordered}}},
    }
    found = compare_with_paper(results)
    at = {(each.benchmark, each.frames, each.model): each for each in found}
    assert len(at) == len(found) == 6 + 3 + 3  # all six rows at 16 frames, three at 32 and 64
    same = at["mmvu", 16, "Video-R1-7B"]
    assert (same.published, same.ours) == (64.2, pytest.approx(64.2))
    assert (same.difference, same.low, same.high) == pytest.approx((0.0, -3.2, 2.8))
    assert not same.outside
    base = at["mmvu", 16, "Qwen2.5-VL-7B, CoT prompt"]
    assert (base.difference, base.low, base.high) == pytest.approx((5.0, 1.8, 7.8))
    assert base.outside
    ours = at["vsibench", 64, "Video-R1-7B"]  # neither its mean over questions nor that over task types
    assert (ours.difference, ours.low, ours.high) == pytest.approx((-1.1, 33 - 37.1, 38 - 37.1))
    text = comparison_table(found, {"mmvu": "MMVU (mc)"})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "MMVU (mc), 16 frames: Qwen2.5-VL-7B, CoT prompt 64.2 59.2 +5.0 [+1.8, +7.8] *" in lines
    assert "MMVU (mc), 16 frames: Video-R1-7B 64.2 64.2 +0.0 [-3.2, +2.8]" in lines
    assert "vsibench, 64 frames: Video-R1-7B 36.0 37.1 -1.1 [-4.1, +0.9]" in lines
    assert "vsibench: mean of the accuracy of choices and the MRA of numbers" in lines
    assert "no figures" in comparison_table(compare_with_paper({"videoholmes": results["videoholmes"]}), {})


def test_what_differs_from_the_papers_setup() -> None:
    (own,) = setup_differences(EvalSettings())
    assert "prompt and scores are this project's own" in own
    settings = EvalSettings(temperature=1.0, frame_pixels=3136, answer=["direct"], protocol="reference")
    *numbers, direct = setup_differences(settings)
    assert "temperature is 1 here and 0.1 there" in numbers and "answers are direct" in direct
    assert "frame_pixels is 3136 here and 200704 there" in numbers
