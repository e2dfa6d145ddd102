"""The report: one self-contained HTML page of a run folder, or of several with their curves overlaid.

    run folders ─► Run, groups, scores (plain values) ─► JSON ─► page.html + page.css + the scripts

A page is passed on to other people, and most of its text was written by a model or came with a dataset. So
no value becomes markup: all travel as JSON in which `<`, `>` and `&` are escaped, the scripts set text only,
and the page's policy lets a browser run no other script and load nothing.
"""

import base64
import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from video_r1.errors import RequestError, writing_to
from video_r1.files import replace_text
from video_r1.report.curves import SERIES
from video_r1.report.reader import Found
from video_r1.report.run_data import Run, find_run_folders, read_groups, read_run
from video_r1.report.scores import in_order_of_stages, read_scores, test_of
from video_r1.report.values import as_json, as_table, text

ROLLOUT_BYTES = 20_000_000  # of recorded groups and their frames in a page
SCRIPTS = ("charts.js", "curves.js", "places.js", "frames.js", "rollouts.js", "page.js")
OWN_SETTINGS = ("output_dir", "run_name", "logging_dir")  # every run has its own
END_SHARE = 0.1  # a key figure is a mean over this share of the logged steps at either end

GAP_NAMES = {"shuffled": "temporal gap", "elsewhere": "look gap"}

KEY_SETTINGS: dict[str, str] = SERIES["settings"]
KEY_SERIES: dict[str, tuple[str, str, int]] = SERIES["series"]


