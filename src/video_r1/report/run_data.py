"""Reads what runs leave behind, as plain values for the page. Damaged lines are counted, never fatal."""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

MAX_POINTS = 1_500  # a curve with more points is averaged over neighbours
NOT_SERIES = {"step", "epoch", "time"}
SECRET_ENDINGS = ("token", "api_key", "password", "secret")
MAX_ROWS = 300  # of a table
LEFT_OUT_COLUMNS = ("step", "problem_id", "problem", "accuracy", "reward", "reason", "replaced_by")
RUN_FILES = ("metrics.jsonl", "rollouts.jsonl", "quarantine.jsonl")
ANSWERS = {"reasoned": "predictions", "direct": "direct"}  # how the files of an evaluation's answers begin


@dataclass(slots=True)
class Series:
    """One logged quantity. `steps` and `values` have equal lengths; values are finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    not_finite: int = 0  # logged values that were NaN or infinite: left out of the curve
    averaged: int = 1  # neighbouring points behind each shown one


@dataclass(slots=True)
class Run:
    """A folder with results: training, evaluation or both. `name` is relative to the reported folder."""

    name: str
    folder: Path
    config: dict[str, str]
    series: dict[str, Series]
    seconds: float | None  # of the last logged step
    quarantine: dict[str, Any]  # read_rows: questions that could not be used, with the reason
    skipped_updates: dict[str, Any]  # read_rows: optimizer steps whose loss or gradient was not finite
    left_out: dict[str, Any]  # read_rows: groups without variance
    notes: list[str]

    @property
    def kind(self) -> str:
        """`rl`, `sft`, `evaluation` or `data`, told by what the folder holds."""
        rewarded = any(name.startswith("reward/") for name in self.series)
        if rewarded or (self.folder / "rollouts.jsonl").exists():
            return "rl"
        if self.series:
            return "sft"
        return "evaluation" if prediction_files(self.folder) else "data"


def prediction_files(folder: Path) -> list[Path]:
    """An evaluation's answers, those with reasoning before the direct ones."""
    return [path for begin in ANSWERS.values() for path in sorted(folder.glob(f"{begin}-*.jsonl"))]


def find_run_folders(root: Path, depth: int = 2) -> list[Path]:
    """`root` and the folders at most `depth` levels below it that hold a run's files."""
    with os.scandir(root) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    found = [root] if any(_is_of_run(entry.name) and entry.is_file() for entry in entries) else []
    for entry in entries if depth > 0 else []:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(("checkpoint", ".", "frames")):
            with contextlib.suppress(PermissionError, FileNotFoundError):  # another's folder, or gone
                found += find_run_folders(root / entry.name, depth - 1)
    return found


def _is_of_run(name: str) -> bool:
    answers = tuple(f"{begin}-" for begin in ANSWERS.values())
    return name in RUN_FILES or (name.startswith(answers) and name.endswith(".jsonl"))


def read_run(folder: Path, root: Path) -> Run:
    """Raises OSError when a file that is there cannot be opened."""
    notes: list[str] = []
    series, seconds = read_series(folder / "metrics.jsonl", notes)
    settings = read_object(folder / "config.yaml", notes) or read_object(folder / "evaluation.json", notes)
    notes += [f"metrics.jsonl: {name} was never finite" for name, curve in series.items() if not curve.steps]
    return Run(
        name=folder.relative_to(root).as_posix() if folder != root else folder.resolve().name,
        folder=folder,
        config=dict(flat(settings)),
        series=series,
        seconds=seconds,
        quarantine=read_rows(folder / "quarantine.jsonl", notes),
        skipped_updates=read_rows(folder / "skipped_updates.jsonl", notes),
        left_out=read_rows(folder / "left_out.jsonl", notes, LEFT_OUT_COLUMNS),
        notes=notes,
    )


def json_lines(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Each readable object of a JSON lines file with its offset and length in bytes.

    The last line of a file that is still being written, or of a killed run, may be half there. Such lines are
    skipped; how many is appended to `notes`.
    """
    skipped = offset = 0
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line) if line.strip() else None
                except (ValueError, RecursionError):  # no JSON, no UTF-8, or brackets a thousand deep
                    record = "broken"
                if isinstance(record, dict):
                    yield offset, len(line), record
                elif record is not None:
                    skipped += 1
                offset += len(line)
    if skipped and notes is not None:
        notes.append(f"{path.name}: {skipped} unreadable line{'s' if skipped > 1 else ''} skipped")


def read_series(path: Path, notes: list[str] | None = None) -> tuple[dict[str, Series], float | None]:
    """Every numeric series of metrics.jsonl, by name, and the time of its last line in seconds.

    A step that was logged twice (a run that was resumed from a checkpoint) counts once, with its last value.
    """
    logged: dict[str, dict[int, float]] = {}
    seconds: float | None = None
    for _, _, record in json_lines(path, notes):
        if (step := finite(record.get("step"))) is None:
            continue
        seconds = finite(record.get("time"), seconds)
        for name, value in record.items():
            if name not in NOT_SERIES and (value is None or is_number(value)):  # null: was not finite
                logged.setdefault(name, {})[int(step)] = math.nan if value is None else float(value)
    return {name: thin(values) for name, values in logged.items()}, seconds


def thin(logged: dict[int, float], max_points: int = MAX_POINTS) -> Series:
    """A series in the order of its steps, averaged over equal numbers of neighbours down to `max_points`."""
    points = sorted((step, value) for step, value in logged.items() if math.isfinite(value))
    width = math.ceil(len(points) / max_points) or 1
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    return Series(
        steps=[chunk[-1][0] for chunk in chunks],
        values=[sum(value for _, value in chunk) / len(chunk) for chunk in chunks],
        not_finite=len(logged) - len(points),
        averaged=width,
    )


def read_rows(path: Path, notes: list[str], columns: Collection[str] = ()) -> dict[str, Any]:
    """The first rows of a JSON lines file for a table (`shown`), and how many it has (`total`).

    columns: those of the table; none: all.
    """
    shown, total = [], 0
    for total, (_, _, record) in enumerate(json_lines(path, notes), 1):
        if total <= MAX_ROWS:
            told = {key: value for key, value in record.items() if not columns or key in columns}
            cells = {key: text(value)[:500] for key, value in told.items() if value is not None}
            shown.append(cells | ({"path": short_path(cells["path"])} if "path" in cells else {}))
    return {"shown": shown, "total": total}


def read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """What a YAML or JSON file holds where it is one object, else nothing."""
    if not path.is_file():
        return {}
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return as_table(read(path.read_bytes()))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return {}


def flat(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings, nested names joined by dots. What looks like a credential is left out."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flat(value, f"{name}.")
        elif name.lower().endswith(SECRET_ENDINGS) and value:
            yield name, "(not shown)"
        else:
            shown = text(value)[:500]
            yield name, f"…/{short_path(shown)}" if shown.startswith("/") else shown


def text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def short_path(path: str) -> str:
    """A file's name and folder: a page that is passed on need not say how its writer's disk is arranged."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that a float can hold (nan and infinity among them)."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1e300)


def finite(value: Any, otherwise: float | None = None) -> float | None:
    return float(value) if is_number(value) and math.isfinite(value) else otherwise


def whole(value: Any) -> int:
    return int(finite(value) or 0)


def as_table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
