"""How the processes of a run share the model, read from its settings and from accelerate's file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from video_r1.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sharding:
    """Which parts each process has a share of only."""

    name: str = "one process"
    processes: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    whole_in_step: bool = False  # weights that are shared out are gathered once for forward and backward
    master: bool = False  # the optimizer keeps float32 weights of its own beside bf16 ones (DeepSpeed)
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


def sharding_of(
    training: Mapping[str, Any], processes: int | None = None, accelerate_config: str | Path | None = None
) -> Sharding:
    """The sharding that the TrainingArguments or accelerate's file ask for. Raises ConfigError."""
    launch = {} if accelerate_config is None else read_mapping(accelerate_config)
    count = processes or int(launch.get("num_processes", 1))
    if training.get("deepspeed"):
        given = training["deepspeed"]
        zero = (given if isinstance(given, Mapping) else read_mapping(given)).get("zero_optimization", {})
        offload = bool(zero.get("offload_optimizer", {}).get("device", "none") != "none")
        return _deepspeed(count, int(zero.get("stage", 0)), offload)
    kind = str(launch.get("distributed_type", "")).upper()
    if kind == "DEEPSPEED":
        deepspeed = launch.get("deepspeed_config", {})
        if deepspeed.get("deepspeed_config_file"):
            return sharding_of({"deepspeed": deepspeed["deepspeed_config_file"]}, count)
        offload = deepspeed.get("offload_optimizer_device", "none") not in ("none", None)
        return _deepspeed(count, int(deepspeed.get("zero_stage", 2)), offload)
    if training.get("fsdp") or kind == "FSDP":
        options = training.get("fsdp_config") or {}
        options = dict(options) if isinstance(options, Mapping) else read_mapping(options)
        options |= launch.get("fsdp_config", {}) if kind == "FSDP" else {}
        options = {name.removeprefix("fsdp_"): value for name, value in options.items()}
        asked = f"{training.get('fsdp', '')} {options.get('sharding_strategy', '')}".lower()
        keeps = options.get("reshard_after_forward") in (False, "false", "SHARD_GRAD_OP")
        keeps = keeps or "shard_grad_op" in asked
        offload = "offload" in asked or bool(options.get("offload_params", False))
        name = f"{count} processes, FSDP" + (" (weights whole in a step)" if keeps else "")
        return Sharding(name, count, True, True, True, whole_in_step=keeps, offload=offload)
    return Sharding(f"{count} processes, each with all weights" if count > 1 else "one process", count)


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


def _deepspeed(processes: int, stage: int, offload: bool) -> Sharding:
    name = f"{processes} processes, DeepSpeed ZeRO-{stage}{', optimizer in main memory' * offload}"
    return Sharding(name, processes, stage >= 3, stage >= 2, stage >= 1, master=True, offload=offload)
