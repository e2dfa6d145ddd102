"""Runs of two processes (gloo, CPU) that lose one or both to kill -9, and the same command again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_runs import Run
from resume_runs import comparable, write_recipe
from test_distributed import FSDP2
from tiny_questions import read_lines

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("killed"),
        ddp_backend="gloo",
        per_device_train_batch_size=1,
        max_steps=STEPS,
    )


def same_run(one: Path, other: Path) -> None:
    """Metrics, recorded rollouts, weights and the optimizer's state, bit for bit."""
    assert comparable(one) == comparable(other)
    assert [line["step"] for line in read_lines(one / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert read_lines(one / "rollouts.jsonl") == read_lines(other / "rollouts.jsonl")
    last = f"checkpoint-{STEPS}"
    for name in ("model.safetensors", f"{last}/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    (optimizer,) = [path.name for path in (one / last).glob("optimizer.*")]  # .pt, of FSDP2 .bin
    states = [torch.load(run / last / optimizer, weights_only=True)["state"] for run in (one, other)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for weight, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][weight][name]), (weight, name)
    assert not (one / "unfinished").exists()


@pytest.mark.parametrize(
    ("kind", "phase", "rank"), [("fsdp2", "update", 1), ("ddp", "writing a checkpoint", 0)]
)
def test_a_killed_process_costs_nothing(recipe: Path, kind: str, phase: str, rank: int) -> None:
    """The other process ends within a minute, with a message; the next start ends the run exactly."""
    environment = FSDP2 if kind == "fsdp2" else {}
    whole, killed = recipe.with_name(f"{kind}-whole"), recipe.with_name(f"{kind}-killed")
    Run(recipe, whole, environment).finish()
    run, other = Run(recipe, killed, environment), 1 - rank
    codes, said = run.kill(phase, (rank,)), run.logs[other].read_text()
    assert codes[rank] == -9 and codes[other] == 1, "it hung" if codes[other] is None else said[-2000:]
    assert f"video-r1: process {other} has lost another process of this run" in said
    assert f"goes on from the last checkpoint in {killed}" in said
    Run(recipe, killed, environment).finish()
    same_run(whole, killed)
