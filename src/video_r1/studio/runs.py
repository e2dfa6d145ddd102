"""Runs: the list, one run's curves as they grow, its settings, and its groups with their frames and clips."""

import threading
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from video_r1.report.page import differing_settings
from video_r1.report.run_data import MAX_ROWS, strip_of, text
from video_r1.studio.curves import Curves
from video_r1.studio.folders import Found, Library, read_settings
from video_r1.studio.groups import RecordedGroups, SkippedGroups
from video_r1.studio.manifests import row_of
from video_r1.studio.overview import listing, overview
from video_r1.studio.requests import Answer, Recent, number
from video_r1.studio.tail import Tail, last_lines

SKETCHED = 120  # points of a long run until it is read
OPEN_RUNS = 12  # whose columns and indexes stay in memory
MAX_COMPARED = 8
MAX_ENTRIES = 2000  # of one answer


class Reader:
    """The columns and indexes of one run's files. Hold `lock` while you read."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.lock = threading.Lock()
        self.is_open = False
        self.curves, self.metrics = Curves(), Tail(found, "metrics.jsonl")
        self.groups, self.skipped = RecordedGroups(found), SkippedGroups(found)

    def points(self, life: int, have: int, width: int) -> dict[str, Any]:
        """Return new points of the curves; while a long file is being read, a sketch of all of it."""
        with self.lock:
            # The first answer about a long file does not wait for it.
            seconds, self.is_open = 0.25 if self.is_open else 0.0, True
            self.metrics.read(self.curves.add, self.curves.clear, seconds)
            more, notes = self.metrics.more, self.metrics.notes
            if more and not have:
                sketch = Curves()
                for line in last_lines(self.found, self.metrics.name, 50_000, SKETCHED):
                    sketch.add(0, 0, line)
                return {**sketch.points(), "life": -1, "more": more, "notes": notes}
            good = life == self.curves.life
            return {**self.curves.points(*(have, width) if good else (0, 0)), "more": more, "notes": notes}


class Runs:
    """The runs below some folders, and the readers of those that were asked for last."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._readers: Recent[Found, Reader] = Recent(Reader, OPEN_RUNS)

    def found(self, name: str | None) -> Found:
        """Return a run's folder. Raises HTTPException 404."""
        found = self.library.runs().get(name or "")
        if found is None:
            raise HTTPException(404, "there is no such run: it was moved, or has no files yet")
        return found

    def reader(self, request: Request) -> Reader:
        """Return the reader of the run that a request names."""
        return self._readers.get(self.found(request.query_params.get("run")))


def runs_of(request: Request) -> Runs:
    return request.app.state.runs


def list_runs(request: Request) -> Answer:
    return Answer({"runs": listing(runs_of(request).library.runs())})


def one_run(request: Request) -> Answer:
    """Answer a run's row of the list, its settings, and a table of its skipped updates."""
    found = runs_of(request).found(request.query_params.get("run"))
    lines = last_lines(found, "skipped_updates.jsonl", 1 << 20)
    cells = [{str(key)[:100]: text(value)[:500] for key, value in line.items()} for line in lines[-MAX_ROWS:]]
    skipped = {"shown": cells, "total": len(lines)}
    return Answer({**overview(found), "config": read_settings(found), "skipped_updates": skipped})


def curves(request: Request) -> Answer:
    asked = request.query_params
    reader = runs_of(request).reader(request)
    return Answer(reader.points(*(number(asked, name) for name in ("life", "have", "width"))))


def compare(request: Request) -> Answer:
    """Answer the settings in which runs differ."""
    names = request.query_params.getlist("run")[:MAX_COMPARED]
    settings = {name: read_settings(runs_of(request).found(name)) for name in names}
    return Answer({"differing": differing_settings(settings)})


def entries(request: Request) -> Answer:
    """Answer entries of recorded groups from number `have` on; all of them if `life` is outdated."""
    asked = request.query_params
    reader = runs_of(request).reader(request)
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


def skipped_groups(request: Request) -> Answer:
    """Answer 50 groups and questions that taught the run nothing, from number `at` on, by `reason`."""
    asked = request.query_params
    reader = runs_of(request).reader(request)
    with reader.lock:
        reader.skipped.read()
        return Answer(reader.skipped.page(asked.get("reason", ""), number(asked, "at")))


def _entry(request: Request) -> tuple[Reader, int]:
    """Return the reader and the entry's number. Raises HTTPException 409 if the entries have changed."""
    reader = runs_of(request).reader(request)
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
    Route("/api/skipped", skipped_groups),
]
