"""A dry run of a training recipe with the small packaged model: `video-r1 rl RECIPE --smoke`.

It shows in a minute and without a GPU whether a recipe's settings load, fit together and survive two steps
and a checkpoint, on the first rows of its own manifest if that is on this machine. Settings that do not work
with the small model, a CPU or without a cold start are replaced. Only the report is kept.
"""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from video_r1 import availability
from video_r1.commands import COMMANDS
from video_r1.data.manifests.records import placed_rows
from video_r1.data.manifests.tables import Unreadable
from video_r1.data.sources.media_paths import media_root_of
from video_r1.errors import ManifestError
from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.recipe import Recipe, load_recipe
from video_r1.report.page import build_report
from video_r1.settings.base import flat
from video_r1.settings.commands import LabSettings

STEPS = 2
SIDE = 56  # pixels of a frame's side: those of the small model's training
MOST_FRAMES = 8
MOST_TOKENS = 24  # of a completion
QUESTIONS = 8


def smoke_recipe(recipe: Recipe, lab: Path, output_dir: Path) -> tuple[Recipe, dict[str, tuple[Any, Any]]]:
    """Return the recipe with the small model, and the replaced settings: name to (before, after).

    recipe: of `sft` or `rl`. lab: a folder of `write_lab`, used if the recipe's manifests are not on this
    machine. Raises ConfigError as `load_recipe`, and ManifestError if a manifest cannot be read.
    """
    values = flat(recipe.values(), COMMANDS[recipe.command].types())
    changes: dict[str, Any] = {
        "model_name_or_path": str(base_folder()),
        **smoke_manifests(recipe, lab, output_dir.parent),
        "keep": None,
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "gradient_accumulation_steps": min(values["gradient_accumulation_steps"], 2),
        "logging_steps": 1,
        "save_steps": STEPS * values.get("num_iterations", 1),
        "max_frames": min(values["max_frames"], MOST_FRAMES),
        "frame_pixels": SIDE * SIDE,
        "image_pixels": SIDE * SIDE,
        "attn_implementation": None,
        "report_to": "none",
    }
    if recipe.command == "rl":
        changes |= {
            "max_completion_length": min(values["max_completion_length"], MOST_TOKENS),
            "length_range": None,  # as long as completions may be
            "preflight_questions": 0,  # it would complain that no reward is reachable without a cold start
            "engine": "transformers",
            "async_rollouts": 0,
        }
        if values["teacher_model_name_or_path"] is not None:
            changes |= {
                "teacher_model_name_or_path": str(base_folder()),
                "teacher_frames": MOST_FRAMES,
                "teacher_pixels": None,
            }
    optimizer, missing = str(values.get("optim", "")), not availability.has_bitsandbytes()
    if optimizer.startswith("paged_") or (
        missing and availability.BITSANDBYTES_OPTIMIZERS.fullmatch(optimizer)
    ):
        changes["optim"] = "adamw_torch"  # paged optimizers need a GPU
    if missing:
        changes["load_in_4bit"] = False
    changes |= {name: None for name in ("deepspeed", "fsdp", "fsdp_config") if values.get(name)}
    replaced = {name: (values.get(name), new) for name, new in changes.items() if values.get(name) != new}
    values |= changes
    if not torch.cuda.is_available():
        values["use_cpu"] = True
    return load_recipe(recipe.command, None, {n: v for n, v in values.items() if v is not None}), replaced


def smoke_manifests(recipe: Recipe, lab: Path, folder: Path) -> dict[str, Any]:
    """Write the first rows of the recipe's manifests to `folder`; return the manifest settings.

    Lab manifests are used if the training manifest is not on this machine. A validation manifest with another
    media root is replaced by that of training.
    """
    values = recipe.values()
    train, held_out, given_root = (values[n] for n in ("train_manifest", "eval_manifest", "media_root"))
    if not Path(train).exists():
        made_up = lab / ("sft.json" if recipe.command == "sft" else "rl.json")
        test = None if held_out is None else str(lab / "test.json")
        return {"train_manifest": str(made_up), "eval_manifest": test, "media_root": None}
    root = media_root_of(train, given_root)
    rows = first_rows(train, root, folder / f"first_{QUESTIONS}_for_training.json")
    test = None if held_out is None else rows
    if held_out and Path(held_out).exists() and media_root_of(held_out, given_root) == root:
        test = first_rows(held_out, root, folder / f"first_{QUESTIONS}.json")
    return {"train_manifest": rows, "eval_manifest": test, "media_root": root}


def first_rows(manifest: str, media_root: str, made: Path) -> str:
    """Write the first rows of a manifest to `made` and return its path. Raises ManifestError."""
    rows = []
    for number, row in itertools.islice(placed_rows(manifest, "train", media_root), QUESTIONS):
        if isinstance(row, Unreadable):
            raise ManifestError(f"{manifest}: row {number}: {row.reason}")
        rows.append(row)
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(json.dumps(rows, default=str), encoding="utf-8")
    return str(made)


def run_smoke(recipe: Recipe, run: Callable[[Recipe], int]) -> int:
    """Call `run` with the small model in a temporary folder; keep its report beside the recipe's run folder.

    Returns the result of `run`. Raises as `run` and `build_report`.
    """
    with tempfile.TemporaryDirectory(prefix="video-r1-smoke-") as folder:
        lab, output = Path(folder) / "lab", Path(folder) / "run"
        if not Path(recipe.values()["train_manifest"]).exists():
            write_lab(LabSettings(folder=str(lab), train=QUESTIONS, test=QUESTIONS, workers=1))
        smoked, replaced = smoke_recipe(recipe, lab, output)
        name = recipe.source or f"video-r1 {recipe.command}"
        print(f"smoke: {STEPS} steps of {name} with the small packaged model; replaced settings:")
        for name, (before, now) in replaced.items():
            print(f"  {name}: {before} → {now}")
        code = run(smoked)
        report = build_report(output, f"{recipe.values()['output_dir'].rstrip('/')}-smoke.html")
        print(f"smoke: done; report: {report}; everything else is removed")
    return code
