"""The same benchmarks on this working tree and on another commit, in turns: is a change faster or slower?

    python -m benchmarks.compare_commits --commit HEAD~1 [--rounds 3] update rollout decode
    python -m benchmarks.compare_commits --commit v0.1 "step --size lab" "evaluation --json"

Each name is a benchmark of this folder, with options of its own where it stands in quotes. The other commit
is checked out into a temporary folder; both run in this Python environment, each benchmark as a process of
its own, and who begins changes from round to round. Prints one JSON object: for each benchmark and each of
its figures in seconds, the median of both and `ratio`, the other commit's seconds ÷ this tree's within a
round (above 1: this tree is faster), with the smallest and the largest. Each benchmark's part goes to stderr
as soon as it is done.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._command import benchmark_parser
from benchmarks._timing import in_turns, spread

HERE = Path(__file__).parents[1]


def run_benchmark(words: list[str], checkout: Path) -> dict[str, float]:
    """The figures in seconds of one benchmark, `part/name` where it prints parts, run in a checkout."""
    path = os.pathsep.join((str(checkout / "src"), str(checkout)))
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    return dict(seconds_in(json.loads(done.stdout.splitlines()[-1])))


def seconds_in(figures: dict[str, Any], part: str = "") -> list[tuple[str, float]]:
    """Every number whose name speaks of seconds."""
    found: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            found += seconds_in(value, f"{part}{name}/")
        elif "seconds" in name and isinstance(value, int | float) and value > 0:
            found.append((f"{part}{name}", float(value)))
    return found


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("benchmarks", nargs="+")
    parser.add_argument("--commit", required=True, help="what this working tree is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"commit": arguments.commit, "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "checkout"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", other, arguments.commit], cwd=HERE, check=True
        )
        try:
            for text in arguments.benchmarks:
                words = shlex.split(text)
                pairs = in_turns(
                    lambda words=words: run_benchmark(words, HERE),
                    lambda words=words: run_benchmark(words, other),
                    arguments.rounds,
                )
                report[text] = {
                    name: {
                        "seconds": round(statistics.median(ours[name] for ours, _ in pairs), 4),
                        "seconds_before": round(statistics.median(before[name] for _, before in pairs), 4),
                        **spread(before[name] / ours[name] for ours, before in pairs),
                    }
                    for name in pairs[0][0].keys() & pairs[0][1].keys()
                }
                print(json.dumps({text: report[text]}), file=sys.stderr, flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=HERE, check=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
