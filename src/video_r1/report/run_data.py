"""Run folders as plain values: curves, tables, recorded groups. Damaged lines are counted, not fatal."""

import base64
import contextlib
import json
import os
from bisect import bisect
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from video_r1.data.answers import read_answer
from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.report.curves import Curves, current
from video_r1.report.reader import Found, read_whole
from video_r1.report.values import (
    as_list,
    as_table,
    finite,
    flat,
    short_path,
    text,
    whole,
)
from video_r1.settings.frames import Contrast

MAX_TEXT = 20_000  # characters of one completion
MAX_TURNS = 20  # of a completion
ORDERS = ("ordered", "shuffled")
MAX_WORDS = 4000  # words with a log-prob contrast
MAX_ROWS = 300  # of a table
LEFT_OUT_COLUMNS = ("step", "problem_id", "problem", "accuracy", "reward", "reason", "replaced_by")
RUN_FILES = ("metrics.jsonl", "rollouts.jsonl", "quarantine.jsonl")
ANSWERS = {"reasoned": "predictions", "direct": "direct"}  # beginnings of the files of an evaluation


@dataclass(slots=True)
class Run:
    """A folder with results: training, evaluation or both. name: its path below the reported folder."""

    found: Found
    name: str
    config: dict[str, str]
    points: dict[str, Any]  # of all series (`Curves.points`)
    quarantine: dict[str, Any]  # read_rows: questions that could not be used, with the reason
    skipped_updates: dict[str, Any]  # read_rows: optimizer steps whose loss or gradient was not finite
    left_out: dict[str, Any]  # read_rows: groups without variance
    notes: list[str]

    @property
    def kind(self) -> str:
        return kind_of(self.found.folder, self.points["series"], self.config)

    def values(self, name: str) -> list[float]:
        """Return the known points of a series, [] if there are none."""
        return [value for value in self.points["series"].get(name, ()) if value is not None]


def kind_of(folder: Path, series: Iterable[str], settings: Collection[str]) -> str:
    """Return the kind of a folder's files: `rl`, `sft`, `evaluation` or `data`. series, settings: names."""
    of_rl = "num_generations" in settings or any(name.startswith("reward/") for name in series)
    if of_rl or (folder / "rollouts.jsonl").exists():
        return "rl"
    if (folder / "metrics.jsonl").exists():
        return "sft"
    return "evaluation" if prediction_files(folder) else "data"


def prediction_files(folder: Path) -> list[Path]:
    """Return the files of an evaluation's answers, those with reasoning before the direct ones."""
    return [path for begin in ANSWERS.values() for path in sorted(folder.glob(f"{begin}-*.jsonl"))]


# no-look: a part of the evaluation around it.
NO_RUNS = ("checkpoint", ".", "frames", "no-look")


def find_run_folders(root: Path, depth: int = 2) -> list[Path]:
    """Return `root` and the folders at most `depth` levels below it that hold a run's files."""
    with os.scandir(root) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    answers = tuple(f"{begin}-" for begin in ANSWERS.values())
    of_run = (e for e in entries if e.name in RUN_FILES or e.name.startswith(answers))
    found = [root] if any(e.name.endswith(".jsonl") and e.is_file() for e in of_run) else []
    for entry in entries if depth > 0 else []:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(NO_RUNS):
            with contextlib.suppress(PermissionError, FileNotFoundError):  # not readable, or gone
                found += find_run_folders(root / entry.name, depth - 1)
    return found


def read_run(folder: Path, root: Path) -> Run:
    """Read a run folder below `root`."""
    notes: list[str] = []
    found = Found(
        folder.relative_to(root).as_posix() if folder != root else folder.resolve().name,
        folder,
        Path(os.path.realpath(root)),
    )
    curves = Curves()
    read_whole(found, "metrics.jsonl", lambda place, size, record: curves.add(record), notes)
    points = curves.points()
    notes += [
        f"metrics.jsonl: {name} was never finite"
        for name, values in points["series"].items()
        if not any(value is not None for value in values)
    ]
    return Run(
        found=found,
        name=found.name,
        config=read_settings(found, notes),
        points=points,
        quarantine=read_rows(found, "quarantine.jsonl", notes),
        skipped_updates=read_rows(found, "skipped_updates.jsonl", notes),
        left_out=read_rows(found, "left_out.jsonl", notes, LEFT_OUT_COLUMNS),
        notes=notes,
    )


