"""Optional packages and the Hugging Face hub: whether they are there, and what to do if not. Torch-free."""

import functools
import logging
import os
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

from video_r1.errors import ConfigError

logger = logging.getLogger(__name__)

BITSANDBYTES_OPTIMIZERS = re.compile(r"(paged_\w+|adamw_(bnb_)?8bit|ademamix\w*|lion_\w+|rmsprop_bnb\w*)")
"""Values of TrainingArguments' `optim` that need bitsandbytes."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LOCAL_FOLDERS = ("runs", "data")
"""Folders of this package's recipes for runs and manifests. They are never owners on the hub."""
SECONDS = 5.0


def may_have_gpu() -> bool:
    """Return False if this machine has certainly no GPU: Linux without the device file of any accelerator."""
    if sys.platform != "linux" or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return sys.platform != "linux"
    names = ("nvidia*", "kfd", "dxg", "dri", "accel*", "davinci*")  # NVIDIA, AMD, WSL, Intel, TPU, NPU
    return any(any(Path("/dev").glob(name)) for name in names)


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


def check_bitsandbytes(setting: str) -> None:
    """Raise ConfigError, naming the setting that needs it, when bitsandbytes is not installed."""
    if not has_bitsandbytes():
        raise ConfigError(f"{setting} needs the package bitsandbytes: pip install 'video-r1[qlora]'")


def check_optimizer(name: str) -> None:
    if BITSANDBYTES_OPTIMIZERS.fullmatch(name):
        check_bitsandbytes(f"optim: {name}")


def check_math_verify(manifest: object) -> None:
    """Raise ConfigError, naming the manifest with math questions, when math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ConfigError(
            f"{manifest} has questions of the type math, whose answers the package math-verify compares: "
            "pip install 'video-r1[math]'"
        )


@functools.cache
def imported(place: str, setting: str) -> Any:
    """Import `module:function` or `file.py:function`. Raises ConfigError, which names the setting."""
    home, _, name = place.rpartition(":")
    try:
        return run_path(home)[name] if home.endswith(".py") else getattr(import_module(home), name)
    except Exception as error:  # the file is the user's: whatever it raises is reported
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{setting}: {place} cannot be imported ({reason}); write module:function or file.py:function"
        ) from error


def is_hub_id(name: str) -> bool:
    """Return whether `name`, which does not exist here, can be an id owner/name on the hub.

    It counts as a missing path when it begins with `.`, `/` or `~`, has more than one slash, or begins with
    a folder that exists in the working directory or is one of LOCAL_FOLDERS.
    """
    if not HUB_ID.fullmatch(name):
        return False
    first = name.partition("/")[0]
    return first not in LOCAL_FOLDERS and not Path(first).is_dir()


def check_checkpoint(path: str | Path, with_weights: bool = True) -> None:
    """Raise ConfigError, without asking the hub, for a folder that is missing or no whole model."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if with_weights and (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{path}: these are adapters; make a checkpoint: video-r1 merge {path} OUT")
        if with_weights and not (folder / "config.json").is_file():
            raise ConfigError(f"{path}: no config.json; a checkpoint folder is written by save_pretrained")
    elif folder.exists():
        raise ConfigError(f"{path}: this is a file; name the checkpoint folder")
    elif not is_hub_id(str(path)):
        raise ConfigError(f"{path}: no such folder, and not the id of a model on the hub")


def check_adapters(folder: Path) -> None:
    """Raise ConfigError unless the folder holds adapters, to be merged."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; name the run folder of a use_peft training")
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder}: not a LoRA run (no adapter_config.json): nothing to merge, use it as it is"
        )


@functools.cache
def ask_the_hub() -> None:
    """Check once a process that the hub can be reached; if not, set its client offline (HF_HUB_OFFLINE=1).

    An offline client uses downloaded files and fails at once for the rest; otherwise it retries for 25
    seconds, for each file.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # requests, httpx or another client, by version: any error is no answer
        logger.warning("%s does not answer (%s): only downloaded files are used", constants.ENDPOINT, error)
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes and libraries that start later
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
