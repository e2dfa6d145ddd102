"""Evaluation figures against values worked out by hand."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from video_r1.evaluation.metrics import (
    bootstrap_means,
    mean_figure,
    mean_relative_accuracy,
    paired_difference,
    share_difference,
    share_figure,
    task_mean,
)
from video_r1.evaluation.summary import cell, summarise, summary_table


@pytest.mark.parametrize(
    ("predicted", "truth", "score"),
    [
        (9.6, 10.0, 1.0),  # 4 % is below 5 %, the strictest of the ten
        (-9.6, -10.0, 1.0),
        (0.0, 0.0, 1.0),
        (0.1, 0.0, 0.0),
        (float("nan"), 10.0, 0.0),
    ],
)
def test_mean_relative_accuracy(predicted: float, truth: float, score: float) -> None:
    assert mean_relative_accuracy(predicted, truth) == pytest.approx(score)


def test_mean_relative_accuracy_is_that_of_exact_fractions() -> None:
    """Errors of exactly 1 − θ too, which floating point puts on either side: 0.9 against 1, 7.2 against 8."""
    pairs = [(Fraction(p, 10), Fraction(t, 10)) for p in range(0, 121) for t in range(1, 81)]
    expected = [sum(abs(p - t) / t < Fraction(k, 20) for k in range(1, 11)) / 10 for p, t in pairs]
    ours = [mean_relative_accuracy(float(p), float(t)) for p, t in pairs]
    assert [pair for pair, a, b in zip(pairs, ours, expected, strict=True) if abs(a - b) > 1e-12] == []


WIDE = 0.3244  # z² ÷ (8 + z²): Wilson's end for 0 of 8
NEWCOMBE = 1 - 2**0.5 * WIDE  # of 8 of 8 minus 0 of 8


@pytest.mark.parametrize(
    ("first", "second", "clips", "interval"),
    [
        ([0.0] * 8, None, None, [0, WIDE]),
        ([1.0] * 8, None, None, [1 - WIDE, 1]),
        ([1.0] * 40, None, [n % 8 for n in range(40)], [1 - WIDE, 1]),  # of eight clips
        ([0.0] * 5, None, None, [0, 0.4345]),
        ([0.0] * 4, None, None, None),
        ([1.0, 0.0, 1.0, 0.0], None, None, None),
        ([7.0] * 8, None, None, [7, 7]),  # no share
        ([1.0] * 8, [1.0] * 8, None, [-WIDE, WIDE]),
        ([0.0] * 8, [0.0] * 8, None, [-WIDE, WIDE]),
        ([1.0] * 8, [0.0] * 8, None, [NEWCOMBE, 1]),
        ([0.0] * 8, [1.0] * 8, None, [-1, -NEWCOMBE]),
        ([1.0] * 4, [0.0] * 4, None, None),
        ([90.0] * 8, [30.0] * 8, None, [60, 60]),  # tokens
    ],
)  # fmt: skip
def test_few_or_equal_scores(first: list[float], second: Any, clips: Any, interval: Any) -> None:
    figure = mean_figure(first, clips) if second is None else paired_difference(first, second, clips)
    assert figure.interval == (None if interval is None else pytest.approx(interval, abs=1e-4))
    assert figure.as_json("x")["interval95"] == figure.interval
    shown = cell(figure.as_json("x"), "x")
    assert ("[" in shown) is (interval is not None) and "nan" not in shown


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = np.random.default_rng(1).random(50)
    assert mean_figure(scores) == mean_figure(scores)
    assert mean_figure(scores, seed=1) != mean_figure(scores)


def test_resamples_in_parts_are_all_there() -> None:
    means = bootstrap_means(np.arange(3000.0), resamples=1500)  # more draws than are made at once
    assert means.shape == (1500,)
    assert len(np.unique(means)) > 1400


def test_questions_about_one_clip_are_drawn_together() -> None:
    # 50 clips of 8 questions that are all right or all wrong say as much as 50: √(0.44 × 0.56 ÷ 50) = 0.0702
    clips = [f"{clip}.mp4" for clip in range(50) for _ in range(8)]
    right = [1.0] * 22 * 8 + [0.0] * 28 * 8
    figure = mean_figure(right, clips)
    assert (figure.mean, figure.questions) == (0.44, 400)
    assert figure.low == pytest.approx(0.44 - 1.96 * 0.0702, abs=0.02)
    assert figure.high == pytest.approx(0.44 + 1.96 * 0.0702, abs=0.02)
    assert figure[1:3] == mean_figure(right[::8])[1:3]
    assert paired_difference(right, [0.0] * 400, clips) == figure
    # The one answer of a clip weighs as much as each of the three of another.
    assert set(bootstrap_means([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"]).tolist()) == {0.0, 0.25, 1.0}
    # One clip, or two that are alike, say nothing of others: the questions count.
    half = [1.0, 0.0] * 20
    assert mean_figure(half, ["a"] * 40) == mean_figure(half, ["a"] * 20 + ["b"] * 20) == mean_figure(half)


def test_the_gap_is_paired() -> None:
    # Half of the questions are right in both orders, the others wrong but for 10, which need the order: the
    # pairs differ by 1 in 10 of 100. Standard error √(0.1 × 0.9 ÷ 100) = 0.03; unpaired it is 0.07.
    ordered = [1.0] * 50 + [0.0] * 40 + [1.0] * 10
    shuffled = [1.0] * 50 + [0.0] * 50
    figure = paired_difference(ordered, shuffled)
    assert figure.mean == pytest.approx(0.1)
    assert figure.low == pytest.approx(0.1 - 1.96 * 0.03, abs=0.015)
    assert figure.high == pytest.approx(0.1 + 1.96 * 0.03, abs=0.015)
    assert paired_difference(shuffled, ordered).mean == pytest.approx(-0.1)


def test_both_headlines_of_vsi_bench() -> None:
    scores, tasks = [], []
    for task, right, questions in [
        ("object_rel_direction_easy", 2, 2),  # 1.0
        ("object_rel_direction_medium", 1, 2),  # 0.5
        ("object_rel_direction_hard", 0, 4),  # 0.0; the three together 0.5, not 3/8
        ("object_counting", 1, 4),  # 0.25
    ]:
        scores += [1.0] * right + [0.0] * (questions - right)
        tasks += [task] * questions
    assert task_mean(scores, tasks).mean == pytest.approx((0.5 + 0.25) / 2)
    assert mean_figure(scores).mean == pytest.approx(4 / 12)
    figure = task_mean(scores, tasks)
    assert figure.low < figure.mean < figure.high
    assert figure.questions == 12


def test_every_interval_resamples_clips() -> None:
    """Accuracy, gap, task mean and groups: of eight questions about two clips, all of one right."""
    rows = [
        record(n, order, float(n < 4 and order == "ordered"), task_type="t", clip=("a", "b")[n // 4])
        for order in ("ordered", "shuffled")
        for n in range(8)
    ]
    figures = summarise(rows)
    found = [figures["ordered"], figures["temporal_gap"], figures["ordered"]["task_mean"]]
    found += [figures["by_task"]["t"]["ordered"], figures["by_type"]["multiple choice"]["temporal_gap"]]
    assert [each["interval95"] for each in found] == [[0.0, 1.0]] * 5
    alone = [{name: value for name, value in each.items() if name != "clip"} for each in rows]
    assert summarise(alone)["ordered"]["interval95"][1] < 1.0


def test_the_mean_of_two_kinds_of_questions() -> None:
    """VSI-Bench as Video-R1's table has it: accuracy 0.75 of four choices and MRA 0.2 of two numbers."""
    numbers = {"problem_type": "regression"}
    records = [record(n, "ordered", score) for n, score in enumerate((1.0, 1.0, 1.0, 0.0))]
    assert "kind_mean" not in summarise(records)["ordered"]
    records += [record(n, "ordered", score, **numbers) for n, score in ((4, 0.2), (5, 0.2))]
    found = summarise(records)["ordered"]
    assert found["kind_mean"]["accuracy"] == pytest.approx((0.75 + 0.2) / 2)
    assert found["accuracy"] == pytest.approx(3.4 / 6)
    # resampled in each kind: the numbers' mean is always 0.2
    assert found["kind_mean"]["interval95"] == pytest.approx([(0.25 + 0.2) / 2, (1 + 0.2) / 2])


