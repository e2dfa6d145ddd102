"""Training on a device that is not the CPU: the CPU's results, everything where it should be.

Without experts, whose products transformers prepares in a number format that only a real GPU counts in.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BIN = Path(sys.executable).parent
FAMILIES = ("qwen2_5_vl", "qwen3_vl")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("second_device"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for the second device"),
    pytest.mark.skipif(
        shutil.which("ninja", path=f"{BIN}:{os.environ['PATH']}") is None, reason="ninja is not installed"
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What second_device/work.py found on the CPU and on the second device."""
    folder = tmp_path_factory.mktemp("devices")
    found = {}
    tests = Path(__file__).parent
    path = f"{tests}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": path}
    for device in ("cpu", "second"):
        own = folder / device
        own.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "second_device.work", device, own],
            capture_output=True, text=True, env=environment, cwd=own, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        found[device] = torch.load(own / "results.pt")
    return found


def test_mixed_devices_are_refused(results: dict[str, Any]) -> None:
    """Otherwise the other tests would show nothing."""
    assert "is on cpu, others are on the device" in results["second"]["mixed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_and_update(family: str, results: dict[str, Any]) -> None:
    ours, expected = (results[device]["families"][family] for device in ("second", "cpu"))
    assert torch.equal(ours["tokens"], expected["tokens"])
    for name in ("sampled", "update"):
        torch.testing.assert_close(ours[name], expected[name], atol=1e-5, rtol=0)
    assert ours["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in ours["gradients"].items():
        scale = expected["gradients"][name].abs().max().clamp(min=1e-3)
        assert (gradient - expected["gradients"][name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("run", ["full", "sft"])
def test_runs(run: str, results: dict[str, Any]) -> None:
    ours, expected = (results[device]["runs"][run] for device in ("second", "cpu"))
    assert len(ours) == len(expected) > 2
    for line, other in zip(ours, expected, strict=True):
        assert _without_cost(line) == pytest.approx(_without_cost(other), rel=1e-3, abs=1e-5)


def test_predictions(results: dict[str, Any]) -> None:
    ours, expected = (  # `media` has the time of each run's own clips
        [
            {name: value for name, value in line.items() if name != "media"}
            for line in results[device]["runs"]["eval"]
        ]
        for device in ("second", "cpu")
    )
    assert len(ours) > 8 and ours == expected


def _without_cost(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not re.search("time|second|memory", name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_device_is_asked_where_sampling_may_end_alone(family: str, results: dict[str, Any]) -> None:
    """Nothing is read back in an update, and in rollouts once in eight tokens, whatever the layers.

    Of Qwen3-VL, transformers adds visual features after the first layers by a mask, which asks.
    """
    asked = results["second"]["questions"][family]
    by_mask = {} if family != "qwen3_vl" else {"aten.index"}
    assert asked["update"].keys() == set(by_mask)
    short, long = asked["rollout of 12"], asked["rollout of 44"]
    assert long.pop("aten.nonzero") - short.pop("aten.nonzero") == (44 - 12) // 8
    assert sum(long.values()) <= sum(short.values()) <= 14
