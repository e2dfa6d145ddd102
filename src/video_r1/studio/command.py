"""`video-r1 studio`: the request is checked here, before the packages of the server are imported."""

import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from video_r1.errors import RequestError


def run_studio(
    folders: Sequence[str] | None = None, host: str = "127.0.0.1", port: int = 7860, token: str | None = None
) -> None:
    """Serves the page until Ctrl-C. Raises RequestError where a folder does not exist, the extra is missing
    or the port is taken.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise RequestError("studio needs the packages starlette and uvicorn: pip install 'video-r1[studio]'")
    roots = [Path(folder) for folder in folders or ["runs" if Path("runs").is_dir() else "."]]
    for root in roots:
        if not root.is_dir():
            raise RequestError(f"{root}: no such folder; name folders with runs, or one above them")
    from video_r1.studio.server import serve

    local = host in ("127.0.0.1", "localhost", "::1")
    if not local and token is None:
        token = secrets.token_urlsafe(24)
    serve(roots, host, port, token)
