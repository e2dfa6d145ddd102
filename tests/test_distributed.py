"""Two processes on CPU (gloo) equal one with the same questions: DDP and FSDP2, T-GRPO and SFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed_process import run_processes
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, write_manifest

pytestmark = pytest.mark.dist
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny_checkpoint("qwen2_5_vl", folder / "model")
    write_manifest(folder)
    run_processes(1, "distributed_work:rl", folder, 1, "rl-1")
    run_processes(1, "distributed_work:sft", folder, 1, "sft-1")
    return folder


def same_run(one: Path, two: Path) -> None:
    """Loss and every logged figure, every gradient and every weight, within 1e-5."""
    logs = [read_lines(run / "metrics.jsonl") for run in (one, two)]
    for alone, together in zip(*logs, strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            if not name.startswith(("time", "seconds/", "speed/", "memory/")):
                assert together[name] == pytest.approx(value, abs=1e-5), name
    gradients = [torch.load(run / "gradients.pt", weights_only=True) for run in (one, two)]
    for alone, together in zip(*gradients, strict=True):
        assert alone.keys() == together.keys() and len(alone) > 20
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=1e-5, msg=name)
    weights = [load_file(run / "model.safetensors") for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "environment"), [("ddp", {}), ("fsdp2", FSDP2)])
def test_rl_equals_one_process(folder: Path, kind: str, environment: dict[str, str]) -> None:
    run = folder / f"rl-{kind}"
    run_processes(2, "distributed_work:rl", folder, 2, run.name, environment=environment)
    same_run(folder / "rl-1", run)
    kinds = [set(json.loads((run / f"kinds-{rank}.json").read_text())) for rank in (0, 1)]
    assert kinds[0] != kinds[1]  # what the processes see differs: a collective of one kind alone would hang


@pytest.mark.parametrize(("kind", "environment"), [("ddp", {}), ("fsdp2", FSDP2)])
def test_sft_equals_one_process(folder: Path, kind: str, environment: dict[str, str]) -> None:
    run = folder / f"sft-{kind}"
    run_processes(2, "distributed_work:sft", folder, 2, run.name, environment=environment)
    same_run(folder / "sft-1", run)
