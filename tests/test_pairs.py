"""Sets of questions that are right only as a whole: tables worked out by hand, and whole evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import lab_clips
from pair_fixtures import write_pairs
from tiny_questions import row

from video_r1.cli import main
from video_r1.errors import ManifestError, RequestError
from video_r1.evaluation.benchmarks.loading import load_questions
from video_r1.evaluation.benchmarks.readers import read_timeblind, read_vinoground
from video_r1.evaluation.summary import check_pairs, summarise, summary_table


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, lab_clips(tmp_path_factory.mktemp("lab")))
    return folder


def record(
    name: str, right: bool, pairs: dict[str, list[Any]], order: str = "ordered", task: str = ""
) -> dict[str, Any]:
    score = {"score": float(right), "strict_score": float(right), "format": 1.0}
    return {"problem_id": name, "order": order, "prediction": "A", "finish_reason": "stop", **score} | {
        "data_type": "video", "problem_type": "multiple choice", "data_source": "s", "task_type": task,
        "tokens": 5, "pairs": pairs,
    }  # fmt: skip


def vinoground(rights: dict[str, str], order: str = "ordered") -> list[dict[str, Any]]:
    """By counterpart, "1" or "0" of text + and -, then video + and -; "." for one that could not be asked."""
    return [
        record(f"{which}-{place}", mark == "1", {"text score" if place < 2 else "video score": [which, 2],
                                                "group score": [which, 4]}, order)
        for which, marks in rights.items()
        for place, mark in enumerate(marks)
        if mark != "."
    ]  # fmt: skip


def accuracies(figures: dict[str, Any], order: str = "ordered") -> dict[str, Any]:
    return {
        name: (pytest.approx(each[order]["accuracy"]), each[order]["questions"])
        for name, each in figures["by_pairs"].items()
    }


def test_text_video_and_group_score() -> None:
    """Text: right for a and b of a, b, c. Video: for a, c and d. Group: for a of a, b, c."""
    figures = summarise(vinoground({"a": "1111", "b": "1110", "c": "0111", "d": "1.11"}))
    assert figures["ordered"]["accuracy"] == pytest.approx(13 / 15)
    assert accuracies(figures) == {
        "text score": (2 / 3, 3),
        "video score": (3 / 4, 4),
        "group score": (1 / 3, 3),
    }
    by_pairs = figures["by_pairs"]["text score"]["ordered"]
    assert by_pairs["interval95"] is None  # over three pairs, not over six questions
    table = summary_table({"frames": {"16": figures | {"skipped": 1}}})
    assert any(line.split()[:4] == ["group", "score", "3", "0.333"] for line in table.splitlines())


def test_the_gap_and_the_mean_over_tasks() -> None:
    """Ordered: x 1, 0 and y 1. Shuffled: only x's second pair is right."""
    records = []
    for order, rights in {"ordered": ("11", "01", "11"), "shuffled": ("10", "11", "00")}.items():
        for which, task, marks in zip(("1", "2", "3"), "xxy", rights, strict=True):
            for side, mark in enumerate(marks):
                records.append(
                    record(f"{which}{side}", mark == "1", {"pair accuracy": [which, 2]}, order, task)
                )
    (pairs,) = summarise(records)["by_pairs"].values()
    assert pairs["ordered"]["accuracy"] == pytest.approx(2 / 3)
    assert pairs["ordered"]["task_mean"]["accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert pairs["shuffled"]["accuracy"] == pytest.approx(1 / 3)
    assert pairs["temporal_gap"]["gap"] == pytest.approx((1 - 1 + 1) / 3)
    assert pairs["temporal_gap"]["questions"] == 3


def test_what_is_no_pair() -> None:
    check_pairs(1, {"pair accuracy": ["17", 2]})
    for wrong in ("17", *({"pair accuracy": pair} for pair in ("17", 17, ["17", "two"], ["17", 0]))):
        with pytest.raises(RequestError, match=r"question 1: pairs is .*such as"):
            check_pairs(1, wrong)


def test_published_rows_name_their_sets(root: Path, tmp_path: Path) -> None:
    def sets(name: str) -> dict[str, Any]:
        samples = load_questions(name, root, tmp_path / name, allow_missing=True).samples
        return {str(sample.problem_id): sample.extra["pairs"] for sample in samples}

    assert sets("vinoground")["vinoground-1_neg-video"] == {"video score": ["1", 2], "group score": ["1", 4]}
    assert sets("vinoground")["vinoground-0_pos-text"] == {"text score": ["0", 2], "group score": ["0", 4]}
    for name in ("mvp", "mvp_mini"):
        assert sets(name)[f"{name}-intuitive_physics-9_1"] == {"pair accuracy": ["intuitive_physics-9", 2]}
    assert sets("timeblind")["timeblind-6"] == {
        "instance accuracy": ["1", 4], "question accuracy": ["1-1", 2], "video accuracy": ["1-0", 2],
    }  # fmt: skip
    timeblind = load_questions("timeblind", root, tmp_path, allow_missing=True).samples
    sample = {each.problem_id: each for each in timeblind}["timeblind-6"]
    assert (sample.problem, sample.answer) == ("Which is right?", "B")
    assert sample.options == ("A. It is fast.", "B. It is slow.")
    text = load_questions("vinoground", root, tmp_path, allow_missing=True).samples[0]
    assert text.problem == "Which caption best describes this video?"
    assert text.options == ("A. he sits before he eats", "B. he eats before he sits")


@pytest.mark.parametrize(
    ("read", "fields", "message"),
    [
        (read_vinoground, {"idx": "0_pos", "question": "Which? A or B", "GT": "A"}, "0_pos has 0 options"),
        (read_timeblind, {"index": 5, "question": "Which?", "answer": "A", "type": "multiple_choice",
                          "video_path": "v.mp4"}, "question 5"),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_named(
    read: Any, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "vinoground_textscore.json"
    path.write_text(json.dumps([fields]))
    with pytest.raises(ManifestError, match=message):
        list(read(path))


def test_pairs_of_an_own_manifest(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = row(1, "free-form", "video", str(root / "timeblind/videos/vid_00000_0.mp4"))
    manifest = tmp_path / "own.json"
    manifest.write_text(json.dumps([asked | {"pairs": ["7", 2]}]))
    assert main(["eval", "lab-base", str(manifest), "--allowed_roots", str(root), "--device", "cpu"]) == 2
    assert "question 1: pairs is ['7', 2]" in capsys.readouterr().err
