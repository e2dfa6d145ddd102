"""The launch files that come with the recipes, read by the libraries' own loaders."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

RECIPES = Path(str(resources.files("video_r1") / "recipes"))
LAUNCH_FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
ZERO_FILES = sorted((RECIPES / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_file(path: Path) -> None:
    """accelerate takes it, and every option of FSDP and DeepSpeed in it is one that accelerate has."""
    config: Any = load_config_from_file(str(path))
    kind = config.distributed_type
    written = yaml.safe_load(path.read_text())
    assert str(getattr(kind, "value", kind)) == written["distributed_type"]
    assert config.num_processes == 8 * config.num_machines
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for name in (*written.get("fsdp_config", {}), *written.get("deepspeed_config", {})):
        assert name in known, name
    if kind == "FSDP":
        # whole folders that from_pretrained loads, see docs/reliability.md
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("path", ZERO_FILES, ids=lambda path: path.stem)
def test_zero_file(path: Path) -> None:
    """Settings that the Trainer has too are "auto": the recipe fills them in, nothing can contradict it."""
    config = json.loads(path.read_text())
    assert config["zero_optimization"]["stage"] == int(path.stem[-1])
    for name in ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size"):
        assert config[name] == "auto"
    assert config["train_micro_batch_size_per_gpu"] == config["bf16"]["enabled"] == "auto"