def read_settings(found: Found, notes: list[str] | None = None) -> dict[str, str]:
    """Return the settings of a run or an evaluation, nested names joined by dots, without secrets."""
    return dict(flat(found.table("config.yaml", notes) or found.table("evaluation.json", notes)))


def read_rows(found: Found, name: str, notes: list[str], columns: Collection[str] = ()) -> dict[str, Any]:
    """Return the last rows of a JSON lines file for a table (`shown`), and their number (`total`).

    columns: of the table; () for all.
    """
    kept: deque[dict[str, str]] = deque(maxlen=MAX_ROWS)
    total = 0

    def take(place: int, size: int, record: dict[str, Any]) -> None:
        nonlocal total
        total += 1
        kept.append(table_row(record, columns))

    read_whole(found, name, take, notes)
    return {"shown": list(kept), "total": total}


def table_row(record: dict[str, Any], columns: Collection[str] = ()) -> dict[str, str]:
    """Return the cells of a table's row; absent values have none."""
    told = {
        key: value for key, value in record.items() if value is not None and (not columns or key in columns)
    }
    cells = {key[:100]: text(value)[:500] for key, value in told.items()}
    return cells | ({"path": short_path(cells["path"])} if "path" in cells else {})


def read_groups(run: Run, budget: int) -> tuple[list[dict[str, Any]], int]:
    """Return the groups of a run that fit into `budget` bytes of the page, by step, and their total number.

    If not all fit, the kept ones are spread evenly over the run, first and last included.
    """
    folder = run.found.folder
    index: dict[tuple[int, str], tuple[int, int, int, int]] = {}

    def take(place: int, size: int, record: dict[str, Any]) -> None:
        turns = [t for order in ORDERS for item in as_list(record.get(order)) for t in turns_of(item)]
        strips = [strip for part in (record, *turns) if (strip := strip_of(folder, part))]
        cost = size + sum(strip.stat().st_size * 4 // 3 for strip in strips)  # base64
        step = whole(record.get("step"))
        # A group that a resumed run recorded again replaces the earlier one.
        index[step, str(record.get("problem_id"))] = (step, place, size, cost)

    tail = read_whole(run.found, "rollouts.jsonl", take, run.notes)
    entries = sorted(index.values())
    chosen = [entries[i] for i in choose_evenly([entry[-1] for entry in entries], budget)]
    records = [record for _, place, size, _ in chosen if (record := tail.at(place, size))]
    return [group_of(record, picture_of(folder, record), folder) for record in records], len(entries)


def choose_evenly(costs: list[int], budget: int) -> list[int]:
    """Return the indices of the most items, evenly spaced from first to last, whose costs fit together.

    >>> choose_evenly([10] * 9, 50)
    [0, 2, 4, 6, 8]
    """

    def spread(count: int) -> list[int]:
        return [round(i * (len(costs) - 1) / max(1, count - 1)) for i in range(count)]

    numbers = range(len(costs) + 1)
    return spread(bisect(numbers, budget, key=lambda count: sum(costs[i] for i in spread(count))) - 1)


def picture_of(folder: Path, record: dict[str, Any]) -> str | None:
    """Return the picture with the frames of a group or a turn as a data address; None if there is none."""
    strip = strip_of(folder, record)
    return strip and f"data:image/jpeg;base64,{base64.b64encode(strip.read_bytes()).decode('ascii')}"


def group_of(record: dict[str, Any], strip: str | None, folder: Path) -> dict[str, Any]:
    """Return a group of rollouts.jsonl with every field in its expected type: a page never trusts a file.

    strip: address of the picture with its frames. folder: of the run.
    """
    record = current(record)
    frames = as_table(record.get("frames"))
    count = whole(frames.get("count"))
    shown = record.get("permutation")  # a contrast clip may have fewer frames or none
    permutation = [i for i in as_list(shown) if isinstance(i, int) and 0 <= i < count]
    contrast = record.get("contrast")
    is_whole = isinstance(shown, list) and len(permutation) == len(shown) <= count
    path = record.get("path", "")
    paths = path if isinstance(path, list) else [path]
    clips = [whole(length) for length in as_list(frames.get("clips"))]
    kind, answer = text(record.get("problem_type", "")), text(record.get("answer", ""))
    return {
        "step": whole(record.get("step")),
        "id": str(record.get("problem_id", "")),
        "problem": text(record.get("problem", "")),
        "type": kind,
        "media": text(record.get("data_type", "")),
        "play": text(record.get("play", "")),
        "options": [text(option) for option in as_list(record.get("options"))],
        "answer": answer,
        **place_of(f"<answer>{answer}</answer>", kind),
        "source": text(record.get("data_source", "")),
        "path": ", ".join(short_path(text(path)) for path in paths),
        "strip": strip if count else None,
        "count": count,
        "clips": clips if sum(clips) == count else [],  # frames of each, where there are several
        "width": finite(frames.get("width"), 1),
        "height": finite(frames.get("height"), 1),
        "timestamps": [finite(t) for t in as_list(frames.get("timestamps"))],
        "permutation": permutation if is_whole else None,
        "contrast": contrast if contrast in get_args(Contrast) else "shuffled",  # of older runs
        **{
            order: [
                _completion(item, kind, folder)
                for item in as_list(record.get(order))
                if isinstance(item, dict)
            ]
            for order in ORDERS
        },
        "p": finite(record.get("p")),
        "pShuffled": finite(record.get("p_contrast")),
    }


def place_of(output: str, kind: str) -> dict[str, Any]:
    """Return the place in an output of a grounding type as {"place": {"time", "boxes"}}, or {}."""
    said = read_answer(output[:MAX_TEXT], kind) if kind in GROUNDING_FORMS else ""
    return {"place": json.loads(said)} if said else {}


def turns_of(item: Any) -> list[dict[str, Any]]:
    """Return the turns of a completion that end with calls of tools."""
    return [turn for turn in as_list(as_table(item).get("turns")) if isinstance(turn, dict)][:MAX_TURNS]


def turn_of(turn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a turn of rollouts.jsonl as pages take it, its frames inside."""
    frames, calls = as_table(turn.get("frames")), [as_table(call) for call in as_list(turn.get("calls"))]
    times = [time for time in map(finite, as_list(frames.get("timestamps"))) if time is not None]
    return {
        "text": text(turn.get("text", ""))[:MAX_TEXT],
        "results": [text(call.get("result", ""))[:MAX_TEXT] for call in calls],
        "failed": any(call.get("failed") is True for call in calls),
        **words_of(turn),
        "strip": picture_of(folder, turn),
        "times": [min(times), max(times)] if times else None,
        "count": whole(frames.get("count")),
    }


def _completion(item: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    turns = [turn_of(turn, folder) for turn in turns_of(item)]
    rewards = as_table(item.get("rewards"))
    written, without = text(item.get("text", "")), finite(item.get("advantage_without_temporal"))
    return {
        "text": written[:MAX_TEXT] + (" … (cut here by the report)" if len(written) > MAX_TEXT else ""),
        "truncated": item.get("finish_reason") == "length",
        "rewards": {str(name): finite(value) for name, value in rewards.items()},
        **{name: finite(item.get(name)) for name in ("tokens", "total", "advantage")},
        **({} if without is None else {"without": without}),
        **words_of(item),
        **({} if not turns else {"turns": turns}),
        **place_of(written, kind),
    }


def words_of(item: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """Return a turn's words: {"words": [[word, drop]], "scored": [[word, policy, teacher]]}, or less."""
    found = {}
    for key, name, size in (("words", "word_drops", 2), ("scored", "word_logprobs", 3)):
        rows = [
            row for row in as_list(item.get(name))[:MAX_WORDS] if isinstance(row, list) and len(row) == size
        ]
        if rows:
            found[key] = [[text(row[0]), *(finite(number) or 0.0 for number in row[1:])] for row in rows]
    return found


def strip_of(folder: Path, record: dict[str, Any]) -> Path | None:
    """Return the file of a group's frames, None unless it is a JPEG inside the run folder."""
    name = as_table(record.get("frames")).get("strip")
    if not isinstance(name, str) or "\0" in name:
        return None
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        with path.open("rb") as file:
            return path if file.read(3) == b"\xff\xd8\xff" else None
    except (OSError, RuntimeError, ValueError):  # too long; links in a circle; half a surrogate pair
        return None
