"""How the time of an update grows with completions, frames and length: one row against the expanded batch.

    python -m benchmarks.complexity --json [--picture docs/complexity.png] [--rounds 2]

The passes forward and back of one question, log-probabilities of all its completions, on the lab's text model
with clips of 64 patches a frame. One of the three is varied at a time, the others stay at G = 8, 16 frames
and 64 tokens. On a CPU the figures are processor seconds, the least of the rounds. `ratio` is the median over
all points; the picture needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks._command import benchmark_parser
from benchmarks._sizes import SIZES, build_model, question, text
from benchmarks._timing import machine, seconds, spread
from benchmarks.update import expanded_logprobs
from video_r1.models.group_forward import group_logprobs

AT = {"completions": 8, "frames": 16, "completion length": 64}
SWEEPS = {
    "completions": (2, 4, 8, 12, 16),
    "frames": (8, 16, 32, 64),
    "completion length": (16, 64, 128, 256),
}


def measured(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        wall = seconds(work, device)
        times.append(wall if device.type == "cuda" else time.process_time() - start)
    return min(times)


def point(model: Any, place: dict[str, int], device: torch.device, rounds: int) -> tuple[float, float]:
    """Seconds of one row and of the expanded batch."""
    generator = torch.Generator().manual_seed(0)
    size = replace(SIZES["lab"], frames=place["frames"], frame=(8, 8))
    prompts = [question(size, generator)]
    lengths = [place["completion length"]] * place["completions"]
    completions = [[text(size, length, generator) for length in lengths]]

    def update(score: Callable[[], Tensor]) -> None:
        score().sum().backward()
        model.zero_grad(set_to_none=True)

    return (
        measured(
            lambda: update(lambda: group_logprobs(model, prompts, completions).logprobs), device, rounds
        ),
        measured(lambda: update(lambda: expanded_logprobs(model, prompts, completions)), device, rounds),
    )


def draw(points: dict[str, list[dict[str, float]]], unit: str, path: str) -> None:
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, len(points), figsize=(12, 3.6), sharey=True)
    for panel, (name, rows) in zip(panels, points.items(), strict=True):
        places = [row["at"] for row in rows]
        panel.plot(places, [row["expanded"] for row in rows], "o--", color="#888888", label="expanded batch")
        panel.plot(places, [row["row"] for row in rows], "o-", color="#1f6feb", label="group in one row")
        fixed = ", ".join(f"{other} {value}" for other, value in AT.items() if other != name)
        panel.set_title(fixed, fontsize=9)
        panel.set_xlabel(name)
        panel.set_xticks(places)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # of all, when all have their lines
    panels[0].set_ylabel(f"{unit} an update")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    model = build_model(SIZES["lab"], device, torch.float32)
    point(model, AT, device, 1)  # what is made once only
    points: dict[str, list[dict[str, float]]] = {}
    for name, values in SWEEPS.items():
        points[name] = []
        for value in values:
            ours, other = point(model, {**AT, name: value}, device, arguments.rounds)
            points[name].append({"at": value, "row": round(ours, 4), "expanded": round(other, 4)})
    ratios = [row["expanded"] / row["row"] for rows in points.values() for row in rows]
    unit = "seconds" if device.type == "cuda" else "processor seconds"
    if arguments.picture:
        draw(points, unit, arguments.picture)
    return {
        **spread(ratios),
        "unit": unit,
        "points": points,
        "sizes": {"model": "lab", **AT},
    } | machine(device)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--picture", help="file to draw, such as docs/complexity.png")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
