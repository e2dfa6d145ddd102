"""How soon the studio shows a long run, and how soon a line that was just written.

    python -m benchmarks.studio --json

Makes 20 run folders, one of them with 50,000 metric lines and 8,000 recorded groups, starts a server, and
opens its pages in Chromium (Playwright). Seconds to the list, to a first curve and a first group of the long
run, and until it is read as a whole; from a written line to the screen; memory of the server and of the page;
seconds to the first rows of a manifest of 260,000, until all are found, and the server's memory then.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._command import benchmark_parser

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from report_runs import group_line, metrics_line, write_rl_run
from studio_server import studio

RUNS, LINES, GROUPS, ROWS = 20, 50_000, 8_000, 260_000


def write_runs(folder: Path, lines: int, groups: int) -> None:
    """The long run's lines are those of a made-up run; its groups differ in step and question."""
    write_rl_run(folder / "run-0", steps=100, every=20)
    for i in range(1, RUNS - 1):
        shutil.copytree(folder / "run-0", folder / f"run-{i}")
    long = folder / "long"
    long.mkdir()
    shutil.copy(folder / "run-0" / "config.yaml", long)
    random_ = random.Random(0)
    with (long / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            file.write(json.dumps(metrics_line(step, lines, random_)) + "\n")
    group = group_line(long, 0, 1, random_, 0.5, (8, 56, 56))
    with (long / "rollouts.jsonl").open("w") as file:
        for i in range(groups):
            file.write(json.dumps(group | {"step": 1 + i * lines // groups, "problem_id": i}) + "\n")


def write_manifest(path: Path, rows: int) -> None:
    row = {
        "problem": "What happens first in the clip?", "data_type": "video", "options": ["A. this", "B. that"],
        "problem_type": "multiple choice", "solution": "<answer>A</answer>", "path": "clips/0.mp4",
        "process": f"<think>{'It goes on. ' * 20}</think>",
    }  # fmt: skip
    with path.open("w") as file:
        for i in range(rows):
            line = {**row, "problem_id": i, "data_source": f"source {i % 9}"}
            file.write(("," if i else "[") + json.dumps(line) + "\n")
        file.write("]")


def resident(process: int) -> float:
    """MB that a process holds."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1000
    return float("nan")


def measure(folder: Path, lines: int) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with studio(folder) as (address, server), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})

        def seconds(start: float) -> float:
            return round(time.perf_counter() - start, 2)

        figures: dict[str, Any] = {}
        start = time.perf_counter()
        page.goto(address)
        page.wait_for_selector(".runs tbody tr")
        figures["list_seconds"] = seconds(start)
        start = time.perf_counter()
        page.goto(f"{address}#/run/long")
        page.wait_for_selector(".headline path.main")
        figures["first_curve_seconds"] = seconds(start)
        page.wait_for_selector(".card", timeout=120_000)
        figures["first_group_seconds"] = seconds(start)
        page.get_by_text("mean of 64").first.wait_for(timeout=120_000)
        figures["whole_curve_seconds"] = seconds(start)
        delays = []
        for step in range(lines + 1, lines + 6):
            with (folder / "long" / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics_line(step, lines, random.Random(step))) + "\n")
            start = time.perf_counter()
            shown = f"step {step:,}".replace(",", "\u2009")
            page.locator(".headline output", has_text=shown).first.wait_for()
            delays.append(seconds(start))
        figures["line_to_screen_seconds"] = {"median": sorted(delays)[2], "worst": max(delays)}
        figures["server_mb"] = round(resident(server.pid))
        start = time.perf_counter()
        page.goto(f"{address}#/data")
        page.wait_for_selector(".rows tbody tr")
        figures["first_rows_seconds"] = seconds(start)
        page.locator(".lead", has_text=re.compile("rows; ")).wait_for(timeout=300_000)
        figures["all_rows_seconds"] = seconds(start)
        figures["server_mb_with_rows"] = round(resident(server.pid))
        page_heap = page.evaluate("performance.memory ? performance.memory.usedJSHeapSize : 0")
        figures["page_heap_mb"] = round(page_heap / 1e6)
        browser.close()
    return figures


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_runs(folder, arguments.lines, arguments.groups)
        write_manifest(folder / "train.json", arguments.rows)
        sizes = {
            path.name: round(path.stat().st_size / 1e6) for path in sorted((folder / "long").glob("*.jsonl"))
        }
        print(json.dumps({"runs": RUNS, "megabytes": sizes, **measure(folder, arguments.lines)}))


if __name__ == "__main__":
    main()
