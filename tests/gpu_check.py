"""`make gpu-check`: the checks of test_gpu.py, with their figures in one JSON file.

    python tests/gpu_check.py [--out gpu-check.json] [--minutes 45] [--seconds 240] [--only vision]

Numeric checks share a process, and so their compiled kernels; every other check has its own. A check passes,
fails, is not applicable (no GPU, no second GPU, a missing package, too little memory) or is left out because
the time is over. A check that crashes or exceeds its limit is failed, everything that it started is killed,
and the next check starts in a new process. The file is written after each check, to be attached to a report.
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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WORDS = {"passed": "pass", "failed": "FAIL", "not applicable": "not applicable", "left out": "LEFT OUT"}
ORDER = ("test_the_machine", "test_recorded", "test_vllm", "test_speed", "")
"""Checks by the beginning of their names, in the order in which they run."""
NUMERIC = ("test_the_machine", "test_recorded", "test_a_row", "test_rows", "test_the_vision_tower")
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


def groups_of(file: Path, only: str) -> list[list[str]]:
    """Return the names of the file's tests, parameters included, in groups that share a process."""
    command = command_of("--collect-only", file, "-k", only)
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    lines = (line.partition("::")[2] for line in done.stdout.splitlines() if not line.startswith("SKIPPED"))
    groups: list[list[str]] = []
    names = sorted(filter(None, lines), key=lambda name: [*map(name.startswith, ORDER)].index(True))
    for name in names:
        if groups and name.startswith(NUMERIC) and groups[-1][-1].startswith(NUMERIC):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def run_group(file: Path, names: list[str], limit: float, end: float) -> Iterator[Result]:
    """Yield the result of each check. limit: seconds of a check; end: time at which all are ended."""
    while names:
        if time.monotonic() >= end:
            yield from ({"check": name, "state": "left out", "reason": "no time left"} for name in names)
            return
        found, ended = [], ""
        for result in run_process(file, names, limit, end):
            if "check" not in result:
                ended = result["reason"]
                break
            found.append(result["check"])
            yield result
        names = [name for name in names if name not in found]
        if names and time.monotonic() < end:
            yield {"check": names.pop(0), "state": "failed", "reason": ended}


def run_process(file: Path, names: list[str], limit: float, end: float) -> Iterator[Result]:
    """Yield results as one process of pytest writes them, and at last the reason why there are no more."""
    with tempfile.TemporaryDirectory() as folder:
        results, output, count = Path(folder, "results"), Path(folder, "output"), 0
        results.touch()
        environment = {**os.environ, "GPU_CHECK_RESULTS": str(results)}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        command = command_of("-p", "gpu_check", *(f"{file}::{name}" for name in names))
        with output.open("w") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                cwd=HERE.parent,
                env=environment,
                start_new_session=True,
            )
        started, reason = time.monotonic(), ""
        while not reason:
            code, now = process.poll(), time.monotonic()
            lines = results.read_text().splitlines()
            for line in lines[count:]:
                yield json.loads(line)
                started = now
            count = len(lines)
            if code is not None:
                reason = f"ended with code {code}: {output.read_text()[-1500:]}"
            elif now - started > limit or now > end:
                reason = f"not done after {now - started:.0f} seconds"
            else:
                time.sleep(0.1)
        with suppress(ProcessLookupError):  # nothing that it started goes on
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        yield {"reason": reason}


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
    for names in groups_of(arguments.file, arguments.only):
        no_device = ({"check": name, "state": "not applicable", "reason": "no CUDA device"} for name in names)
        for result in run_group(arguments.file, names, arguments.seconds, end) if has_device else no_device:
            results.append(result)
            reason = result["reason"].splitlines()[0][:100] if result["reason"] else ""
            print(f"{WORDS[result['state']]:<15}{result['check']:<75}{reason}", flush=True)
            report = {"date": time.strftime("%Y-%m-%d"), "checks": results}
            Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    states = [result["state"] for result in results]
    print(", ".join(f"{states.count(state)} {state}" for state in WORDS), f"→ {arguments.out}")
    return int("failed" in states or "left out" in states)


if __name__ == "__main__":
    sys.exit(main())
