"""The set-up, on a machine with an NVIDIA GPU too, as far as it can be tried without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "setup" / "install.sh").read_text(encoding="utf-8")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"


def limits_for_cuda() -> list[str]:
    """The pins that install.sh keeps for CUDA, by its own pattern."""
    found = re.search(r"grep -vE '([^']+)' constraints.txt", SCRIPT)
    assert found is not None
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    return [pin for pin in pins if not re.match(found[1], pin)]


def from_the_public_index(tmp_path: Path, *words: str) -> dict[str, str]:
    """The versions that pip would install, by name, with no package of this machine in the way."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_FIND")}
    environment |= {"PIP_CONFIG_FILE": os.devnull}
    environment.pop("PIP_EXTRA_INDEX_URL", None)
    done = subprocess.run(
        [*command, "--report", str(report), *words],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    if done.returncode and re.search(
        "ConnectionError|NewConnectionError|No matching distribution", done.stderr
    ):
        pytest.skip(f"the package index is out of reach: {done.stderr.splitlines()[-1][:200]}")
    assert done.returncode == 0, done.stderr[-2000:]
    packages = json.loads(report.read_text())["install"]
    return {package["metadata"]["name"].lower(): package["metadata"]["version"] for package in packages}


@pytest.mark.slow
def test_the_versions_for_cuda_fit_together(tmp_path: Path) -> None:
    """Everything but vLLM at once, with the pins of the tests: torch's own triton, torch as tested."""
    (tmp_path / "limits.txt").write_text("\n".join(limits_for_cuda()))
    found = from_the_public_index(
        tmp_path, "-c", str(tmp_path / "limits.txt"), f"{ROOT}[lora,qlora,deepspeed,trackers,dev]"
    )
    pins = dict(pin.split("==") for pin in limits_for_cuda() if "==" in pin)
    assert found["torch"] == pins["torch"] and any(name.startswith("nvidia-cublas") for name in found)
    assert found["transformers"] == pins["transformers"] and "triton" in found


@pytest.mark.slow
def test_what_pip_installs_beside_vllm(tmp_path: Path) -> None:
    """Without pins, as for `pip install 'video-r1[vllm]'`: a recent vLLM and the newest that it admits."""
    found = from_the_public_index(tmp_path, f"{ROOT}[lora,qlora,deepspeed,vllm,trackers,math,smolvlm,studio]")
    assert Version(found["vllm"]) >= Version("0.33") and Version(found["torch"]) >= Version("2.14")
    assert Version(found["transformers"]) >= Version("5.20")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index has torch for CPUs")
@pytest.mark.parametrize("answers", [True, False])
def test_without_torch_for_cpus_the_set_up_says_where_it_is(tmp_path: Path, answers: bool) -> None:
    """Pip is a stand-in that installed a build with CUDA, which is gigabytes. If the index of builds
    for CPUs does not answer, pip is not told of it: it would warn and try again."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    log, probe = tmp_path / "log", f'case "$1" in -) exit {int(not answers)};; esac'
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{probe}\necho {tmp_path}\n')
    python.chmod(0o755)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    environment = {**os.environ, "VENV": str(tmp_path), "ACCELERATOR": "cpu", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "setup" / "install.sh"], capture_output=True, text=True, env=environment, timeout=60
    )
    calls = log.read_text().splitlines()
    (torch,) = [call for call in calls if "--no-deps" in call]
    requirements = Path(torch.split(" -r ")[1]).read_text()  # a file adds to the configured indexes
    assert (f"--extra-index-url {CPU_BUILDS}\n" in requirements) == answers
    assert "torch==2.13" in requirements and f"- {CPU_BUILDS}" in calls
    assert done.returncode == 1 and not (tmp_path / "installed").exists() and "uninstall" in calls[-1]
    assert f"its builds are at {CPU_BUILDS}" in done.stderr


def test_an_index_that_is_out_of_reach_costs_no_retries(tmp_path: Path) -> None:
    """The real probe, of an address of this machine at which nothing listens."""
    script = f"venv={tmp_path}; . {ROOT}/setup/cpu_index.sh; cpu_builds=http://127.0.0.1:9/whl/cpu; cpu_index"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "no_proxy": "*"}
    begun = time.monotonic()
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and time.monotonic() - begun < 30
    environment["PIP_PROXY"] = "http://proxy.example:3128"  # pip alone knows the way
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "--extra-index-url http://127.0.0.1:9/whl/cpu\n"


FAKE_TORCH = """
import types, warnings
__version__ = "2.13.0"
version = types.SimpleNamespace(cuda={cuda!r})
def available():
    {warn}
    return {usable}
cuda = types.SimpleNamespace(
    is_available=available, device_count=lambda: 2, get_device_name=lambda n: f"GPU {{n}}"
)
"""
OLD = (
    'warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 12020).")'
)


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ({"cuda": "13.0", "warn": "pass", "usable": True}, 0, "torch 2.13.0 uses GPU 0, GPU 1"),
        (
            {"cuda": "13.0", "warn": OLD, "usable": False},
            1,
            "(built for CUDA 13.0) cannot use the GPU: CUDA init",
        ),
        ({"cuda": None, "warn": "pass", "usable": False}, 1, "(built without CUDA) cannot use the GPU"),
    ],
)
def test_the_set_up_ends_with_a_check_of_the_gpu(
    tmp_path: Path, values: dict[str, object], code: int, said: str
) -> None:
    """Torch is a stand-in: no machine here has a driver, let alone one that is too old."""
    (tmp_path / "torch.py").write_text(FAKE_TORCH.format(**values))
    done = subprocess.run(
        [sys.executable, ROOT / "setup" / "check_cuda.py"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == code and said in done.stderr
    assert ("update the NVIDIA driver" in done.stderr) == (code == 1)
    assert '"$venv/bin/python" setup/check_cuda.py\n' in SCRIPT
