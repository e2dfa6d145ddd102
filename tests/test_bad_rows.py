"""Rows that are no question: a manifest is refused, or they are counted, listed and left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_questions import read_lines, training_arguments

from video_r1.cli import main
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import ManifestError


@pytest.fixture
def damaged(manifest: Path) -> Path:
    """Eight good rows, a repeated id and two that lack a field."""
    rows = json.loads(manifest.read_text())
    more = [rows[0], rows[1] | {"problem_id": "x", "solution": None}, rows[2] | {"problem_id": 3.5}]
    path = manifest.with_name("damaged.json")
    path.write_text(json.dumps([*rows, *more]))
    return path


def test_bad_rows_are_left_out_and_listed(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ManifestError, match="3 problems"):
        load_manifest(damaged)
    samples = load_manifest(damaged, bad_rows="leave_out")
    assert [sample.problem_id for sample in samples] == list(range(8))
    said = capsys.readouterr().err
    assert "3 bad rows are left out, 8 are used" in said
    assert "row 9 (id 0): problem_id is used before, in row 1" in said
    assert "row 10 (id x): solution is missing" in said


def test_a_manifest_without_a_good_row_is_refused(damaged: Path) -> None:
    damaged.write_text(json.dumps(json.loads(damaged.read_text())[-2:]))
    with pytest.raises(ManifestError, match="solution is missing"):
        load_manifest(damaged, bad_rows="leave_out")


def test_a_run_without_its_bad_rows(checkpoint: Path, damaged: Path, tmp_path: Path) -> None:
    settings = training_arguments(tmp_path / "run", max_steps=1, num_generations=2, max_completion_length=4)
    settings |= {"preflight_questions": 0, "length_reward": 0.0, "model_name_or_path": str(checkpoint)}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings | {"train_manifest": str(damaged)}))
    assert main(["rl", str(recipe)]) == 2
    assert main(["rl", str(recipe), "--bad_rows", "leave_out"]) == 0
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1
