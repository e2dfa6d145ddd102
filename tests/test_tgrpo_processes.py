"""T-GRPO with two processes on CPU (gloo) against one with the same questions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_runs import same_figures
from tgrpo_process import main
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, write_manifest


@pytest.mark.dist
@pytest.mark.parametrize(
    ("scale", "rule"),
    [
        ("selected", "off"),
        pytest.param("task", "likelihood_gate", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tmp_path: Path, scale: str, rule: str) -> None:
    """Same completions, rewards, validation and weights after two steps, images and videos mixed."""
    tiny_checkpoint("qwen2_5_vl", tmp_path / "model")
    write_manifest(tmp_path)
    script = str(Path(__file__).with_name("tgrpo_process.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, script, str(tmp_path), "2", scale, rule], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main(tmp_path, 1, scale, rule)
    one, two = (torch.load(tmp_path / f"weights{n}.pt", weights_only=True) for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
    same_figures(tmp_path / "run1", tmp_path / "run2", 2e-5)
    if scale == "selected":
        left_out = [read_lines(tmp_path / f"run{n}" / "left_out.jsonl") for n in (1, 2)]
        assert any(line["replaced_by"] is not None for line in left_out[0])
        assert left_out[0] == left_out[1]
