"""Two machines, one process each: network namespaces, gloo, accelerate's own command (docs/recipes.md)."""

from __future__ import annotations

import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed_runs import Run
from nodes import ADDRESSES, PORT, Nodes, two_nodes
from resume_runs import read_whole_lines, same_figures, same_weights, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SCRIPT = str(Path(__file__).with_name("node_process.py"))
STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and beside it the run `one` that one process has made of it."""
    folder = tmp_path_factory.mktemp("nodes")
    # a large epsilon: AdamW's steps then follow the gradients, whose last bits differ, and not their signs
    alone = write_recipe(folder, max_steps=STEPS, adam_epsilon=1.0, learning_rate=0.05)
    Run(alone, folder / "one", {}, count=1).finish()
    shared = yaml.safe_load(alone.read_text())
    path = folder / "shared.yaml"
    path.write_text(yaml.safe_dump({**shared, "per_device_train_batch_size": 1, "ddp_backend": "gloo"}))
    return path


def launch_file(folder: Path) -> Path:
    """The shipped file with what two CPUs need instead of 16 GPUs."""
    shipped = resources.files("video_r1") / "recipes" / "accelerate" / "fsdp2-2-nodes.yaml"
    values = yaml.safe_load(shipped.read_text())
    values |= {"num_processes": 2, "mixed_precision": "no", "main_process_port": PORT}
    path = folder / "fsdp2-2-nodes.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start_both(nodes: Nodes, recipe: Path, run: Path) -> list[Any]:
    rl = [SCRIPT, "rl", str(recipe), "--output_dir", str(run)]
    launch = ["accelerate.commands.launch", "--config_file", str(launch_file(recipe.parent))]
    launch += ["--main_process_ip", ADDRESSES[0], "--machine_rank"]
    return [nodes.start(node, [*launch, str(node), *rl]) for node in (0, 1)]


def finish(nodes: Nodes, processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        assert process.wait(300) == 0, nodes.said()


def wait_for_step(run: Path, step: int, nodes: Nodes, limit: float = 240) -> None:
    end = time.monotonic() + limit
    while not any(line["step"] >= step for line in read_whole_lines(run / "metrics.jsonl")):
        assert time.monotonic() < end, nodes.said()
        time.sleep(0.02)


def test_two_machines_equal_one_process_and_survive_a_loss(recipe: Path, tmp_path: Path) -> None:
    """FSDP2 by accelerate launch. The second machine is switched off in
    the third step, the first one's command ends by itself, and both commands again end the run.
    """
    run = tmp_path / "run"
    with two_nodes(tmp_path) as nodes:
        processes = start_both(nodes, recipe, run)
        wait_for_step(run, 3, nodes)
        nodes.switch_off(1)
        start = time.monotonic()
        assert processes[0].wait(120) not in (0, None), nodes.said()
        print(f"the other machine's command ended {time.monotonic() - start:.1f} s after")
        said = nodes.logs[0].read_text(errors="replace")
        assert "video-r1: process 0 has lost another process of this run" in said, said[-4000:]
        assert (run / "checkpoint-2" / "trainer_state.json").is_file() and not (run / "config.json").exists()
        finish(nodes, start_both(nodes, recipe, run))
        assert "resuming from checkpoint-" in nodes.logs[0].read_text(errors="replace")
    same_figures(recipe.parent / "one", run, 2e-5)
    same_weights(recipe.parent / "one", run, 2e-5)
