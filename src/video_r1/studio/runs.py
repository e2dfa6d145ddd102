"""The addresses of runs: the list, one run's curves as they grow, its settings and what it set aside."""

import threading
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from video_r1.report.page import differing_settings
from video_r1.report.run_data import MAX_ROWS, text
from video_r1.studio.answers import Answer, number
from video_r1.studio.curves import Curves
from video_r1.studio.folders import Found, Library, read_settings
from video_r1.studio.left_out import LeftOut
from video_r1.studio.overview import listing, overview
from video_r1.studio.recorded import Recorded
from video_r1.studio.tail import Tail, last_lines

SKETCHED = 120  # points of a long run until it is read
OPEN_RUNS = 12  # whose columns and indexes are kept in memory
MAX_COMPARED = 8


class Reader:
    """What the server remembers of a run that somebody looks at. One request at a time reads on."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.lock = threading.Lock()
        self.begun = False
        self.curves, self.metrics = Curves(), Tail(found, "metrics.jsonl")
        self.recorded, self.left_out = Recorded(found), LeftOut(found)

    def points(self, life: int, have: int, width: int) -> dict[str, Any]:
        """New points of the curves; of a long file that is still being read, some from all over it."""
        with self.lock:
            # The first answer about a long file comes before any of it is read.
            begun, self.begun = self.begun, True
            self.metrics.read(self.curves.add, self.curves.clear, 0.25 if begun else 0.0)
            more, notes = self.metrics.more, self.metrics.notes
            if more and not have:
                sketch = Curves()
                for line in last_lines(self.found, self.metrics.name, 50_000, SKETCHED):
                    sketch.add(0, 0, line)
                return {**sketch.points(), "life": -1, "more": more, "notes": notes}
            good = life == self.curves.life
            points = self.curves.points(have if good else 0, width if good else 0)
            return {**points, "more": more, "notes": notes}


class Readers:
    """Readers by run; those that nobody has asked for lately are given up."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._open: dict[str, Reader] = {}
        self._lock = threading.Lock()

    def found(self, name: str | None) -> Found:
        """Raises HTTPException 404 where there is no such run."""
        found = self.library.runs().get(name or "")
        if found is None:
            raise HTTPException(404, "there is no such run: it was moved, or has no files yet")
        return found

    def reader(self, name: str | None) -> Reader:
        found = self.found(name)
        with self._lock:
            reader = self._open.pop(found.name, None)
            if reader is None or reader.found != found:
                reader = Reader(found)
            self._open[found.name] = reader
            while len(self._open) > OPEN_RUNS:
                self._open.pop(next(iter(self._open)))
            return reader


def readers(request: Request) -> Readers:
    return request.app.state.readers


def list_runs(request: Request) -> Answer:
    return Answer({"runs": listing(readers(request).library.runs())})


def one_run(request: Request) -> Answer:
    """A run's row of the list, its settings, and a table of the updates that it left out."""
    found = readers(request).found(request.query_params.get("run"))
    skipped = _rows(found, "skipped_updates.jsonl")
    return Answer({**overview(found), "config": read_settings(found), "skipped_updates": skipped})


def curves(request: Request) -> Answer:
    asked = request.query_params
    reader = readers(request).reader(asked.get("run"))
    return Answer(reader.points(*(number(asked, name) for name in ("life", "have", "width"))))


def compare(request: Request) -> Answer:
    """The settings in which runs differ."""
    names = request.query_params.getlist("run")[:MAX_COMPARED]
    settings = {name: read_settings(readers(request).found(name)) for name in names}
    return Answer({"differing": differing_settings(settings)})


def _rows(found: Found, name: str) -> dict[str, Any]:
    """The last rows of a file for a table, as the report shows them."""
    lines = last_lines(found, name, 1 << 20)
    cells = [{str(key)[:100]: text(value)[:500] for key, value in line.items()} for line in lines[-MAX_ROWS:]]
    return {"shown": cells, "total": len(lines)}


ROUTES = [
    Route("/api/runs", list_runs),
    Route("/api/run", one_run),
    Route("/api/curves", curves),
    Route("/api/compare", compare),
]