def record(question: int, order: str, score: float, **fields: object) -> dict:
    return {
        "problem_id": question, "order": order, "score": score, "strict_score": 0.0, "format": 1.0,
        "prediction": "A", "finish_reason": "stop", "problem_type": "multiple choice", "data_type": "video",
        "data_source": "lab/direction", "task_type": "",
    } | fields  # fmt: skip


def test_summary_of_records() -> None:
    records = [
        record(1, "ordered", 1.0, strict_score=1.0),
        record(1, "shuffled", 0.0),
        record(2, "ordered", 1.0, prediction="", format=0.0, finish_reason="length"),
        record(2, "shuffled", 1.0),
        record(3, "ordered", 0.0, data_type="image", data_source="lab/image", problem_type="OCR"),
        record(4, "shuffled", 1.0),  # its ordered half is missing
    ]
    figures = summarise(records)
    ordered = figures["ordered"]
    assert ordered["accuracy"] == pytest.approx(2 / 3)
    assert ordered["questions"] == 3
    rates = ("strict_accuracy", "unparsable_rate", "truncated_rate")
    assert [ordered[rate] for rate in rates] == pytest.approx([1 / 3] * 3)
    assert ordered["format_rate"] == pytest.approx(2 / 3)
    assert figures["shuffled"]["accuracy"] == pytest.approx(2 / 3)
    gap = figures["temporal_gap"]
    assert (gap["gap"], gap["questions"], gap["ordered"], gap["shuffled"]) == (0.5, 2, 1.0, 0.5)
    assert gap["interval95"] is None  # of two questions
    assert figures["by_type"]["OCR"].keys() == {"ordered"}
    assert figures["by_type"]["OCR"]["ordered"] == {
        "accuracy": 0.0, "interval95": None, "questions": 1, "strict_accuracy": 0.0,
        "format_rate": 1.0, "unparsable_rate": 0.0, "truncated_rate": 0.0,
    }  # fmt: skip
    assert figures["by_modality"]["video"]["ordered"]["format_rate"] == 0.5
    assert figures["by_source"]["lab/direction"]["temporal_gap"]["gap"] == 0.5
    assert "by_task" not in figures
    assert "task_mean" not in ordered


