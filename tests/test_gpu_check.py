"""The checks for GPUs run on the CPU where they can; gpu_check.py tells their states apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest

CHECKS = """
import os, subprocess, time, pytest
def test_speed_of_nothing(): pass
def test_hang():
    subprocess.Popen(["sleep", "61.25"])
    time.sleep(60)
def test_missing(): pytest.skip("needs two GPUs")
def test_late(): pass
@pytest.mark.parametrize("n", [1])
def test_a_row_is_wrong(n): assert n == 2
def test_a_row_crashes(): os._exit(9)
def test_a_row_is_good(record_property):
    record_property("figures", {"process": os.getpid()})
def test_rows_are_good(record_property):
    record_property("figures", {"process": os.getpid()})
"""


def test_without_a_gpu_nothing_applies(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert gpu_check.main(["--out", str(out), "--only", "vision or learn"]) == 0
    checks = json.loads(out.read_text())["checks"]
    assert len(checks) >= 8
    assert {(check["state"], check["reason"]) for check in checks} == {("not applicable", "no CUDA device")}


@pytest.mark.slow
def test_states_of_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_CHECK_DEVICE", "cpu")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    file, out = tmp_path / "test_checks.py", tmp_path / "report.json"
    file.write_text(CHECKS)
    words = ["--file", str(file), "--out", str(out), "--seconds", "12"]
    started = time.monotonic()
    assert gpu_check.main(words) == 1
    assert time.monotonic() - started < 58
    found = {check["check"]: check for check in json.loads(out.read_text())["checks"]}
    assert {name: check["state"] for name, check in found.items()} == {
        "test_speed_of_nothing": "passed", "test_hang": "failed", "test_missing": "not applicable",
        "test_late": "passed", "test_a_row_is_wrong[1]": "failed", "test_a_row_crashes": "failed",
        "test_a_row_is_good": "passed", "test_rows_are_good": "passed",
    }  # fmt: skip
    processes = {found[name]["figures"]["process"] for name in ("test_a_row_is_good", "test_rows_are_good")}
    assert len(processes) == 1
    assert found["test_missing"]["reason"] == "needs two GPUs"
    assert "1 == 2" in found["test_a_row_is_wrong[1]"]["reason"]
    assert "code 9" in found["test_a_row_crashes"]["reason"]
    assert found["test_hang"]["reason"].startswith("not done after 12 seconds")
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.is_file()]
    assert b"sleep\x0061.25\x00" not in running
    assert "4 passed, 3 failed, 1 not applicable, 0 left out" in capsys.readouterr().out
    assert gpu_check.main([*words, "--minutes", "0"]) == 1
    assert {check["state"] for check in json.loads(out.read_text())["checks"]} == {"left out"}


@pytest.mark.slow
def test_checks_work_where_they_can() -> None:
    """On the CPU as the device: values and gradients, decoding, a run of SFT twice."""
    names = "machine or (separate_rows and qwen2_5_vl) or (vision and qwen3_vl) or recorded or sft_learns"
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-k", names, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "GPU_CHECK_DEVICE": "cpu"}, timeout=400,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "9 passed" in done.stdout
