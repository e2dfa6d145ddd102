"""Runs: the list, one run's curves as they grow, its settings, and its groups with their frames and clips."""

import threading
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from video_r1.report.curves import Curves
from video_r1.report.page import differing_settings
from video_r1.report.reader import Found, Tail, last_lines
from video_r1.report.run_data import LEFT_OUT_COLUMNS, MAX_ROWS, read_settings, strip_of, table_row
from video_r1.studio.groups import RecordedGroups
from video_r1.studio.manifests import row_of
from video_r1.studio.overview import listing, overview
from video_r1.studio.requests import Answer, number

OPEN_RUNS = 12  # whose columns and indexes stay in memory
MAX_COMPARED = 8
MAX_ENTRIES = 2000  # of one answer
TABLES = {"skipped_updates": (), "left_out": LEFT_OUT_COLUMNS, "quarantine": ()}


class Reader:
    """The columns and the index of one run's files. Hold `lock` while you read."""

    def __init__(self, found: Found) -> None:
        self.found, self.lock = found, threading.Lock()
        self.metrics, self.groups = Tail(found, "metrics.jsonl"), RecordedGroups(found)
        self._restart()

    def _restart(self) -> None:
        self.curves = Curves()

    def points(self, stamp: str) -> dict[str, Any]:
        """Return the curves as far as they are read, unless they are still those of `stamp`."""
        with self.lock:
            seconds = 0.25 if stamp else 0.0  # the first answer about a long file does not wait for it
            self.metrics.read(lambda place, size, record: self.curves.add(record), self._restart, seconds)
            now = f"{self.metrics.life}.{self.metrics.place}"
            answer = {"stamp": now, "more": self.metrics.more, "notes": self.metrics.notes}
            return answer if now == stamp else answer | {"points": self.curves.points()}


def found_of(request: Request, name: str | None) -> Found:
    """Return a run's folder. Raises HTTPException 404."""
    found = request.app.state.library.runs().get(name or "")
    if found is None:
        raise HTTPException(404, "there is no such run: it was moved, or has no files yet")
    return found


def reader_of(request: Request) -> Reader:
    """Return the reader of the run that a request names."""
    return request.app.state.readers(found_of(request, request.query_params.get("run")))


def list_runs(request: Request) -> Answer:
    return Answer({"runs": listing(request.app.state.library.runs())})


def one_run(request: Request) -> Answer:
    """Answer a run's row of the list, its settings, and tables of what it skipped last."""
    found = found_of(request, request.query_params.get("run"))
    tables = {}
    for name, columns in TABLES.items():
        lines = last_lines(found, f"{name}.jsonl")[-MAX_ROWS:]
        tables[name] = {"shown": [table_row(line, columns) for line in reversed(lines)]}
    return Answer({**overview(found), "config": read_settings(found), **tables})


def curves(request: Request) -> Answer:
    return Answer(reader_of(request).points(request.query_params.get("stamp", "")))


def compare(request: Request) -> Answer:
    """Answer the settings in which runs differ."""
    names = request.query_params.getlist("run")[:MAX_COMPARED]
    settings = {name: read_settings(found_of(request, name)) for name in names}
    return Answer({"differing": differing_settings(settings)})


def entries(request: Request) -> Answer:
    """Answer entries of recorded groups from number `have` on; all of them if `life` is outdated."""
    asked = request.query_params
    reader = reader_of(request)
    life, have = number(asked, "life"), number(asked, "have")
    with reader.lock:
        groups = reader.groups
        groups.read()
        first = have if life == groups.life and have >= 0 else 0
        page = groups.entries[first : first + MAX_ENTRIES]
        more = groups.tail.more or first + len(page) < len(groups.entries)
        notes = groups.tail.notes
        return Answer({"life": groups.life, "from": first, "entries": page, "more": more, "notes": notes})


def group(request: Request) -> Answer:
    """Answer one recorded group; its clip plays if a manifest below the folders has the question."""
    reader, at = _entry(request)
    with reader.lock:
        found = reader.groups.group(at, f"/api/frames?{request.url.query}")
    if found is None:
        raise HTTPException(404, "this group is not in rollouts.jsonl any more: the run was started again")
    indexes = request.app.state.manifests.indexes(0.1)
    clip = row_of(indexes, found["id"], found["answer"], found.pop("question"))
    return Answer({**found, "clip": clip})


def frames(request: Request) -> Response:
    """Answer a group's frames side by side, as one JPEG."""
    reader, at = _entry(request)
    with reader.lock:
        record = reader.groups.record(at)
    strip = strip_of(reader.found.folder, record) if record is not None else None
    if strip is None:
        raise HTTPException(404, "the frames of this group are not in the run folder")
    return FileResponse(strip, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})


def _entry(request: Request) -> tuple[Reader, int]:
    """Return the reader and the entry's number. Raises HTTPException 409 if the entries have changed."""
    reader = reader_of(request)
    at, life = (number(request.query_params, name) for name in ("at", "life"))
    if reader.groups.life != life:
        raise HTTPException(409, "these groups were replaced: the run was started again")
    return reader, at


ROUTES = [
    Route("/api/runs", list_runs),
    Route("/api/run", one_run),
    Route("/api/curves", curves),
    Route("/api/compare", compare),
    Route("/api/entries", entries),
    Route("/api/group", group),
    Route("/api/frames", frames),
]
