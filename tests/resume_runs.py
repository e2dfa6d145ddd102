"""Training runs as processes of their own that are killed at any moment and started again.

A run is the command `video-r1 rl RECIPE` in a process that is forked from a server which has imported torch
already, so that a run lasts seconds and a kill hits its work instead of its imports.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed_process import SERVER, write_into
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, training_arguments, write_manifest
from torch import Tensor

from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import Rollout


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of eight short steps over images and videos, with its model and its questions."""
    tiny_checkpoint("qwen2_5_vl", folder / "model")
    settings = {
        **training_arguments(folder / "run"),
        "model_name_or_path": str(folder / "model"),
        "train_manifest": str(write_manifest(folder)),
        "max_steps": 8,
        "save_steps": 2,
        "save_total_limit": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "cosine",
        "num_generations": 4,
        "max_completion_length": 8,
        "length_reward": 0.0,
        "preflight_questions": 0,
        "beta": 0.1,
        **changes,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


PHASES = ("loading", "between", "rollout", "update", "writing a checkpoint", "writing the model")


def command(words: list[str], output: str, phase: Any) -> None:
    """The process's work: one command line, whose exit code it ends with. `phase` tells what it is at."""
    write_into(output)
    from video_r1.cli import main
    from video_r1.rewards import judge, scoring
    from video_r1.rollout.transformers import TransformersEngine
    from video_r1.training.tgrpo import TGRPOTrainer

    torch.set_num_threads(1)
    scoring.format_scores = any_format
    judge.extract_answer = str.strip  # random weights never give an answer in tags
    watch(TransformersEngine, "sample", phase)
    watch(TGRPOTrainer, "training_step", phase)
    watch(TGRPOTrainer, "_save_checkpoint", phase)
    watch(TGRPOTrainer, "publish_model", phase)
    os._exit(main(words))


def any_format(sample: Sample, rollouts: Sequence[Rollout]) -> Tensor:
    """Replace the format reward, which random weights never earn, by one that can be learnt."""
    return torch.tensor([int(rollout.token_ids.sum()) % 97 / 97 for rollout in rollouts])


def watch(owner: type, name: str, phase: Any) -> None:
    """Makes a method say in `phase` that it is at work."""
    number = {"sample": 2, "training_step": 3, "_save_checkpoint": 4, "publish_model": 5}[name]
    method = getattr(owner, name)

    @wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        phase.value = number
        result = method(*args, **kwargs)
        phase.value = 1
        return result

    setattr(owner, name, watched)


def start(recipe: Path, run: Path) -> Any:
    """The running process of `video-r1 rl RECIPE --output_dir RUN`; its `phase` counts as in PHASES."""
    words = ["rl", str(recipe), "--output_dir", str(run)]
    phase = SERVER.Value("i", 0)
    process: Any = SERVER.Process(target=command, args=(words, str(recipe.with_suffix(".log")), phase))
    process.start()
    process.phase = phase
    return process


def finish(recipe: Path, run: Path, limit: float = 300) -> None:
    """Starts the run and waits for its end; it has to succeed."""
    process = start(recipe, run)
    process.join(limit)
    assert process.exitcode == 0, recipe.with_suffix(".log").read_text()[-3000:]


@dataclass
class Killed:
    """Kills by phase, number of repeated steps, and the finished runs, killed sometimes or never."""

    moments: Counter[str] = field(default_factory=Counter)
    repeated_steps: int = 0
    finished: list[Path] = field(default_factory=list)


def kill_often(recipe: Path, run: Path, kills: int, seconds: float, seed: int) -> Killed:
    """Starts the run again after each of `kills` kills at random times, then lets it finish.

    seconds: how long an undisturbed run takes. Every other kill waits until a checkpoint is being written.
    A run that ends before it is killed is moved away, and the next one begins anew.
    """
    draw, seen = random.Random(seed), Killed()
    while sum(seen.moments.values()) < kills:
        process = start(recipe, run)
        if sum(seen.moments.values()) % 2:
            wait_for_phase("writing a checkpoint", process)
            time.sleep(draw.uniform(0, 0.1))
        else:
            wait_for_phase("rollout", process)
            process.join(draw.uniform(0, seconds / 3))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            seen.moments[PHASES[process.phase.value]] += 1
            last = max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)
            lines = read_whole_lines(run / "metrics.jsonl")
            seen.repeated_steps += sum(line["step"] > last for line in lines)
        else:  # it had ended before
            assert process.exitcode == 0, recipe.with_suffix(".log").read_text()[-3000:]
            seen.finished.append(run.with_name(f"{run.name}-{len(seen.finished)}"))
            run.rename(seen.finished[-1])
    finish(recipe, run)
    seen.finished.append(run)
    return seen


def wait_for_phase(name: str, process: Any) -> None:
    while process.is_alive() and process.phase.value != PHASES.index(name):
        time.sleep(0.001)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(path)
    except (FileNotFoundError, ValueError):  # a line that the killed process did not end
        return []


def comparable(run: Path, *without: str) -> list[dict[str, Any]]:
    """The run's metrics without what depends on the clock, and without names that begin as `without`."""
    timed = ("time", "seconds/", "speed/", "memory/", *without)
    lines = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def same_figures(one: Path, two: Path, within: float = 1e-5) -> None:
    """Loss and every logged figure."""
    for alone, together in zip(comparable(one), comparable(two), strict=True):
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, abs=within), (alone["step"], name)


def same_weights(one: Path, two: Path, within: float = 1e-5) -> None:
    """All weights in the models of two run folders."""
    weights = [load_file(run / "model.safetensors") for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=within, msg=name)
