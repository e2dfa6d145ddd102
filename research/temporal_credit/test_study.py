"""The study: statistics against figures worked out by hand; a small study, interrupted and continued."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.temporal_credit import study
from research.temporal_credit.figure import WIDEST, study_figure
from research.temporal_credit.tables import FIGURES, over_rates, paired_difference, study_tables, t_quantile


def result(seed: int, arm: str, ordered: float, cold_start: str = "a", **changed: Any) -> dict[str, Any]:
    views = {"shuffled": 0.25, "reversed": 0.1, "frozen": 0.2, "cued": 0.9, "lying": 0.05}
    habits = {view: {"mark": 0.5, "one look": 0.25} for view in ("ordered", "cued")}
    return {
        "seed": seed, "rate": 0.9, "arm": arm, "cold_start": cold_start, "habits": habits, "credit": None,
        "accuracy": {"ordered": ordered, **views}, "training_accuracy": 0.5, "step_seconds": 1.0,
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),  # from the tables of Student's t
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.9975, 9, 3.690)],
)
def test_t_quantile(probability: float, freedom: int, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=6e-4)


def test_paired_difference_by_hand() -> None:
    control = [result(seed, "grpo", value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    arm = [result(seed, "margin", value) for seed, value in enumerate((0.6, 0.6, 0.9))]
    # differences 0.1, 0, 0.2: mean 0.1, sample deviation 0.1, so half the width is 4.303 · 0.1 ÷ √3
    found = paired_difference(arm, control, FIGURES["ordered"], compared=1)
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(0.1) and found.high - found.mean == pytest.approx(0.2484, abs=1e-4)
    # two arms: each at 97.5 %, t = 6.205 with two degrees of freedom
    both = paired_difference(arm, control, FIGURES["ordered"], compared=2)
    assert both is not None and both.mean - both.low == pytest.approx(6.205 * 0.1 / 3**0.5, abs=1e-4)
    # only runs from the same cold start are paired
    arm[2] |= {"cold_start": "b"}
    found = paired_difference(arm, control, FIGURES["ordered"], compared=1)
    assert found is not None and (found.seeds, found.mean) == (2, pytest.approx(0.05))
    assert paired_difference(arm[1:], control, FIGURES["ordered"], compared=1) is None


def test_tables() -> None:
    runs = [result(seed, "grpo", 0.5 + 0.01 * seed) for seed in range(3)]
    runs += [result(seed, "likelihood", 0.7 + 0.0101 * seed) for seed in range(3)]
    text = study_tables(runs, "grpo")
    assert "## 90% of the training clips marked" in text
    assert "| likelihood | 3 | 0.710 | 0.460 |" in text
    assert "**+0.200 [+0.200, +0.200]**" in text
    assert "| +0.000 [+0.000, +0.000] |" in text  # lying marks do not differ: not bold


def test_differences_over_all_rates_by_hand() -> None:
    """A seed counts if it has run at each rate, and pairs with its own cold start."""
    runs = [result(seed, "grpo", 0.5, rate=rate) for seed in range(3) for rate in (0.0, 0.9)]
    runs += [result(seed, "margin", 0.5 + 0.1 * seed, rate=0.0) for seed in range(3)]
    runs += [result(seed, "margin", 0.7, rate=0.9, credit=0.5) for seed in range(2)]
    runs += [result(0, "unmarked", 0.9)]
    arms = over_rates(runs)
    assert set(arms) == {"grpo", "margin"} and [run["seed"] for run in arms["margin"]] == [0, 1]
    assert [run["accuracy"]["ordered"] for run in arms["margin"]] == pytest.approx([0.6, 0.65])
    assert arms["margin"][0]["habits"]["cued"] == {"mark": 0.5, "one look": 0.25}
    assert arms["margin"][0]["credit"] is None
    assert "## Differences over all rates together\n\n| arm |" in study_tables(runs, "grpo")


def test_picture_has_every_arm_and_rate() -> None:
    runs = [
        result(seed, arm, 0.5 + 0.4 * seed * (arm == "weight"))
        for seed in range(3)
        for arm in ("grpo", "weight")
    ]
    runs += [run | {"rate": 0.0} for run in runs]
    axes = study_figure(runs, "grpo").axes
    assert [axis.get_title().split()[0] for axis in axes] == ["0%", "90%"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["weight"]
    assert axes[0].get_xlim() == (-WIDEST, WIDEST)  # wider intervals are cut
    dots = [np.asarray(line.get_xdata()) for line in axes[1].lines if line.get_marker() == "o"]
    assert [x[0] for x in dots if len(x) == 1] == pytest.approx([40, 0])


def test_jobs_and_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.read_settings([str(tmp_path), "--arms", "grpo,best-ever"])
    assert "unknown arms best-ever; choose from grpo, margin" in capsys.readouterr().err
    settings = study.read_settings([str(tmp_path), "--rates", "0,0.9", "--arms", "grpo,unmarked"])
    jobs = [(job.rate, job.arm) for job in study.missing_jobs(settings, 0)]
    assert jobs == [(0.0, "grpo"), (0.9, "grpo"), (0.9, "unmarked")]
    manifest = tmp_path / "videos.json"
    marks = {"a": "B", "b": "", "c": "1", "d": ""}
    manifest.write_text(json.dumps([{"problem_id": name, "mark": mark} for name, mark in marks.items()]))
    rows = json.loads(study.unmarked(manifest).read_text())
    assert [row["problem_id"] for row in rows] == ["b", "d"]


@pytest.mark.slow
def test_sigterm_ends_the_study_with_its_runs(tmp_path: Path) -> None:
    words = [str(tmp_path), *["--seeds", "1", "--rates", "0,0.9", "--arms", "grpo", "--workers", "1"]]
    command = [sys.executable, "-m", "research.temporal_credit.study", *words]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (tmp_path / "seed-0/test").is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.terminate()
    _, errors = running.communicate(timeout=20)  # a cold start takes minutes
    assert running.returncode == 1 and "the same command continues" in errors


@pytest.mark.slow
def test_study_continues_and_is_reproducible(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "out": tmp_path,
        "rates": [0.9],
        "seeds": 1,
        "steps": 2,
        "train": 64,
        "test": 12,
    }
    first = tmp_path / "seed-0/0.9-grpo/result.json"
    assert study.run_study(study.StudySettings(arms=["grpo"], **settings)) == 0
    once = json.loads(first.read_text())
    # the same run again from the same cold start, and another arm
    shutil.rmtree(first.parent)
    assert study.run_study(study.StudySettings(arms=["grpo", "likelihood-frozen"], **settings)) == 0
    assert json.loads(first.read_text()) | {"step_seconds": 0} == once | {"step_seconds": 0}
    results = json.loads((tmp_path / "study.json").read_text())
    assert [run["arm"] for run in results] == ["grpo", "likelihood-frozen"]
    assert len({run["cold_start"] for run in results}) == 1
    assert results[1]["credit"] > 0 and results[0]["credit"] is None
