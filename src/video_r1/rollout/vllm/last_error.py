"""What ended a vLLM server, in the server's own last answers.

A server's engine runs in processes of its own. When it dies, vLLM answers the requests under way with "see
stack trace (above)" and ends; the trainer, perhaps on another machine, cannot look above.

engine's process: exception logged ─► a file that all of the server's processes know ─► `say_why`: the answer
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

VARIABLE = "VIDEO_R1_LAST_ERROR"  # the file; set by the first process, inherited by the others
CONSEQUENCE = "EngineDeadError"  # what is logged where the engine is waited for; never the cause


class LastError(logging.Handler):
    """Keeps the last exception that was logged in the file, but not those that only pass it on."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        if not error or type(error).__name__ == CONSEQUENCE:
            return
        file, found = Path(os.environ[VARIABLE]), f"{type(error).__name__}: {error}"
        kept = file.read_text(encoding="utf-8")
        if not kept or kept.partition(": ")[2] not in found:
            file.write_text(found, encoding="utf-8")


def keep_last_error() -> None:
    """From now on, in this process of a server and in those that it starts."""
    if VARIABLE not in os.environ:
        handle, os.environ[VARIABLE] = tempfile.mkstemp(prefix="video-r1-serve-")
        os.close(handle)
        atexit.register(Path(os.environ[VARIABLE]).unlink, missing_ok=True)
    logging.getLogger("vllm").addHandler(LastError(logging.ERROR))


async def say_why(request: Any, call_next: Any) -> Any:
    """Middleware of the server: an answer of status 500 has the last error in place of its own text."""
    answer = await call_next(request)
    if answer.status_code != 500 or VARIABLE not in os.environ:
        return answer
    reason = Path(os.environ[VARIABLE]).read_text(encoding="utf-8")
    if not reason:
        return answer
    from starlette.responses import JSONResponse  # vLLM's

    return JSONResponse({"error": {"message": f"the server's last error was {reason}"}}, answer.status_code)
