"""A studio in a process of its own, for tests with a browser and for the benchmark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKEN = "token-of-all-tests"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def studio_client(*roots: Path, headers: dict[str, str] | None = None, **options: Any) -> Any:
    """A test client of the application over these folders, with the token."""
    from starlette.testclient import TestClient

    from video_r1.studio.server import application

    return TestClient(
        application(roots, TOKEN, **options), base_url="http://127.0.0.1:7860", follow_redirects=False,
        headers=AUTHORIZED | (headers or {}),
    )  # fmt: skip


def get(client: Any, path: str, **query: Any) -> Any:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


@contextmanager
def studio(*folders: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server over these folders, and its process, which is ended afterwards."""
    command = [sys.executable, "-m", "video_r1", "studio", *map(str, folders), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1], server
        finally:
            server.terminate()
