"""A long T-GRPO run on the lab with damaged clips: memory and open files at its end and after a tenth of it.

    python -m benchmarks.soak --json [--steps 2000] [--damaged 0.05]

Short completions, many clips and a small memory cache: nearly every step decodes files, records rollouts and
writes checkpoints. Memory is the resident memory of the process and of its decoders. A run passes if both
figures are at most 2 % above those after a tenth of the steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from benchmarks._command import benchmark_parser
from video_r1 import TGRPOConfig, TGRPOTrainer
from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.settings.commands import LabSettings

LARGEST_GROWTH = 1.02


class Usage(TrainerCallback):
    """Measures memory (bytes) and open files after some steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.memory: list[int] = []
        self.files: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step in self.steps:
            self.measure()

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.measure()

    def measure(self) -> None:
        here = psutil.Process()
        processes = [here, *here.children(recursive=True)]
        self.memory.append(sum(each.memory_info().rss for each in processes))
        self.files.append(sum(each.num_fds() for each in processes))


def varied(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Reward completions differently, so that each step has a gradient."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def run(steps: int, damaged: float, questions: int = 200) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lab(LabSettings(folder=name, train=questions, test=0, seed=5, workers=1))
        rows = json.loads((folder / "rl.json").read_text())
        for row in rows[: round(damaged * len(rows))]:
            path = folder / row["path"]
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        usage = Usage((max(1, steps // 10),))
        args = TGRPOConfig(
            output_dir=str(folder / "run"), max_steps=steps, use_cpu=True, num_generations=2,
            max_completion_length=8, length_reward=0.0, preflight_questions=0, frame_pixels=56 * 56,
            image_pixels=56 * 56, max_frames=8, per_device_train_batch_size=2, log_rollouts=1,
            logging_steps=5, save_steps=max(1, steps // 8), save_total_limit=2, media_cache_mb=1,
            disable_tqdm=True,
        )  # fmt: skip
        began = time.perf_counter()
        manifest = str(folder / "rl.json")
        TGRPOTrainer(str(base_folder()), varied, args, manifest, callbacks=[usage]).train()
        seconds = time.perf_counter() - began
        quarantine = folder / "run" / "quarantine.jsonl"
        quarantined = len(quarantine.read_text().splitlines()) if quarantine.exists() else 0
    memory, files = (values[-1] / values[0] for values in (usage.memory, usage.files))
    return {
        "steps": steps,
        "seconds": round(seconds),
        "quarantined": quarantined,
        "memory_mib": [round(value / 2**20) for value in usage.memory],
        "open_files": usage.files,
        "memory_growth": round(memory, 4),
        "passes": memory <= LARGEST_GROWTH and files <= LARGEST_GROWTH,
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--damaged", type=float, default=0.05, help="share of questions with a broken file")
    arguments: argparse.Namespace = parser.parse_args()
    print(json.dumps(run(arguments.steps, arguments.damaged)))


if __name__ == "__main__":
    main()
