"""`make gpu-check`: the checks of test_gpu.py, with their figures in one JSON file.

    python tests/gpu_check.py [--out gpu-check.json] [--minutes 45] [--seconds 240] [--only vision]

Each check has its own process. It passes, fails, is not applicable (no GPU, no second GPU, a missing package,
too little memory) or is left out because the time is over. If it crashes or exceeds its limit it has failed,
and everything that it started is killed. The file is written after each check, to be attached to a report.
Exit code 1 if a check failed or was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WORDS = {"passed": "pass", "failed": "FAIL", "not applicable": "not applicable", "left out": "LEFT OUT"}
ORDER = ("test_the_machine", "test_recorded", "test_vllm", "test_speed", "")
"""Checks by the beginning of their names, in the order in which they run."""
Result = dict[str, Any]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the result of a check to the file of results, where this module is a plugin of pytest."""
    if report.when != "call" and report.passed:
        return
    states = {"passed": "passed", "failed": "failed", "skipped": "not applicable"}
    skipped = report.longrepr[2] if isinstance(report.longrepr, tuple) else None
    crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
    reason = str(skipped or crash or report.longrepr or "").removeprefix("Skipped: ")
    result = {
        "check": report.nodeid.partition("::")[2], "state": states[report.outcome], "reason": reason[:1500],
        "seconds": round(report.duration, 1), "figures": dict(report.user_properties).get("figures", {}),
    }  # fmt: skip
    with Path(os.environ["GPU_CHECK_RESULTS"]).open("a") as file:
        file.write(json.dumps(result) + "\n")


def command_of(*words: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        *map(str, words),
    ]


def checks_of(file: Path, only: str) -> list[str]:
    """Return the names of the file's tests, parameters included, in the order in which they run."""
    command = command_of("--collect-only", file, "-k", only)
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    lines = (line.partition("::")[2] for line in done.stdout.splitlines() if not line.startswith("SKIPPED"))
    return sorted(filter(None, lines), key=lambda name: [*map(name.startswith, ORDER)].index(True))


def run_check(file: Path, name: str, limit: float) -> Result:
    """Run a check in its own process, for `limit` seconds at most."""
    if limit <= 0:
        return {"check": name, "state": "left out", "reason": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        results, output = Path(folder, "results"), Path(folder, "output")
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"GPU_CHECK_RESULTS": str(results), "PYTHONPATH": os.pathsep.join(paths)}
        with output.open("w") as stream:
            process = subprocess.Popen(
                command_of("-p", "gpu_check", f"{file}::{name}"), stdout=stream, stderr=stream,
                cwd=HERE.parent, env=os.environ | environment, start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(limit)
            reason = f"ended with code {code}: {output.read_text()[-1500:]}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {limit:.0f} seconds"
        with suppress(ProcessLookupError):  # nothing that it started goes on
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if results.exists():
            return json.loads(results.read_text().splitlines()[0])
        return {"check": name, "state": "failed", "reason": reason}


def main(words: list[str] | None = None) -> int:
    import torch  # not where this module is a plugin

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="gpu-check.json", help="report to write")
    parser.add_argument("--minutes", type=float, default=45, help="time for all checks")
    parser.add_argument("--seconds", type=float, default=240, help="time for one check")
    parser.add_argument("--only", default="", help="checks whose names match (pytest's -k)")
    parser.add_argument("--file", type=Path, default=HERE / "test_gpu.py", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    end = time.monotonic() + 60 * arguments.minutes
    results: list[Result] = []
    has_device = torch.cuda.is_available() or "GPU_CHECK_DEVICE" in os.environ
    for name in checks_of(arguments.file, arguments.only):
        result: Result = {"check": name, "state": "not applicable", "reason": "no CUDA device"}
        if has_device:
            result = run_check(arguments.file, name, min(arguments.seconds, end - time.monotonic()))
        results.append(result)
        reason = result["reason"].splitlines()[0][:100] if result["reason"] else ""
        print(f"{WORDS[result['state']]:<15}{name:<75}{reason}", flush=True)
        report = {"date": time.strftime("%Y-%m-%d"), "checks": results}
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    states = [result["state"] for result in results]
    print(", ".join(f"{states.count(state)} {state}" for state in WORDS), f"→ {arguments.out}")
    return int("failed" in states or "left out" in states)


if __name__ == "__main__":
    sys.exit(main())
