"""Fields of TRL's `GRPOConfig` that are no settings here: translated, or refused with what to use instead.

Every other field is a setting of the same name and meaning; docs/coming-from-trl.md lists all.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from video_r1.settings.base import Problem, raise_problems
from video_r1.settings.types import FALSE_WORDS, NONE_WORDS, TRUE_WORDS

REFUSED: dict[str, tuple[Any, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
"""By name: TRL's default, which changes nothing here, and what to do instead of other values."""

DEFAULTS: dict[str, Any] = {
    "beta": 0.0, "loss_type": "dapo", "max_completion_length": 512, "num_generations": 8, "epsilon": 0.2,
    "scale_rewards": "group", "learning_rate": 1e-6, "lr_scheduler_type": "linear", "weight_decay": 0.0,
    "max_grad_norm": 1.0, "num_train_epochs": 3.0, "temperature": 1.0, "gradient_checkpointing": True,
}  # fmt: skip
"""TRL's defaults of settings that decide what is learnt; a run says which of its own differ."""


def take(settings: dict[str, Any], name: str) -> Any:
    """Remove a setting and return its value, which may be the text of a command line; None if it has none."""
    value = settings.pop(name, None)
    value = yaml.safe_load(value) if isinstance(value, str) else value
    return None if str(value).lower() in ("{}", *NONE_WORDS) else value


ENGINE = ("use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port")
"""TRL's names of what is `engine` here."""


def overridden(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of two layers: `above` decides, also where one names the engine in TRL's words."""
    values = dict(below)
    if "engine" in above:
        values = {name: value for name, value in values.items() if name not in ENGINE}
    elif above.keys() & {*ENGINE} and "engine" in values:
        engine = str(values.pop("engine"))
        values["use_vllm"] = engine != "transformers"
        values |= {"vllm_server_base_url": engine} if ":" in engine else {}
    return values | dict(above)


def with_engine(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with `engine` in place of TRL's names. Raises ConfigError."""
    settings = dict(values)
    used, mode, address, host, port = (take(settings, name) for name in ENGINE)
    if mode == "server" and not address and (host or port):
        address = f"http://{host or '0.0.0.0'}:{port or 8000}"
    engine = address if address and mode != "colocate" else "vllm" if used else None
    if used is False:
        engine = "transformers"
    elif mode == "server" and not address:
        raise_problems([("vllm_mode", "is server; name its address: engine http://host:8000")])
    elif mode not in (None, "colocate", "server"):
        raise_problems([("vllm_mode", f"is {mode!r}; set engine: transformers, vllm or http://host:8000")])
    if used not in (None, True, False):
        raise_problems([("use_vllm", f"is {used!r}; it must be true or false")])
    if engine and str(settings.setdefault("engine", engine)) != engine:
        raise_problems([("engine", f"is {settings['engine']}, while TRL's settings mean {engine}; keep one")])
    return settings


def translated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return settings without TRL's own names and forms, and what is wrong with those that are refused.

    Raises ConfigError as `with_engine`.
    """
    settings, found = with_engine(values), []

    def number(name: str, default: float) -> float:
        return float(settings.get(name) or default)

    for name, (off, instead) in REFUSED.items():
        if (value := take(settings, name)) not in (None, off):
            found.append((name, f"is {value!r}; {instead}"))
    for name in ("reward_weights", "max_prompt_length"):  # None: the default
        if name in settings and (value := take(settings, name)) is not None:
            settings[name] = value
    if (scale := str(settings.get("scale_rewards")).lower()) in TRUE_WORDS + FALSE_WORDS:
        settings["scale_rewards"] = "group" if scale in TRUE_WORDS else "none"
    for name, value in (take(settings, "model_init_kwargs") or {}).items():
        own = "dtype" if name == "torch_dtype" else name
        if own in ("dtype", "attn_implementation", "trust_remote_code"):
            settings.setdefault(own, str(value).removeprefix("torch.") if own == "dtype" else value)
        else:
            found.append(("model_init_kwargs", f"has {name}; pass a model that was loaded with it"))
    steps = number("gradient_accumulation_steps", 1)
    batch = steps * number("per_device_train_batch_size", 1) * int(os.environ.get("WORLD_SIZE", 1))
    for name, same in (("steps_per_generation", steps), ("generation_batch_size", batch)):
        if (value := take(settings, name)) not in (None, same):
            said = f"is {value}; each step samples its own rollouts: make it {same:g}"
            found.append((name, f"{said} or remove it (num_iterations uses rollouts again)"))
    if (value := take(settings, "num_completions_to_print")) is not None:
        settings.setdefault("log_rollouts", math.ceil(value / number("num_generations", 8)))
    for name in ("log_completions", "log_unique_prompts"):  # rollouts are recorded, each prompt once
        take(settings, name)
    if (value := take(settings, "vllm_max_model_length")) is not None:
        settings.setdefault("max_prompt_length", int(value - number("max_completion_length", 768)))
    renamed = {
        "max_tool_calling_iterations": "max_looks",
        "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    }
    for name, own in renamed.items():
        if (value := take(settings, name)) is not None:
            settings.setdefault(own, value)
    if take(settings, "use_bias_correction_kl") and float(settings.get("beta", 0.04)):
        found.append(("use_bias_correction_kl", "is true; here KL has no ratio: set it to false, or beta 0"))
    return settings, found
