"""The addresses of recorded groups: their entries, one group, its frames, marks, and what was left out."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from video_r1.errors import RequestError
from video_r1.report.groups import strip_of
from video_r1.report.run_data import text, whole
from video_r1.studio.answers import Answer, body_of, number
from video_r1.studio.data import manifests, row_of
from video_r1.studio.marks import add_mark, marks_of
from video_r1.studio.runs import Reader, readers

MAX_ENTRIES = 2000  # of one answer


def entries(request: Request) -> Answer:
    """Entries from number `have` on; all where `life` is no longer theirs."""
    asked = request.query_params
    reader = readers(request).reader(asked.get("run"))
    life, have = number(asked, "life"), number(asked, "have")
    with reader.lock:
        recorded = reader.recorded
        recorded.read()
        first = have if life == recorded.life and have >= 0 else 0
        page = recorded.entries[first : first + MAX_ENTRIES]
        more = recorded.tail.more or first + len(page) < len(recorded.entries)
        answer = {
            "life": recorded.life,
            "from": first,
            "entries": page,
            "more": more,
            "notes": recorded.tail.notes,
        }
    return Answer({**answer, "marks": marks_of(reader.found)})


def group(request: Request) -> Answer:
    reader, at = _asked(request.query_params, request)
    with reader.lock:
        address = f"/api/frames?{request.url.query}"
        found = reader.recorded.group(at, address)
    if found is None:
        raise HTTPException(404, "this group is not in rollouts.jsonl any more: the run was started again")
    # The clip itself plays where a manifest below the folders has the question.
    clip = row_of(manifests(request).indexes(0.1), found["id"], found["answer"], found.pop("question"))
    return Answer({**found, "clip": clip})


def frames(request: Request) -> Response:
    """The strip of a group: its frames side by side, as one JPEG."""
    reader, at = _asked(request.query_params, request)
    with reader.lock:
        record = reader.recorded.record(at)
    strip = strip_of(reader.found.folder, record) if record is not None else None
    if strip is None:
        raise HTTPException(404, "the frames of this group are not in the run folder")
    return FileResponse(strip, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})


async def mark(request: Request) -> Answer:
    """Marks a completion, or takes it back {"run", "life", "at", "order", "completion", "marked", "note"}."""
    asked = await body_of(request)
    return Answer(await run_in_threadpool(_mark, request, asked))


def _mark(request: Request, asked: dict[str, Any]) -> dict[str, Any]:
    reader, at = _asked(asked, request)
    with reader.lock:
        record = reader.recorded.record(at)
        if record is None:
            raise HTTPException(404, "this group is not in rollouts.jsonl any more")
        try:
            add_mark(
                reader.found, record, text(asked.get("order")), whole(asked.get("completion")),
                asked.get("marked") is True, text(asked.get("note", "")),
            )  # fmt: skip
        except RequestError as error:
            raise HTTPException(400, str(error)) from error
        except OSError as error:
            raise HTTPException(507, f"marks.jsonl cannot be written: {error.strerror}") from error
    return {"marks": marks_of(reader.found)}


def left_out(request: Request) -> Answer:
    """Groups and questions that the run left out, 50 from number `at` on, of one `reason` or of all."""
    asked = request.query_params
    reader = readers(request).reader(asked.get("run"))
    with reader.lock:
        reader.left_out.read()
        return Answer(reader.left_out.page(asked.get("reason", ""), number(asked, "at")))


def _asked(asked: Any, request: Request) -> tuple[Reader, int]:
    """The reader and the entry's number. Raises HTTPException 409 where the entries are others by now."""
    name = asked.get("run")
    reader = readers(request).reader(name if isinstance(name, str) else None)
    at, life = number(asked, "at"), number(asked, "life")
    if reader.recorded.life != life:
        raise HTTPException(409, "these groups were replaced: the run was started again")
    return reader, at


ROUTES = [
    Route("/api/entries", entries),
    Route("/api/group", group),
    Route("/api/frames", frames),
    Route("/api/marks", mark, methods=["POST"]),
    Route("/api/left", left_out),
]
