"""`video-r1 studio`: the application of all parts, and its server."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from video_r1.errors import RequestError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
except ModuleNotFoundError as missing:
    raise RequestError(
        "studio needs the packages starlette and uvicorn: pip install 'video-r1[studio]'"
    ) from missing

from video_r1.report.reader import Refused
from video_r1.studio import ask, evaluations, manifests, runs
from video_r1.studio.clips import Uploads
from video_r1.studio.folders import Library
from video_r1.studio.requests import LOCAL, Access, Answer, token_of

PARTS = (runs, ask, manifests, evaluations)
"""The parts of the page; each lists its addresses in ROUTES."""
KINDS = {".css": "text/css", ".js": "text/javascript"}


def application(
    roots: Sequence[str | Path], token: str, any_host: bool = False, engines: Sequence[str] = ()
) -> Starlette:
    """Build the whole server, for uvicorn and for tests.

    token: what every request has to bring. engines: addresses that may receive API keys of the environment.
    """
    page = (files("video_r1.studio") / "studio.html").read_text("utf-8")
    rooms = [files("video_r1.report"), files("video_r1.studio")]  # charts and rollouts are the report's
    texts = {
        file.name: file.read_text("utf-8")
        for room in rooms
        for file in room.iterdir()
        if file.name.endswith(tuple(KINDS))
    }

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in texts:
            raise HTTPException(404, "there is no such file")
        return Response(texts[name], media_type=KINDS[Path(name).suffix])

    app = Starlette(
        routes=[
            Route("/", lambda request: Response(page, media_type="text/html")),
            Route("/page/{name}", static),
            Route("/favicon.ico", lambda request: Response(status_code=204)),
            *(r for part in PARTS for r in part.ROUTES),
        ],
        middleware=[
            Middleware(Access, token=token, any_host=any_host),
            Middleware(GZipMiddleware, compresslevel=3),
        ],
        exception_handlers={
            HTTPException: _refused,
            **dict.fromkeys((OSError, Refused, ValueError, RecursionError), _unreadable),
        },
        lifespan=_lifespan,
    )
    app.state.library = library = Library(roots)
    app.state.manifests, app.state.readers = (
        manifests.Manifests(library),
        lru_cache(runs.OPEN_RUNS)(runs.Reader),
    )
    app.state.predictions = lru_cache(evaluations.OPEN_FILES)(evaluations.Predictions)
    app.state.key_origins = {origin for engine in engines for origin in ask.origins_of(engine)}
    app.state.model, app.state.decoder = ask.ModelProcess(), ask.ModelProcess()
    app.state.uploads, app.state.adding = Uploads(), asyncio.Lock()
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    await app.state.model.close()
    await app.state.decoder.close()
    app.state.uploads.close()


def run_studio(
    folders: Sequence[str] | None = None, host: str = "127.0.0.1", port: int = 7860, token: str | None = None,
    token_file: str | None = None, engines: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Print the address and serve the page until Ctrl-C.

    Raises RequestError when a folder does not exist, the token is too short or the port is taken.
    """
    roots = [Path(folder) for folder in folders or ["runs" if Path("runs").is_dir() else "."]]
    for root in roots:
        if not root.is_dir():
            raise RequestError(f"{root}: no such folder; name folders with runs, or one above them")
    secret, is_new = token_of(token, token_file)
    app = application(roots, secret, host not in (*LOCAL, "::1"), engines or ())
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
    entry = f"?token={secret}" if is_new else ""  # a token that was given is not printed
    print(f"studio of {', '.join(map(str, roots))}: {address}{entry}", flush=True)
    config = uvicorn.Config(app, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def _refused(request: Request, error: Any) -> Response:
    return Answer({"error": error.detail}, error.status_code)


def _unreadable(request: Request, error: Exception) -> Response:
    what = error.strerror if isinstance(error, OSError) else str(error)
    return Answer({"error": f"the files cannot be read: {what}"[:1000]}, 503)
