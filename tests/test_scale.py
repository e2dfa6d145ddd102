"""The flow model of a large run: it agrees with the simulation, and docs/scale.md has its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale import (
    Fleet,
    bottleneck,
    costs_table,
    figures,
    fleets_table,
    flow_of,
    simulate,
    step_seconds,
)

ROOT = Path(__file__).parents[1]
# What the bottleneck is of, and what makes it that.
CASES = {
    "sample": Fleet(gpus=64, samplers=8),
    "update": Fleet(gpus=64, samplers=48),
    "media": Fleet(gpus=64, samplers=32, decode_ms=12_000),
    "hand-over": Fleet(gpus=16, samplers=8, network_gb_s=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_the_simulation_agrees_with_the_closed_form(name: str) -> None:
    flow, questions = flow_of(CASES[name]), CASES[name].questions
    expected = step_seconds(flow, questions)
    assert simulate(flow, questions, 200, spread=0.0) == pytest.approx(expected, rel=0.01)
    # Slow clips hold up a step where reading is the bottleneck and no step is ready in advance.
    assert expected <= simulate(flow, questions, 200, spread=0.5) * 1.001 <= 1.08 * expected
    if name in ("sample", "update", "media"):
        assert bottleneck(flow, questions) == name


def test_figures_worked_out_by_hand() -> None:
    """Eight questions a step, four samplers and four trainers, with costs of round numbers."""
    fleet = Fleet(
        videos=8000, gpus=8, samplers=4, questions_per_gpu=1, media_threads=1, clip_mb=10, request_ms=100,
        stream_mb_s=100, decode_ms=300, weights=1e9, prompt=0, tokens=100, longest=500, ordered=1, shuffled=1,
        kv_bytes=1e5, memory_gb_s=1000, tflops=1, link_gb_s=1, disk_gb_s=1, save_steps=10,
    )  # fmt: skip
    said = figures(fleet)
    # media: 8 of 0.1 + 0.1 + 0.3 s by four. sample: 500 times 2 GB at 1 TB/s, and 2 · 100 tokens that each
    # read 50 · 1e5 bytes, for two questions. update: 3 · 2 GB at 1 GB/s for two questions (10 · 1e9 · 100
    # operations are 1 s), and 2 · 16 GB by four at 1 TB/s.
    expected = {"media": 1.0, "sample": 1.002, "update": 12.008, "hand_over": 2.0, "checkpoint": 12.0}
    assert said["stage_seconds"] == expected
    assert said["step_seconds"] == pytest.approx(14.008 + 1.2)
    assert said["bottleneck"] == "update" and said["steps"] == 1000
    assert said["epoch_days"] == pytest.approx(15208 / 86400, abs=0.005)
    assert said["read_mb_per_second"] == pytest.approx(80 / 15.208, abs=0.05)
    assert (said["clips_tb"], said["checkpoints"], said["hand_over_gb"]) == (0.08, 100, 2.0)


def test_the_document_has_the_output() -> None:
    document = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert costs_table() in document
    assert fleets_table() in document
