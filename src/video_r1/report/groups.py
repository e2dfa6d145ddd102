"""Recorded groups for the page's browser: which of them fit, and their frames as data."""

import base64
import json
from bisect import bisect
from pathlib import Path
from typing import Any, get_args

from video_r1.data.answers import read_answer
from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.report.run_data import Run, as_list, as_table, finite, json_lines, short_path, text, whole
from video_r1.settings.frames import Contrast

MAX_TEXT = 20_000  # characters of one completion
MAX_WORDS = 4000  # with their drops


def read_groups(run: Run, budget: int) -> tuple[list[dict[str, Any]], int]:
    """The groups of a run that fit into `budget` bytes of the page, by step, and how many it has.

    Where not all fit, the kept ones are spread evenly over the run, first and last included.
    """
    path = run.folder / "rollouts.jsonl"
    index: dict[tuple[int, str], tuple[int, int, int]] = {}
    for offset, length, record in json_lines(path, run.notes):
        strip = strip_of(run.folder, record)
        cost = length + (strip.stat().st_size * 4 // 3 if strip else 0)  # base64
        step = whole(record.get("step"))
        # A group that a resumed run recorded again replaces the earlier one.
        index[step, str(record.get("problem_id"))] = (step, offset, cost)
    entries = sorted(index.values())
    wanted = {entries[i][1] for i in choose_evenly([cost for _, _, cost in entries], budget)}
    groups = [
        group_of(record, inlined(strip_of(run.folder, record)))
        for offset, _, record in json_lines(path)
        if offset in wanted
    ]
    return sorted(groups, key=lambda group: group["step"]), len(entries)


def choose_evenly(costs: list[int], budget: int) -> list[int]:
    """Indices of the most items, evenly spaced from the first to the last, whose costs together fit.

    >>> choose_evenly([10] * 9, 50)
    [0, 2, 4, 6, 8]
    """

    def spread(count: int) -> list[int]:
        return [round(i * (len(costs) - 1) / max(1, count - 1)) for i in range(count)]

    numbers = range(len(costs) + 1)
    return spread(bisect(numbers, budget, key=lambda count: sum(costs[i] for i in spread(count))) - 1)


def inlined(strip: Path | None) -> str | None:
    """A picture as an address that holds it."""
    return strip and f"data:image/jpeg;base64,{base64.b64encode(strip.read_bytes()).decode('ascii')}"


def group_of(record: dict[str, Any], strip: str | None) -> dict[str, Any]:
    """A group of rollouts.jsonl with every field in its expected type: a page never trusts a file.

    strip: the address of the picture with its frames.
    """
    frames = as_table(record.get("frames"))
    count = whole(frames.get("count"))
    shown = record.get("permutation")  # of a contrast clip, which may have fewer frames or none
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
        "ordered": [
            _completion(item, kind) for item in as_list(record.get("ordered")) if isinstance(item, dict)
        ],
        "shuffled": [
            _completion(item, kind) for item in as_list(record.get("shuffled")) if isinstance(item, dict)
        ],
        "p": finite(record.get("p")),
        "pShuffled": finite(record.get("p_shuffled")),
    }


def place_of(output: str, kind: str) -> dict[str, Any]:
    """What an output of a grounding type says, tolerantly read, as {"place": {"time", "boxes"}}, or {}."""
    said = read_answer(output[:MAX_TEXT], kind) if kind in GROUNDING_FORMS else ""
    return {"place": json.loads(said)} if said else {}


def _completion(item: dict[str, Any], kind: str) -> dict[str, Any]:
    rewards = as_table(item.get("rewards"))
    pairs = [pair for pair in as_list(item.get("word_drops"))[:MAX_WORDS] if isinstance(pair, list)]
    words = [[text(pair[0]), finite(pair[1]) or 0.0] for pair in pairs if len(pair) == 2]
    written, without = text(item.get("text", "")), finite(item.get("advantage_without_temporal"))
    return {
        "text": written[:MAX_TEXT] + (" … (cut here by the report)" if len(written) > MAX_TEXT else ""),
        "truncated": item.get("finish_reason") == "length",
        "rewards": {str(name): finite(value) for name, value in rewards.items()},
        **{name: finite(item.get(name)) for name in ("tokens", "total", "advantage")},
        **({} if without is None else {"without": without}),
        **({} if not words else {"words": words}),
        **place_of(written, kind),
    }


def strip_of(folder: Path, record: dict[str, Any]) -> Path | None:
    """The strip's file. None unless it is a JPEG inside the run folder: the page is passed on to others."""
    name = as_table(record.get("frames")).get("strip")
    if not isinstance(name, str) or "\0" in name:
        return None
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        with path.open("rb") as file:
            return path if file.read(3) == b"\xff\xd8\xff" else None
    except (OSError, RuntimeError):  # a name that is too long; links in a circle
        return None
