"""Completions that a person has marked: `marks.jsonl` beside the run, a line for each mark or its removal."""

import time
from collections.abc import Mapping
from typing import Any

from video_r1.errors import RequestError
from video_r1.files import append_line
from video_r1.report.run_data import as_list, as_table, text
from video_r1.studio.folders import Found
from video_r1.studio.tail import last_lines

FILE = "marks.jsonl"
READ_BYTES = 4 << 20
MAX_NOTE = 2000  # characters


def add_mark(
    found: Found, record: dict[str, Any], order: str, completion: int, marked: bool, note: str
) -> dict:
    """Appends a mark of one completion of a recorded group, with its text, and returns the line.

    Raises RequestError where there is no such completion or the file is not the run's own, OSError when it
    cannot be written.
    """
    items = as_list(record.get(order)) if order in ("ordered", "shuffled") else []
    if not 0 <= completion < len(items):
        raise RequestError(f"there is no completion {completion} {order[:20]!r} in this group")
    path = found.folder / FILE
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise RequestError(f"{FILE} is a link or no plain file, so nothing is written to it: remove it")
    line = {
        "step": record.get("step"),
        "problem_id": record.get("problem_id"),
        "order": order,
        "completion": completion,
        "marked": marked,
        "note": note[:MAX_NOTE],
        "text": text(as_table(items[completion]).get("text", "")),
        "time": round(time.time()),
    }
    append_line(path, line)
    return line


def marks_of(found: Found) -> list[str]:
    """What is marked now: `key`s of completions."""
    marked = {key(line): line.get("marked") is True for line in last_lines(found, FILE, READ_BYTES)}
    return [name for name, still in marked.items() if still]


def key(line: Mapping[str, Any]) -> str:
    """One name of a completion, as the page builds it."""
    return "/".join(str(line.get(name)) for name in ("step", "problem_id", "order", "completion"))
