"""The Slurm script and the SkyPilot file of examples/: syntax, and ranks on one and on two machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nodes import ADDRESSES, two_nodes

ROOT = Path(__file__).parents[1]
SLURM, SKYPILOT = ROOT / "examples" / "slurm.sh", ROOT / "examples" / "skypilot.yaml"
WORDS = ["rl", "a recipe.yaml", "--output_dir", "/shared/run"]
# Stands in for video_r1: each process joins the group and writes down its rank and its words.
TRAINING = """
import json, os, sys
from pathlib import Path
import torch
torch.distributed.init_process_group("gloo")
total = torch.ones(1)
torch.distributed.all_reduce(total)
rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
Path(os.environ["FOLDER"], f"rank-{rank}.json").write_text(json.dumps([local, int(total), sys.argv[1:]]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
# Starts the words on each machine, as srun does: directly, or in its network namespace.
SRUN = """#!/bin/bash
shift
codes=0
for ((node = 0; node < SLURM_NNODES; node++)); do
    name=NAME_$node cable=CABLE_$node
    SLURM_NODEID=$node GLOO_SOCKET_IFNAME=${!cable:-lo} ${!name:+ip netns exec ${!name}} "$@" &
    started+=($!)
done
for process in "${started[@]}"; do wait "$process" || codes=1; done
exit $codes
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A machine with the commands of Slurm, and a package video_r1 that only writes down its ranks."""
    programs, package = tmp_path / "bin", tmp_path / "fake" / "video_r1"
    programs.mkdir()
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(TRAINING)
    launcher = f'#!/bin/bash\nshift\nexec {sys.executable} -m accelerate.commands.launch "$@"\n'
    for name, text in {
        "srun": SRUN, "scontrol": "#!/bin/bash\necho $HEAD\necho other\n", "accelerate": launcher,
    }.items():  # fmt: skip
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(package.parent),
        "RECIPES": str(ROOT / "src" / "video_r1" / "recipes"), "FOLDER": str(tmp_path), "HEAD": "127.0.0.1",
        "SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def ranks(folder: Path) -> dict[int, list[object]]:
    files = sorted(folder.glob("rank-*.json"))
    return {number: json.loads(path.read_text()) for number, path in enumerate(files)}


def run_slurm(environment: dict[str, str], nodes: int, gpus: int) -> None:
    environment |= {"SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": str(gpus)}
    done = subprocess.run(
        ["bash", str(SLURM), *WORDS], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_syntax() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    for script in (SLURM.read_text(), task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    options = dict(line.split()[1:3] for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH"))
    assert options["--nodes"] == "1" and options["--ntasks-per-node"] == "1"
    assert options["--signal"] == "TERM@300"  # B:TERM would reach this shell alone


@pytest.mark.dist
@pytest.mark.slow
def test_slurm_on_one_machine(environment: dict[str, str], tmp_path: Path) -> None:
    run_slurm(environment, nodes=1, gpus=2)
    assert ranks(tmp_path) == {0: [0, 2, WORDS], 1: [1, 2, WORDS]}


@pytest.mark.dist
@pytest.mark.slow
def test_slurm_on_two_machines(environment: dict[str, str], tmp_path: Path) -> None:
    with two_nodes(tmp_path) as nodes:
        environment["HEAD"] = ADDRESSES[0]
        for number, (name, cable) in enumerate(zip(nodes.names, nodes.cables, strict=True)):
            environment |= {f"NAME_{number}": name, f"CABLE_{number}": cable}
        run_slurm(environment, nodes=2, gpus=1)
    assert ranks(tmp_path) == {0: [0, 2, WORDS], 1: [0, 2, WORDS]}


@pytest.mark.dist
@pytest.mark.slow
def test_skypilot_on_one_machine(environment: dict[str, str], tmp_path: Path) -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    environment |= {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "2", "SKYPILOT_NODE_RANK": "0"}
    environment |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "COMMAND": task["envs"]["COMMAND"]}
    done = subprocess.run(
        ["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = task["envs"]["COMMAND"].split()
    assert ranks(tmp_path) == {0: [0, 2, words], 1: [1, 2, words]}
