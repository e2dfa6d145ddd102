"""A studio in a process of its own, for tests with a browser and for the benchmark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
