"""What a server's processes log, and what its middleware makes of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from video_r1.rollout.vllm.serve import LAST_ERROR_VARIABLE, LastError, say_why


class EngineDeadError(Exception):
    """As vLLM names it."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error"
    path.touch()
    monkeypatch.setenv(LAST_ERROR_VARIABLE, str(path))
    return path


def log(error: Exception) -> None:
    logger = logging.Logger("vllm")
    logger.addHandler(LastError(logging.ERROR))
    logger.warning("not an error")
    logger.error("without an exception")
    try:
        raise error
    except Exception:
        logger.exception("The worker failed")


def test_the_cause_is_kept_and_not_what_follows_from_it(file: Path) -> None:
    log(ValueError("an older one"))
    log(MemoryError("12 GiB are too many"))
    log(RuntimeError("Worker failed with error '12 GiB are too many', see above"))
    log(EngineDeadError("see stack trace (above)"))
    assert file.read_text() == "MemoryError: 12 GiB are too many"


@pytest.mark.parametrize(("status", "logged"), [(200, True), (400, True), (500, False)])
def test_other_answers_stay_as_they_are(file: Path, status: int, logged: bool) -> None:
    file.write_text("MemoryError: full" if logged else "")
    answer = SimpleNamespace(status_code=status)

    async def answered(request: Any) -> Any:
        return answer

    assert asyncio.run(say_why(None, answered)) is answer
