"""The study: its statistics against figures worked out by hand; and a small one that ends and goes on."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from video_r1.cli import main
from video_r1.lab import study
from video_r1.lab.study_figure import study_svg
from video_r1.lab.study_tables import (
    FIGURES,
    over_rates,
    paired_difference,
    study_tables,
    t_quantile,
)
from video_r1.settings.commands import StudySettings


def result(seed: int, arm: str, ordered: float, cold_start: str = "a", **changed: Any) -> dict[str, Any]:
    views = {"shuffled": 0.25, "reversed": 0.1, "frozen": 0.2, "cued": 0.9, "lying": 0.05}
    habits = {view: {"mark": 0.5, "one look": 0.25} for view in ("ordered", "cued")}
    return {
        "seed": seed, "rate": 0.9, "arm": arm, "cold_start": cold_start, "habits": habits, "credit": None,
        "accuracy": {"ordered": ordered, **views}, "training_accuracy": 0.5, "step_seconds": 1.0,
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    # from the tables of Student's t
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.9975, 9, 3.690), (0.995, 5, 4.032)],
)
def test_t_quantile_is_that_of_the_tables(probability: float, freedom: int, value: float) -> None:
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


def test_only_runs_from_the_same_cold_start_are_compared() -> None:
    control = [result(seed, "grpo", 0.5) for seed in range(3)]
    arm = [result(0, "margin", 0.6), result(1, "margin", 0.7), result(2, "margin", 0.0, cold_start="b")]
    found = paired_difference(arm, control, FIGURES["ordered"], compared=1)
    assert found is not None and (found.seeds, found.mean) == (2, pytest.approx(0.15))
    assert paired_difference(arm[:1], control, FIGURES["ordered"], compared=1) is None


def test_tables_name_what_excludes_zero() -> None:
    runs = [result(seed, "grpo", 0.5 + 0.01 * seed) for seed in range(3)]
    runs += [result(seed, "likelihood", 0.7 + 0.0101 * seed) for seed in range(3)]
    text = study_tables(runs, "grpo")
    assert "## 90% of the training clips marked" in text
    assert "| likelihood | 3 | 0.710 | 0.460 |" in text
    assert "**+0.200 [+0.200, +0.200]**" in text
    assert "| +0.000 [+0.000, +0.000] |" in text  # the lying marks: no difference, not emphasised


def test_differences_over_all_rates_by_hand() -> None:
    """A seed counts where it has run at each rate, and pairs with its own cold start."""
    runs = [result(seed, "grpo", 0.5, rate=rate) for seed in range(3) for rate in (0.0, 0.9)]
    runs += [result(seed, "margin", 0.5 + 0.1 * seed, rate=0.0) for seed in range(3)]
    runs += [result(seed, "margin", 0.7, rate=0.9, credit=0.5) for seed in range(2)]
    runs += [result(0, "unmarked", 0.9)]
    arms = over_rates(runs)
    assert set(arms) == {"grpo", "margin"} and [run["seed"] for run in arms["margin"]] == [0, 1]
    assert [run["accuracy"]["ordered"] for run in arms["margin"]] == pytest.approx([0.6, 0.65])
    assert arms["margin"][0]["habits"]["cued"] == {"mark": 0.5, "one look": 0.25}
    assert arms["margin"][0]["credit"] is None
    found = paired_difference(arms["margin"], arms["grpo"], FIGURES["ordered"], compared=1)
    assert found is not None and found.mean == pytest.approx(0.125) and found.seeds == 2
    assert "## Differences over all rates together\n\n| arm |" in study_tables(runs, "grpo")


def test_the_picture_has_every_arm_and_rate() -> None:
    runs = [
        result(seed, arm, 0.5 + 0.1 * (arm == "margin")) for seed in range(3) for arm in ("grpo", "margin")
    ]
    runs += [run | {"rate": 0.0} for run in runs]
    picture = ElementTree.fromstring(study_svg(runs, "grpo"))
    texts = [element.text for element in picture.iter() if element.text]
    assert "margin" in texts and "grpo" not in texts
    assert {"0% of the training clips marked", "90% of the training clips marked"} <= set(texts)
    assert texts.count("+10.0 [+10.0, +10.0], 3 seeds") == 2
    assert texts.count("+0.0 [+0.0, +0.0], 3 seeds") == 2


def test_wide_intervals_end_at_the_pictures_edge() -> None:
    """So that those of three seeds do not make the others too small to see."""
    runs = [result(seed, "grpo", 0.5) for seed in range(3)]
    runs += [result(seed, "weight", 0.1 + 0.4 * seed) for seed in range(3)]
    text = study_svg(runs, "grpo")
    assert "+30" in text and "+60" not in text


def test_unknown_arm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "study", str(tmp_path / "study"), "--arms", "grpo,best-ever"]) == 2
    assert "best-ever is none of grpo, margin" in capsys.readouterr().err


def test_the_bound_is_trained_on_clips_without_marks(tmp_path: Path) -> None:
    manifest = tmp_path / "videos.json"
    marks = {"a": "B", "b": "", "c": "1", "d": ""}
    manifest.write_text(json.dumps([{"problem_id": name, "mark": mark} for name, mark in marks.items()]))
    rows = json.loads(study.unmarked(manifest).read_text())
    assert [row["problem_id"] for row in rows] == ["b", "d"]
    assert len(json.loads(manifest.read_text())) == 4
    settings = StudySettings(out=str(tmp_path), rates=[0.0, 0.9], arms=["grpo", "unmarked"])
    assert [(job.rate, job.arm) for job in study._missing(settings, 0)] == [
        (0.0, "grpo"), (0.9, "grpo"), (0.9, "unmarked"),
    ]  # fmt: skip


def test_a_study_that_is_told_to_end_ends_with_its_work(tmp_path: Path) -> None:
    words = [
        "lab",
        "study",
        str(tmp_path),
        "--seeds",
        "1",
        "--rates",
        "0,0.9",
        "--arms",
        "grpo",
        "--workers",
        "1",
    ]
    running = subprocess.Popen([sys.executable, "-m", "video_r1", *words], stderr=subprocess.PIPE, text=True)
    cold_start = tmp_path / "seed-0/cold-start"
    deadline = time.monotonic() + 60
    while not cold_start.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cold_start.is_dir() or (tmp_path / "seed-0/test").is_dir()
    running.terminate()
    _, errors = running.communicate(timeout=20)  # a cold start takes minutes
    assert running.returncode == 143
    assert "the same command goes on with the runs that are left" in errors


@pytest.mark.slow
def test_a_study_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"out": str(tmp_path), "rates": [0.9], "seeds": 1, "steps": 2, "train": 64, "test": 12}
    assert study.run_study(StudySettings(arms=["grpo"], **settings)) == 0
    first = tmp_path / "seed-0/0.9-grpo/result.json"
    before, time = first.read_text(), first.stat().st_mtime_ns
    assert study.run_study(StudySettings(arms=["grpo", "likelihood-frozen"], **settings)) == 0
    assert first.stat().st_mtime_ns == time
    results = json.loads((tmp_path / "study.json").read_text())
    assert [run["arm"] for run in results] == ["grpo", "likelihood-frozen"]
    assert len({run["cold_start"] for run in results}) == 1
    assert results[1]["credit"] > 0 and results[0]["credit"] is None
    # the same run again, from the same cold start: the same figures
    shutil.rmtree(first.parent)
    assert study.run_study(StudySettings(arms=["grpo"], **settings)) == 0
    again, once = json.loads(first.read_text()), json.loads(before)
    assert again | {"step_seconds": 0} == once | {"step_seconds": 0}
