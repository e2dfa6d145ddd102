"""The application of all parts, and its server."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from video_r1.errors import RequestError
from video_r1.studio import asking, data, evaluations, rollouts, runs
from video_r1.studio.access import Access
from video_r1.studio.answers import Answer
from video_r1.studio.finding import Finder
from video_r1.studio.folders import Library, Refused
from video_r1.studio.model_process import ModelProcess
from video_r1.studio.runs import Readers
from video_r1.studio.uploads import Uploads

PARTS = (runs, rollouts, asking, data, evaluations)
"""What the page is made of; each has its addresses in ROUTES."""
PAGE_FILES = {
    "page.css": "report", "charts.js": "report", "curves.js": "report", "places.js": "report",
    "frames.js": "report", "rollouts.js": "report",
    "studio.css": "studio", "studio.js": "studio", "list.js": "studio", "left.js": "studio",
    "run.js": "studio", "clips.js": "studio", "ask.js": "studio", "data.js": "studio", "versus.js": "studio",
}  # fmt: skip
"""The files that a browser asks for, and the room that each lies in: charts and rollouts are the report's."""
KINDS = {".css": "text/css", ".js": "text/javascript"}


def application(
    roots: Sequence[str | Path], token: str | None = None, hosts: Sequence[str] = ()
) -> Starlette:
    """The whole server, for uvicorn and for tests. token: asked of everyone where it is given."""
    page = (files("video_r1.studio") / "studio.html").read_text("utf-8")
    texts = {name: (files(f"video_r1.{room}") / name).read_text("utf-8") for name, room in PAGE_FILES.items()}

    def index(request: Request) -> Response:
        return Response(page, media_type="text/html")

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in texts:
            raise HTTPException(404, "there is no such file")
        return Response(texts[name], media_type=KINDS[Path(name).suffix])

    def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    app = Starlette(
        routes=[
            Route("/", index),
            Route("/page/{name}", static),
            Route("/favicon.ico", no_icon),
            *(r for part in PARTS for r in part.ROUTES),
        ],
        middleware=[
            Middleware(Access, token=token, hosts=hosts),
            Middleware(GZipMiddleware, compresslevel=3),
        ],
        exception_handlers={HTTPException: _said, OSError: _unreadable, Refused: _unreadable},
        lifespan=_lifespan,
    )
    library = Library(roots)
    app.state.readers = Readers(library)
    app.state.manifests = data.Manifests(Finder(library))
    app.state.evaluations = evaluations.Evaluations()
    app.state.model, app.state.uploads, app.state.adding = ModelProcess(), Uploads(), asyncio.Lock()
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    await app.state.model.close()
    app.state.uploads.close()


def serve(roots: Sequence[Path], host: str, port: int, token: str | None) -> None:
    """Prints the address and serves until it is told to end."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # from now on, so that the address that is printed answers
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        remedy = "another studio may be open; choose another --port" if taken else "choose another --host"
        raise RequestError(f"{host}:{port} cannot be listened on: {error.strerror}; {remedy}") from error
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    print(
        f"studio of {', '.join(map(str, roots))}: {address}{f'?token={token}' if token else ''}", flush=True
    )
    config = uvicorn.Config(application(roots, token), log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def _said(request: Request, error: Any) -> Response:
    return Answer({"error": error.detail}, error.status_code)


def _unreadable(request: Request, error: Exception) -> Response:
    what = error.strerror if isinstance(error, OSError) else str(error)
    return Answer({"error": f"the run's files cannot be read: {what}"}, 503)