def test_outputs_that_collapse_onto_one_answer() -> None:
    """19 of 20 outputs are A, which is right in 15 of 20; 17 of 20 are no collapse."""
    rows = [
        record(n, "ordered", float(n < 14), prediction="AB"[n == 19], answer="AB"[n >= 15]) for n in range(20)
    ]
    table = summary_table({"frames": {"16": summarise(rows) | {"skipped": 0}}})
    assert "multiple choice: 95 % of the outputs are A, which is right in 75 %" in table
    varied = [row | {"prediction": "B"} if row["problem_id"] < 2 else row for row in rows]
    for fine in (varied, rows[:19], [row | {"prediction": ""} for row in rows]):
        assert "warning" not in summarise(fine)["ordered"]


def test_summary_by_task_and_its_table() -> None:
    records = [record(1, "ordered", 1.0, task_type="a"), record(2, "ordered", 1.0, task_type="a"),
               record(3, "ordered", 0.0, task_type="b")]  # fmt: skip
    figures = summarise(records)
    assert figures["ordered"]["accuracy"] == pytest.approx(2 / 3)
    assert figures["ordered"]["task_mean"]["accuracy"] == 0.5
    assert figures["by_task"]["b"]["ordered"]["accuracy"] == 0.0
    table = summary_table({"frames": {"16": figures | {"skipped": 2}}})
    lines = table.splitlines()
    assert lines[0] == "16 frames"
    assert lines[2].split()[:3] == ["all", "3", "0.667"]
    assert any(line.split()[:3] == ["b", "1", "0.000"] for line in lines)
    assert lines[-2].split() == ["ordered", "3", "0.667", "-", "0.000", "1.000", "0.000", "0.000", "0.500"]
    assert "2 questions skipped" in table


@pytest.mark.parametrize(("right", "count", "low", "high"), [
    (0, 8, 0.0, 0.3244), (8, 8, 0.6756, 1.0), (81, 263, 0.2553, 0.3662),
])  # fmt: skip
def test_shares_of_few_answers(right: int, count: int, low: float, high: float) -> None:
    """Wilson's interval; the last line is Newcombe's own example (1998, table I)."""
    figure = share_figure(right, count)
    assert figure.mean == right / count and figure.questions == count
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-4)


def test_difference_of_shares() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, 873), table II, example (a), method 10."""
    figure = share_difference(share_figure(56, 70), share_figure(48, 80))
    assert (figure.mean, figure.low, figure.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
