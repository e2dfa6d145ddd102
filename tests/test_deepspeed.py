"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes on CPU (gloo), with the files that come with the recipes."""

from __future__ import annotations

import importlib.util
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from distributed_process import run_processes
from test_distributed import same_run
from tiny_models import tiny_checkpoint
from tiny_questions import write_manifest

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
RECIPES = Path(str(resources.files("video_r1") / "recipes"))


def settings_file(stage: int) -> str:
    return str(RECIPES / "deepspeed" / f"zero{stage}.json")


def launched(stage: int) -> dict[str, str]:
    """What `accelerate launch` with the recipes' file adds to the environment of its processes."""
    words = ["--config_file", str(RECIPES / "accelerate" / f"zero{stage}.yaml"), "--num_processes", "2"]
    words += ["--deepspeed_config_file", settings_file(stage), "-m", "video_r1", "rl"]
    started: dict[str, str] = {}

    def launcher(args: Any) -> None:
        started.update(launch.prepare_deepspeed_cmd_env(args)[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "deepspeed_launcher", launcher)
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    return {name: value for name, value in started.items() if os.environ.get(name) != value}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_checkpoint("qwen2_5_vl", folder / "model")
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def rl_alone(folder: Path) -> Path:
    run_processes(1, "distributed_work:rl", folder, 1, "rl-1")
    return folder / "rl-1"


@pytest.fixture(scope="module")
def sft_alone(folder: Path) -> Path:
    run_processes(1, "distributed_work:sft", folder, 1, "sft-1")
    return folder / "sft-1"


def two_processes(work: str, folder: Path, name: str, stage: int, by: str, **changes: Any) -> Path:
    """Runs `deepspeed_work:WORK`, set up by `accelerate launch` or by the setting `deepspeed`."""
    zero = settings_file(stage) if by == "setting" else None
    environment = launched(stage) if by == "launch" else {}
    run_processes(2, f"deepspeed_work:{work}", folder, name, zero, changes, environment=environment)
    return folder / name


@pytest.mark.parametrize(("stage", "by"), [(2, "setting"), (3, "launch")])
def test_rl_equals_one_process(folder: Path, rl_alone: Path, stage: int, by: str) -> None:
    """With a reference model, validation, and two micro-batches a step."""
    run = two_processes("rl", folder, f"rl-zero{stage}", stage, by)
    same_run(rl_alone, run)
    kinds = [set(json.loads((run / f"kinds-{rank}.json").read_text())) for rank in (0, 1)]
    assert kinds[0] != kinds[1]  # what the processes see differs: a collective of one kind alone would hang


@pytest.mark.parametrize(("stage", "by"), [(2, "launch"), (3, "setting")])
def test_sft_equals_one_process(folder: Path, sft_alone: Path, stage: int, by: str) -> None:
    same_run(sft_alone, two_processes("sft", folder, f"sft-zero{stage}", stage, by))
