"""Bad rows of a manifest: a run refuses it, or skips, counts and lists them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_questions import read_lines, training_arguments

from video_r1.cli import main


def test_a_run_without_its_bad_rows(
    checkpoint: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight good rows, a repeated id, a missing field and an id of the wrong type."""
    rows = json.loads(manifest.read_text())
    more = [rows[0], rows[1] | {"problem_id": "x", "solution": None}, rows[2] | {"problem_id": 3.5}]
    damaged = manifest.with_name("damaged.json")
    damaged.write_text(json.dumps([*rows, *more]))
    settings = training_arguments(tmp_path / "run", max_steps=1, num_generations=2, max_completion_length=4)
    settings |= {"preflight_questions": 0, "length_reward": 0.0, "model_name_or_path": str(checkpoint)}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings | {"train_manifest": str(damaged)}))
    assert main(["rl", str(recipe)]) == 2 and "3 problems" in capsys.readouterr().err
    assert main(["rl", str(recipe), "--bad_rows", "leave_out"]) == 0
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert "row 9 (id 0): problem_id is used before, in row 1" in capsys.readouterr().err
