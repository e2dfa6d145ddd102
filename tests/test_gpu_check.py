"""The checks for GPUs run on the CPU where they can; their collector tells pass, fail and neither apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest

CHECKS = """
import os, time, pytest
def test_good():
    open(os.environ["GPU_CHECK_FIGURES"], "w").write('{"speed": 2.5}')
def test_wrong(): assert 1 == 2
def test_missing(): pytest.skip("needs two GPUs")
def test_crash(): os._exit(9)
@pytest.mark.parametrize("n", [1])
def test_hang(n): time.sleep(60)
"""


def test_without_a_gpu_nothing_applies(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert gpu_check.main(["--out", str(out), "--only", "vision or learn"]) == 0
    checks = json.loads(out.read_text())["checks"]
    assert len(checks) >= 8
    assert {(check["state"], check["reason"]) for check in checks} == {("not applicable", "no CUDA device")}


@pytest.mark.slow
def test_each_check_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_CHECK_DEVICE", "cpu")
    file, out = tmp_path / "test_checks.py", tmp_path / "report.json"
    file.write_text(CHECKS)
    assert gpu_check.main(["--file", str(file), "--out", str(out), "--minutes", "0.3"]) == 1
    found = {check["check"]: check for check in json.loads(out.read_text())["checks"]}
    states = {name: check["state"] for name, check in found.items()}
    assert states == {
        "test_good": "passed", "test_wrong": "failed", "test_missing": "not applicable",
        "test_crash": "failed", "test_hang[1]": "failed",
    }  # fmt: skip
    assert found["test_good"]["figures"] == {"speed": 2.5}
    assert found["test_missing"]["reason"] == "needs two GPUs" and "1 == 2" in found["test_wrong"]["reason"]
    assert "code 9" in found["test_crash"]["reason"] and "not done after" in found["test_hang[1]"]["reason"]
    assert "1 passed, 3 failed, 1 not applicable" in capsys.readouterr().out


@pytest.mark.slow
def test_checks_work_where_they_can() -> None:
    """On the CPU, as the device that they are told: values and gradients, decoding, a run of SFT twice."""
    names = "machine or separate_rows or vision or recorded or sft_learns"
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-k", names, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "GPU_CHECK_DEVICE": "cpu"}, timeout=400,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "17 passed" in done.stdout
