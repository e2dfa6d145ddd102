"""A run with a real tracker, read with the tracker's reader: series, run name and settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from resume_runs import write_recipe
from tiny_questions import read_lines

from video_r1.cli import main

STEPS = 2
pytestmark = pytest.mark.slow  # whole runs with real trackers


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two steps of T-GRPO with adapters and a validation after the second."""
    return write_recipe(
        tmp_path, max_steps=STEPS, use_peft=True, lora_r=3, eval_strategy="steps", eval_steps=2,
        eval_manifest=str(tmp_path / "manifest.json"),
    )  # fmt: skip


def expected_series(run: Path) -> dict[int, dict[str, float]]:
    """Step to the series that a tracker has to have, from metrics.jsonl."""
    found: dict[int, dict[str, float]] = {}
    for line in read_lines(run / "metrics.jsonl"):
        for name, value in line.items():
            if name not in ("step", "epoch", "time"):
                tracked = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                found.setdefault(line["step"], {})[tracked] = value
    assert {"train/loss", "train/reward/accuracy", "train/temporal/gap"} <= found[1].keys()
    assert {"eval/accuracy", "eval/temporal_gap", "train/policy/kl"} <= found[STEPS].keys()
    return found


def same_series(tracked: dict[int, dict[str, float]], run: Path) -> None:
    for step, series in expected_series(run).items():
        assert series == pytest.approx({name: tracked[step].get(name) for name in series}, rel=1e-6), step


SETTINGS = {"lora_r": 3, "num_generations": 4, "use_peft": True, "learning_rate": 1e-3, "run_name": "run"}
"""Some of a run's settings: of this package's training, of the model, and of TrainingArguments."""


def test_tensorboard(recipe: Path, tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    assert main(["rl", str(recipe), "--report_to", "tensorboard"]) == 0
    (folder,) = (run / "runs").iterdir()  # where TensorBoard looks for it: tensorboard --logdir runs
    events = reading.EventAccumulator(str(folder)).Reload()
    tracked: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for scalar in events.Scalars(name):
            tracked.setdefault(scalar.step, {})[name] = scalar.value
    same_series(tracked, run)
    told = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert SETTINGS.items() <= told.items()
