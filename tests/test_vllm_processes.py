"""Training processes with vLLM inside: one for each, or one that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_r1.errors import ConfigError
from video_r1.rollout.vllm.engine import neighbours


@pytest.mark.vllm
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("size", [2])
def test_two_processes_sample_with_their_weights(tmp_path: Path, size: int) -> None:
    """size: processes that share a vLLM, each with half of every weight."""
    script = str(Path(__file__).with_name("vllm_process.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, str(tmp_path), str(size)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        fresh, stale = found["differences"][::2], found["differences"][1::2]
        assert max(fresh) < 1e-3 and min(stale) > 0.02
        assert found["counts"] == [2 + rank] * (4 - rank)


def test_a_share_that_the_processes_cannot_have() -> None:
    with pytest.raises(ConfigError, match=r"vllm_tensor_parallel_size is 2.*\(1\)"):
        neighbours(2)
