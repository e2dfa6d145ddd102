"""Packages that some settings need and that not everyone has: which, and how to install them. Torch-free."""

from __future__ import annotations

import re
from importlib.util import find_spec

from video_r1.errors import ConfigError

BITSANDBYTES_OPTIMIZERS = re.compile(r"(paged_\w+|adamw_(bnb_)?8bit|ademamix\w*|lion_\w+|rmsprop_bnb\w*)")
"""Names of `optim`, as TrainingArguments spells them, that are bitsandbytes'."""


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


def is_bitsandbytes_optimizer(name: str) -> bool:
    """Whether it is bitsandbytes that has this optimizer (a value of `optim`)."""
    return BITSANDBYTES_OPTIMIZERS.fullmatch(name) is not None


def check_bitsandbytes(setting: str) -> None:
    """Raises ConfigError, naming the setting that needs it, when bitsandbytes is not installed."""
    if not has_bitsandbytes():
        raise ConfigError(f"{setting} needs the package bitsandbytes: pip install 'video-r1[qlora]'")


def check_math_verify(manifest: object) -> None:
    """Raises ConfigError, naming the manifest whose answers need it, when math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ConfigError(
            f"{manifest} has questions of the type math, whose answers the package math-verify compares: "
            "pip install 'video-r1[math]'"
        )


def check_optimizer(name: str) -> None:
    """Raises ConfigError when it is bitsandbytes that has this optimizer, and that is not installed."""
    if is_bitsandbytes_optimizer(name):
        check_bitsandbytes(f"optim: {name}")
