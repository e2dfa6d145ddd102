"""Evaluation scores for the report: one row for each checkpoint and number of frames, from summary.json."""

from collections.abc import Mapping
from typing import Any, get_args

from video_r1.errors import first_line
from video_r1.evaluation.metrics import OVERLAP_SHARES
from video_r1.evaluation.summary import NEEDED, gaps_of, summarise
from video_r1.report.reader import read_whole
from video_r1.report.run_data import ANSWERS, Run, prediction_files
from video_r1.report.values import as_list, as_table, finite, score_of, text
from video_r1.settings.frames import Order

STAGES = ("base", "sft", "grpo", "rl", "tgrpo")  # the order of the rows where these names occur
BREAKDOWNS = ("by_modality", "by_type", "by_task", "by_pairs", "by_source")
MAX_PARTS = 60  # rows of one breakdown


def read_scores(run: Run) -> list[dict[str, Any]]:
    """Return one row for each number of frames that a folder was evaluated with, and for its direct answers.

    A row has `name`; `orders`, the accuracy in each measured order, and `gaps`, accuracy in order minus that
    of each contrast, both {order: {"mean", "low", "high", "n"}} with 95 % intervals; `overlaps` of grounding
    answers; `format`, the share of ordered outputs in the answer format; `about`, the subset; and `by`, the
    same figures by type, source and so on. Images have no frame order: if there are videos too, the row is
    over the videos.
    """
    name = run.name.rsplit("/", 1)[-1].removeprefix("eval-")
    tables = as_table(run.found.table("summary.json", run.notes).get("frames")) or _unfinished(run)
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
        "by": {
            field: [
                {"name": part} | _figures(as_table(group))
                for part, group in list(as_table(figures.get(field)).items())[:MAX_PARTS]
            ]
            for field in BREAKDOWNS
        },
    }


def _unfinished(run: Run) -> dict[str, Any]:
    """Return figures of an evaluation without a summary, over the questions answered so far."""
    tables: dict[str, Any] = {}
    for path in prediction_files(run.found.folder):
        answers: dict[tuple[str, str], dict[str, Any]] = {}

        def take(place: int, size: int, record: dict[str, Any], answers: Any = answers) -> None:
            usable = record.keys() >= NEEDED and isinstance(record["problem_id"], (str, int))
            if usable and record["order"] in get_args(Order) and score_of(record) is not None:
                answers[str(record["problem_id"]), record["order"]] = record

        read_whole(run.found, path.name, take, run.notes)
        if answers:
            way, _, frames = path.stem.partition("-")
            try:
                found = summarise(list(answers.values()))
            except Exception as error:  # fields of a stranger's file may hold anything
                run.notes.append(f"{path.name}: its answers cannot be counted ({first_line(error)})")
                continue
            if way == ANSWERS["direct"] and frames in tables:
                tables[frames]["direct"] = found
            else:
                tables[frames] = found
            run.notes.append(f"{path.name}: the evaluation is not finished; {len(answers)} answers so far")
    return tables


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    gaps = gaps_of({name: as_table(value) for name, value in figures.items()})
    return {
        "orders": {
            order: score
            for order in get_args(Order)
            if (score := _score(as_table(figures.get(order)), "accuracy"))
        },
        "gaps": {
            order: score for order in get_args(Order) if (score := _score(as_table(gaps.get(order)), "gap"))
        },
    }


def _score(figure: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    mean = finite(figure.get(name))
    if mean is None:
        return None
    low, high = (finite(end) for end in (as_list(figure.get("interval95")) + [None, None])[:2])
    return {"mean": mean, "low": low, "high": high, "n": finite(figure.get("questions"))}


def _overlaps(types: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the mean and the shares R@0.3, R@0.5, R@0.7 of each grounding type, order and overlap."""
    rows = []
    for kind, group in list(types.items())[:MAX_PARTS]:
        for order in get_args(Order):
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