def build_report(run: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of a run folder, or of several in one page, and return its path.

    run: a T-GRPO, GRPO or SFT run, an evaluation, or a folder of such folders, like a demo's. out: default
    report.html in the run folder; for several, comparison.html in their common folder. Raises RequestError
    when a folder does not exist, is named twice or is empty, OSError when the page cannot be written.
    """
    folders = [Path(run)] if isinstance(run, (str, Path)) else [Path(folder) for folder in run]
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise RequestError(f"{folder}: no such run folder")
        if any(folder.samefile(other) for other in folders[:number]):
            raise RequestError(f"{folder}: this run folder is named twice")
    page = render(page_data(*folders))
    if out is None:
        out = folders[0] / "report.html" if len(folders) == 1 else common_folder(folders) / "comparison.html"
    out = Path(out)
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, page)
    return out


def page_data(*folders: Path) -> dict[str, Any]:
    """Return the contents of the page as JSON values. Raises RequestError when there are none.

    For several folders, `overlay` is true, names of runs and scores contain the folders' names, and `ends`
    and `differing` show how the training runs differ.
    """
    notes: list[str] = []
    runs: list[Run] = []
    scores: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for folder, name in zip(folders, folder_names(folders), strict=True):
        summary = Found(name, folder, Path(os.path.realpath(folder))).table("summary.json", notes)
        notes += [
            f"{text(each.get('title') or name)}: {text(each.get('coverage') or 'a part of its questions')}"
            for name, each in as_table(summary.get("benchmarks")).items()
            if as_table(each).get("complete") is False
        ]
        found = [read_run(each, folder) for each in find_run_folders(folder)]
        rows = in_order_of_stages([row for run in found for row in read_scores(run)])
        if not found:
            raise RequestError(
                f"{folder} holds nothing to report: expected metrics.jsonl, rollouts.jsonl or "
                f"predictions-*.jsonl or direct-*.jsonl in it or in its subfolders"
            )
        if len(folders) > 1:
            _name_by_folder(folder, name, found, rows)
        runs, scores = runs + found, scores + rows
    overlay = len(folders) > 1
    runs.sort(key=lambda run: ("rl", "sft", "evaluation", "data").index(run.kind))
    recorded = [run for run in runs if (run.found.folder / "rollouts.jsonl").is_file()]
    trained = {run.name: run.config for run in runs if run.points["series"] and run.config}
    groups = {run.name: read_groups(run, ROLLOUT_BYTES // len(recorded)) for run in recorded}
    return {
        "title": ", ".join(folder_names(folders)),
        "overlay": overlay,
        "figures": [] if overlay else _demo_figures(scores) or _figures(runs),
        "ends": series_ends(runs) if overlay else [],
        "differing": differing_settings(trained) if overlay else [],
        "seconds": {} if overlay else as_table(summary.get("seconds")),
        "runs": [_run(run, groups.get(run.name, ([], 0))) for run in runs],
        "scores": scores,
        "notes": list(dict.fromkeys([*notes, *(f"{run.name}/{note}" for run in runs for note in run.notes)])),
    }


def common_folder(folders: Sequence[Path]) -> Path:
    """Return the innermost folder around all of them; the outer one if one is in the other."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders]))


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Return a folder's name; for several, their paths from the common folder."""
    above = common_folder(folders)
    paths = [folder.resolve().relative_to(above).as_posix() for folder in folders]
    return [above.name if path == "." else path for path in paths]


def _name_by_folder(folder: Path, name: str, runs: list[Run], rows: list[dict[str, Any]]) -> None:
    """Put the folder's name into the names of its runs and scores."""
    own = folder.resolve().name.removeprefix("eval-")
    for run in runs:
        run.name = name if run.found.folder == folder else f"{name}/{run.name}"
    for row in rows:
        rest = row["name"].removeprefix(own)
        row["name"] = f"{name} {rest}" if rest == row["name"] else name + rest


def series_ends(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return table rows: the mean of each main series over the last tenth, by run."""
    rows = []
    for name, (caption, unit, decimals) in KEY_SERIES.items():
        ended = {
            run.name: f"{ends(values)[1]:z.{decimals}f} {unit}".rstrip()
            for run in runs
            if (values := run.values(name))
        }
        if ended:
            rows.append({"series": caption, **ended})
    return rows


def differing_settings(settings: Mapping[str, Mapping[str, str]]) -> list[dict[str, str]]:
    """Return table rows: the settings that differ between runs, with their values by run."""
    names = dict.fromkeys(name for own in settings.values() for name in own if name not in OWN_SETTINGS)
    rows = {name: {run: own.get(name, "–") for run, own in settings.items()} for name in names}
    return [{"setting": name, **row} for name, row in rows.items() if len(set(row.values())) > 1]


def render(data: dict[str, Any]) -> str:
    """Return the page's HTML. Values can reach it only through `embed` and `html.escape`."""
    parts = files("video_r1.report")
    style = (parts / "page.css").read_text("utf-8")
    script = "\n".join((parts / name).read_text("utf-8") for name in SCRIPTS)
    slots = {
        "title": html.escape(f"{data['title']} · video-r1"),
        "policy": html.escape(
            f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src blob: data:; "
            f"style-src {_digest(style)}; script-src {_digest(script)}"
        ),
        "style": style,
        "data": embed(data),
        "script": script,
    }
    template = (parts / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


def embed(value: Any) -> str:
    """Return JSON that is safe in a script element: no `<`, `>`, `&`, ASCII only (U+2028 is escaped)."""
    return as_json(value).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _run(run: Run, groups: tuple[list[dict[str, Any]], int]) -> dict[str, Any]:
    return {
        "name": run.name, "kind": run.kind, "about": _about(run), "config": run.config, "points": run.points,
        "groups": groups[0], "groupsTotal": groups[1], "quarantine": run.quarantine,
        "skippedUpdates": run.skipped_updates, "leftOut": run.left_out,
    }  # fmt: skip


def _about(run: Run) -> list[str]:
    """Return short facts on a run: steps, time, and its main settings."""
    facts = []
    if run.points["steps"]:
        facts.append(f"{run.points['steps'][-1]:,} steps")
        if seconds := run.points["times"][-1]:
            facts.append(duration(seconds))
        if count := run.points["stopped_early"]:
            facts.append(f"stopped early: {count:.0f} validations in a row brought no better model")
    named = {key.rsplit(".", 1)[-1]: value for key, value in run.config.items()}
    for key, caption in KEY_SETTINGS.items():
        if named.get(key) not in (None, "", "null"):
            # The last part of a path: the rest describes the writer's disk.
            facts.append(f"{caption} {named[key].rstrip('/').rsplit('/', 1)[-1]}")
    return facts


def duration(seconds: float) -> str:
    """Return seconds as text.

    >>> duration(75), duration(4000)
    ('1 min 15 s', '1 h 7 min')
    """
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _figures(runs: list[Run]) -> list[dict[str, str]]:
    """Return the main figures of the first training run: the end and the start of each series."""
    figures = []
    run = next((run for run in runs if run.points["series"]), runs[0])
    for name, (caption, unit, decimals) in KEY_SERIES.items():
        if values := run.values(name):
            start, end = (f"{mean:z.{decimals}f}" for mean in ends(values))
            figures.append({"caption": caption, "value": end, "note": f"{unit} from {start}".lstrip()})
    return figures[:4]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and the last tenth of a series (at least one point each)."""
    width = max(1, round(len(values) * END_SHARE))
    return sum(values[:width]) / width, sum(values[-width:]) / width


def _demo_figures(scores: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the main figures of a folder with evaluated stages, for each test: the last stage beside the one
    before.
    """
    asked = [row for row in scores if "ordered" in row["orders"] and not row["name"].endswith(", direct")]
    figures = []
    for _, group in groupby(asked, key=test_of):
        *earlier, last = group
        before = earlier[-1] if earlier else {"name": "", "orders": {}, "gaps": {}}
        orders = last["orders"] if len(last["gaps"]) < 2 else ("ordered",)  # each contrast has its gap
        shown = [
            ("orders", name, f"accuracy, {'in order' if name == 'ordered' else name}") for name in orders
        ]
        shown += [("gaps", n, GAP_NAMES.get(n, f"gap to {n}")) for n in last["gaps"]]
        for field, name, caption in shown:
            was = before[field].get(name)
            figures.append({
                "caption": f"{last['name']} {caption}" + (f", {last['about']}" if last["about"] else ""),
                "value": f"{last[field][name]['mean']:z.2f}",
                "note": f"{before['name']} {was['mean']:z.2f}" if was else "",
            })  # fmt: skip
    return figures
