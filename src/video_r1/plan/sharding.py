"""How the processes of a run share the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from video_r1.errors import ConfigError
from video_r1.settings.commands import GPUSharding

FLOAT32 = ("fp32", "float32", "float")  # as DeepSpeed reads it


@dataclass(frozen=True, slots=True)
class Sharding:
    """Which parts each process has a share of only."""

    name: str = "one GPU"
    processes: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    whole_in_step: bool = False  # weights that are shared out are gathered once for forward and backward
    master: bool = False  # the optimizer keeps float32 weights of its own beside bf16 ones (DeepSpeed)
    float32_gradients: bool = False  # those of bf16 weights are added up so (DeepSpeed)
    offload: bool = False  # the optimizer is in main memory

    @property
    def buckets(self) -> bool:
        """Whether DistributedDataParallel keeps a second copy of the gradients to send them in."""
        return self.processes > 1 and not (self.weights or self.gradients or self.optimizer)

    @property
    def fsdp(self) -> bool:
        """Whether weights are shared out by FSDP, which gathers them in the number format that computes."""
        return self.weights and not self.master

    def share(self, shared: bool) -> float:
        return 1 / self.processes if shared else 1.0


def sharding_of(training: Mapping[str, Any], gpus: int = 1, kind: GPUSharding | None = None) -> Sharding:
    """The sharding of this kind; without one, what TrainingArguments ask for. Raises ConfigError."""
    if kind in ("zero2", "zero3"):  # by the files that come with the recipes
        return _deepspeed(gpus, int(kind[-1]), offload=False, exact=True)
    if kind is None and training.get("deepspeed"):
        given = training["deepspeed"]
        options = given if isinstance(given, Mapping) else read_mapping(given)
        zero = options.get("zero_optimization", {})
        offload = bool(zero.get("offload_optimizer", {}).get("device", "none") != "none")
        exact = options.get("data_types", {}).get("grad_accum_dtype") in FLOAT32
        return _deepspeed(gpus, int(zero.get("stage", 0)), offload, exact)
    if kind == "fsdp2":
        return Sharding(f"{gpus} GPUs, FSDP2", gpus, True, True, True)
    if kind is None and training.get("fsdp"):
        options = training.get("fsdp_config") or {}
        options = dict(options) if isinstance(options, Mapping) else read_mapping(options)
        options = {name.removeprefix("fsdp_"): value for name, value in options.items()}
        asked = f"{training.get('fsdp', '')} {options.get('sharding_strategy', '')}".lower()
        keeps = options.get("reshard_after_forward") in (False, "false", "SHARD_GRAD_OP")
        keeps = keeps or "shard_grad_op" in asked
        offload = "offload" in asked or bool(options.get("offload_params", False))
        name = f"{gpus} GPUs, FSDP" + (" (weights whole in a step)" if keeps else "")
        return Sharding(name, gpus, True, True, True, whole_in_step=keeps, offload=offload)
    return Sharding(f"{gpus} GPUs, each with all weights" if gpus > 1 else "one GPU", gpus)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is no mapping of settings")
    return values


def _deepspeed(processes: int, stage: int, offload: bool, exact: bool) -> Sharding:
    name = f"{processes} GPUs, DeepSpeed ZeRO-{stage}{', optimizer in main memory' * offload}"
    return Sharding(
        name, processes, stage >= 3, stage >= 2, stage >= 1,
        master=True, float32_gradients=exact, offload=offload,
    )  # fmt: skip
