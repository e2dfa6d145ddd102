"""Evaluation results for the page: means, intervals and temporal gaps from predictions and summary.json."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from video_r1.report.run_data import Run, finite, json_lines, prediction_files, text

STAGES = ("base", "sft", "rl")  # the order of the rows where these names occur
RESAMPLES = 1_000
MAX_GROUPS = 40  # rows of a table by type or by source
ORDERS = ("ordered", "shuffled")

Score = dict[str, Any]  # {"mean": float, "low": float | None, "high": float | None, "n": int | None}


def read_scores(run: Run) -> list[dict[str, Any]]:
    """One row for each evaluated checkpoint, and for each frame count where there are several.

    A row has `name`, `ordered`, `shuffled` and `gap` (means with 95 % bootstrap intervals; None where there
    is nothing), `format` (share of ordered outputs in the answer format) and `by`: the same by problem type
    and by source. The gap is over the questions that were asked in both orders.
    """
    name = run.name.rsplit("/", 1)[-1].removeprefix("eval-")
    answers: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in prediction_files(run.folder):
        for _, _, record in json_lines(path, run.notes):
            if finite(record.get("score")) is not None and record.get("order") in ORDERS:
                key = (text(record.get("problem_id")), record["order"], text(record.get("frames")))
                answers[key] = record  # a question that was asked again counts once
    if not answers:
        return []
    asked_twice = len({(question, order) for question, order, _ in answers}) < len(answers)
    by_frames: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (_, _, frames), record in answers.items():
        by_frames[frames if asked_twice else ""].append(record)
    return [
        {"name": f"{name}, {frames} frames" if frames else name} | _row(records, with_parts=True)
        for frames, records in sorted(by_frames.items(), key=lambda item: (len(item[0]), item[0]))
    ]


def _row(records: list[dict[str, Any]], with_parts: bool = False) -> dict[str, Any]:
    scores: dict[str, dict[str, float]] = {order: {} for order in ORDERS}
    for record in records:
        scores[record["order"]][text(record.get("problem_id"))] = float(record["score"])
    ordered, shuffled = scores["ordered"], scores["shuffled"]
    both = sorted(ordered.keys() & shuffled.keys())
    formats = [float(r["format"]) for r in records if r["order"] == "ordered" and _is_number(r.get("format"))]
    row: dict[str, Any] = {
        "ordered": interval(list(ordered.values())),
        "shuffled": interval(list(shuffled.values())),
        "gap": interval([ordered[question] - shuffled[question] for question in both]),
        "format": sum(formats) / len(formats) if formats else None,
    }
    if with_parts:
        row["by"] = {field: _parts(records, field) for field in ("problem_type", "data_source")}
    return row


def _parts(records: Iterable[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record.get(field) not in (None, ""):
            parts[text(record[field])].append(record)
    return [{"name": name} | _row(part) for name, part in sorted(parts.items())[:MAX_GROUPS]]


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> Score | None:
    """The mean of per-question values and its 95 % percentile bootstrap interval; None for no values."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(array.mean()), "low": float(low), "high": float(high), "n": len(array)}


def read_summary(root: Path, notes: list[str]) -> dict[str, Any]:
    """`summary.json` of the folder where it is one object, else nothing."""
    path = root / "summary.json"
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        notes.append(f"summary.json cannot be read: {error}")
        return {}
    return summary if isinstance(summary, dict) else {}


def with_summary(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with the figures of a demo's summary.json in place of ours: a folder states one set of them."""
    accuracy, intervals, formats = (_table(summary, key) for key in ("accuracy", "interval95", "format_rate"))
    merged = {row["name"]: row for row in rows}
    for name, orders in accuracy.items():
        if not isinstance(orders, dict):
            continue
        empty = dict.fromkeys(("ordered", "shuffled", "gap", "format"))
        row = merged.setdefault(name, {"name": name} | empty)
        for order in ORDERS:
            mean = finite(orders.get(order))
            if mean is not None:
                low, high = _ends(_table(intervals, name).get(order), mean)
                questions = (row[order] or {}).get("n") or finite(summary.get("test_questions"))
                row[order] = {"mean": mean, "low": low, "high": high, "n": questions}
        if row["ordered"] and row["shuffled"] and row["gap"] is None:
            difference = row["ordered"]["mean"] - row["shuffled"]["mean"]
            row["gap"] = {"mean": difference, "low": None, "high": None, "n": None}
        rate = formats.get(name)
        row["format"] = finite(rate.get("ordered") if isinstance(rate, dict) else rate, row["format"])
    return sorted(merged.values(), key=_stage)


def _stage(row: dict[str, Any]) -> int:
    name = row["name"].split(",")[0]
    return STAGES.index(name) if name in STAGES else len(STAGES)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool) or finite(value) is not None


def _table(tree: dict[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _ends(value: Any, mean: float) -> tuple[float | None, float | None]:
    """The ends of an interval that is written as [low, high] or as one half-width."""
    if isinstance(value, list) and len(value) == 2:
        return finite(value[0]), finite(value[1])
    half = finite(value)
    return (None, None) if half is None else (mean - half, mean + half)

