"""Evaluation scores for the report: one row for each checkpoint and number of frames, from summary.json."""

from collections.abc import Mapping
from typing import Any

from video_r1.evaluation.metrics import OVERLAP_SHARES
from video_r1.evaluation.summary import LOOK_GAPS, NEEDED, ORDERS, summarise
from video_r1.report.run_data import ANSWERS, Run, json_lines, prediction_files, read_object
from video_r1.report.values import as_list, as_table, finite, text

STAGES = ("base", "sft", "grpo", "rl", "tgrpo")  # the order of the rows where these names occur
BREAKDOWNS = ("by_modality", "by_type", "by_task", "by_source")
GAP_ORDERS = (*ORDERS, LOOK_GAPS["look_gap"])
MAX_PARTS = 60  # rows of one breakdown


def read_scores(run: Run) -> list[dict[str, Any]]:
    """Return one row for each number of frames that a folder was evaluated with, and for its direct answers.

    A row has `name`; `ordered`, `shuffled`, `gap` and `look` (the look gap), each {"mean", "low", "high",
    "n"} with a 95 % interval, or None; `overlaps` of grounding answers; `format`, the share of ordered
    outputs in the answer format; `about`, the subset; and `by`, the same figures by type, source and so on.
    Images have no frame order: if there are videos too, the row is over the videos.
    """
    name = run.name.rsplit("/", 1)[-1].removeprefix("eval-")
    tables = as_table(read_object(run.folder / "summary.json", run.notes).get("frames")) or _unfinished(run)
    rows = []
    for frames, value in tables.items():
        figures, own = as_table(value), f"{name}, {frames} frames" if len(tables) > 1 else name
        rows.append(_row(own, figures))
        for kind, group in list(as_table(figures.get("by_type")).items())[:MAX_PARTS]:
            if warning := text(as_table(as_table(group).get("ordered")).get("warning") or ""):
                run.notes.append(f"{own}, {kind}: {warning[:200]}")
        if direct := as_table(figures.get("direct")):
            rows.append(_row(f"{own}, direct", direct))
    return rows


def _row(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    modalities = as_table(figures.get("by_modality"))
    mixed = len(modalities) > 1 and "video" in modalities
    return {
        "name": name,
        **_figures(as_table(modalities["video"]) if mixed else figures),
        "format": finite(as_table(figures.get("ordered")).get("format_rate")),
        "about": "videos" if mixed else "",
        "overlaps": _overlaps(as_table(figures.get("by_type"))),
        "by": {field: _parts(as_table(figures.get(field))) for field in BREAKDOWNS},
    }


def _unfinished(run: Run) -> dict[str, Any]:
    """Return figures of an evaluation without a summary, over the questions answered so far."""
    tables: dict[str, Any] = {}
    for path in prediction_files(run.folder):
        answers: dict[tuple[str, str], dict[str, Any]] = {}
        for _, _, record in json_lines(path, run.notes):
            usable = record.keys() >= NEEDED and isinstance(record["problem_id"], (str, int))
            if usable and record["order"] in GAP_ORDERS and finite(record["score"]) is not None:
                answers[str(record["problem_id"]), record["order"]] = record
        if answers:
            way, _, frames = path.stem.partition("-")
            found = summarise(list(answers.values()))
            if way == ANSWERS["direct"] and frames in tables:
                tables[frames]["direct"] = found
            else:
                tables[frames] = found
            run.notes.append(f"{path.name}: the evaluation is not finished; {len(answers)} answers so far")
    return tables


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    scores = {order: _score(as_table(figures.get(order)), "accuracy") for order in ORDERS}
    gaps = {"gap": "temporal_gap", "look": "look_gap"}
    return scores | {key: _score(as_table(figures.get(name)), "gap") for key, name in gaps.items()}


def _score(figure: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    mean = finite(figure.get(name))
    if mean is None:
        return None
    low, high = (finite(end) for end in (as_list(figure.get("interval95")) + [None, None])[:2])
    return {"mean": mean, "low": low, "high": high, "n": finite(figure.get("questions"))}


def _parts(groups: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name} | _figures(as_table(value)) for name, value in list(groups.items())[:MAX_PARTS]]


def _overlaps(types: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the mean and the shares R@0.3, R@0.5, R@0.7 of each grounding type, order and overlap."""
    rows = []
    for kind, group in list(types.items())[:MAX_PARTS]:
        for order in ORDERS:
            measured = as_table(as_table(as_table(group).get(order)).get("overlaps"))
            for name, figure in list(measured.items())[:MAX_PARTS]:
                table = as_table(figure)
                shares = {share: _score(as_table(table.get(share)), "share") for share in OVERLAP_SHARES}
                mean = _score(table, "mean")
                rows.append({"name": f"{kind}, {name}", "order": order, "mean": mean, "shares": shares})
    return rows


def in_order_of_stages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by the suffix after a stage's name, as in `eval-sft-lying`, then by stage."""
    ranks = {name: rank for rank, name in enumerate(STAGES)}
    return sorted(rows, key=lambda row: (test_of(row), ranks.get(_stage_and_test(row)[0], len(STAGES))))


def test_of(row: Mapping[str, Any]) -> str:
    """Return `lying` of a row named `sft-lying`; "" of one whose name is a stage's or none's."""
    stage, test = _stage_and_test(row)
    return test if stage in STAGES else ""


def _stage_and_test(row: Mapping[str, Any]) -> tuple[str, str]:
    stage, _, test = row["name"].partition(",")[0].partition("-")
    return stage, test
