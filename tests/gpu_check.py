"""`make gpu-check`: every check of test_gpu.py in a process of its own, with its figures in one JSON file.

    python tests/gpu_check.py [--out gpu-check.json] [--minutes 10] [--only vision]

A check passes, fails or is not applicable (no GPU, no second one, a package that is not there, too little
memory), each with its reason and its figures. One that crashes or hangs leaves the others alone. The file is
written anew after each check, and is made to be attached to a report. Exit code 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
WORDS = {"passed": "pass", "failed": "FAIL", "not applicable": "not applicable"}


def checks_of(file: Path, only: str) -> list[str]:
    """The names of the file's tests, parameters included."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-o",
        "addopts=",
        str(file),
        "-k",
        only,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    found = (line.partition("::")[2] for line in done.stdout.splitlines() if not line.startswith("SKIPPED"))
    return [f"{file}::{name}" for name in found if name]


def run_check(name: str, limit: float) -> dict[str, Any]:
    """State, reason, seconds and figures of one check."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, report = Path(folder) / "figures.json", Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            name,
        ]
        environment = {**os.environ, "GPU_CHECK_FIGURES": str(figures)}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=HERE.parent, env=environment, timeout=limit
            )
            state, reason = outcome(report, done)
        except subprocess.TimeoutExpired:
            state, reason = "failed", f"not done after {limit:.0f} seconds"
        found = json.loads(figures.read_text()) if figures.is_file() else {}
    seconds = round(time.monotonic() - started, 1)
    return {
        "check": name.split("::")[1],
        "state": state,
        "reason": reason,
        "seconds": seconds,
        "figures": found,
    }


def outcome(report: Path, done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """What pytest says of the one test that it ran."""
    case = ElementTree.parse(report).find(".//testcase") if report.is_file() else None
    if case is None:
        return "failed", f"ended with code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
    for kind, state in (("skipped", "not applicable"), ("failure", "failed"), ("error", "failed")):
        found = case.find(kind)
        if found is not None:
            return state, str(found.get("message"))[:1500]
    return "passed", ""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="gpu-check.json", help="where the report goes")
    parser.add_argument(
        "--minutes", type=float, default=10, help="checks that would begin later are left out"
    )
    parser.add_argument("--only", default="", help="checks whose names match (pytest's -k)")
    parser.add_argument("--file", type=Path, default=HERE / "test_gpu.py", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    end = time.monotonic() + 60 * arguments.minutes
    results: list[dict[str, Any]] = []
    has_device = torch.cuda.is_available() or "GPU_CHECK_DEVICE" in os.environ
    for name in checks_of(arguments.file, arguments.only):
        left = end - time.monotonic()
        if has_device and left > 0:
            result = run_check(name, left)
        else:
            reason = "no time left" if has_device else "no CUDA device"
            result = {"check": name.split("::")[1], "state": "not applicable", "reason": reason}
        results.append(result)
        reason = result["reason"].splitlines()[0][:100] if result["reason"] else ""
        print(f"{WORDS[result['state']]:<15}{result['check']:<75}{reason}", flush=True)
        report = {"date": time.strftime("%Y-%m-%d"), "checks": results}
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    states = [result["state"] for result in results]
    print(", ".join(f"{states.count(state)} {state}" for state in WORDS), f"→ {arguments.out}")
    return int("failed" in states)


if __name__ == "__main__":
    sys.exit(main())
