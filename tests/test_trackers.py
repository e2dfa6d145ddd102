"""Runs with real trackers, read with the trackers' readers: series, run name, settings, lost trackers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from resume_runs import write_recipe
from tiny_questions import read_lines

from video_r1.cli import main
from video_r1.training import callbacks

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


# ---- TensorBoard


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


# ---- wandb


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """wandb without a network, all of its files in one folder."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    callbacks.warn_once.cache_clear()
    yield tmp_path / "wandb"
    wandb.teardown()


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of the one run below `folder`, as `wandb leet inspect` prints them."""
    (file,) = folder.rglob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    return [json.loads(line) for line in printed.splitlines()]


def test_wandb(recipe: Path, tmp_path: Path, wandb_folder: Path) -> None:
    import wandb

    assert main(["rl", str(recipe), "--report_to", "wandb"]) == 0
    wandb.finish()
    records = wandb_records(wandb_folder)
    tracked: dict[int, dict[str, float]] = {}
    for record in records:
        if record["type"] == "history":
            series = history_of(record)
            tracked.setdefault(int(series["train/global_step"]), {}).update(series)
    same_series(tracked, tmp_path / "run")
    (name,) = {record["run"]["display_name"] for record in records if record["type"] == "run"}
    assert name == "run"
    told = {k: v for record in records if record["type"] == "config" for k, v in config_of(record).items()}
    assert SETTINGS.items() <= told.items()


def history_of(record: dict[str, Any]) -> dict[str, float]:
    return record["history"]["item"]


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    return record["config"]["update"]


# ---- trackio
