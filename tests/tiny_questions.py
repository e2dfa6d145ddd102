"""A small manifest on real files for the trainers' tests: all five problem types, clips and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_models import moving_square, write_clip

KINDS = ("multiple choice", "numerical", "OCR", "free-form", "regression")
ANSWERS = {
    "multiple choice": "B",
    "numerical": "3",
    "OCR": "left right",
    "free-form": "the square moves right",
    "regression": "2.5",
}


def row(number: int, problem_type: str, data_type: str, path: str) -> dict[str, Any]:
    """One manifest row with a rationale."""
    return {
        "problem_id": number,
        "problem": f"Question {number}: which way does the square move?",
        "data_type": data_type,
        "problem_type": problem_type,
        "options": ["A. left", "B. right"] if problem_type == "multiple choice" else [],
        "process": "<think>It is left, then right.</think>",
        "solution": f"<answer>{ANSWERS[problem_type]}</answer>",
        "path": path,
        "data_source": "tests/squares",
    }


def write_manifest(folder: Path, videos: int = 5, images: int = 3, bad: tuple[int, ...] = ()) -> Path:
    """Writes clips, pictures and manifest.json into `folder`; the videos numbered in `bad` are no clips."""
    rows = []
    for number in range(videos):
        path = folder / f"{number}.mp4"
        if number in bad:
            path.write_text("this is no clip")
        else:
            write_clip(path, np.roll(moving_square(frames=8), number * 3, axis=0), fps=4.0)
        rows.append(row(number, KINDS[number % 5], "video", path.name))
    for number in range(videos, videos + images):
        path = folder / f"{number}.png"
        pixels = np.full((56, 84, 3), 20 * number % 256, np.uint8)
        pixels[10:30, 10:30] = (220, 30, 30)
        Image.fromarray(pixels).save(path)
        rows.append(row(number, KINDS[number % 5], "image", path.name))
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(rows))
    return manifest


def training_arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of some seconds on CPU: two tokens a frame pair, three questions a step."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "frame_pixels": 56 * 56,
        "image_pixels": 56 * 84,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
