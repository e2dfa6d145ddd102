"""`video-r1 plan`, from the cache if the same was planned before: importing torch alone takes longer."""

import os
import platform
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path

from video_r1.files import cache_folder, replace_text
from video_r1.fingerprint import digest
from video_r1.recipe import Recipe, plain
from video_r1.recipe_files import PACKAGE, checkpoint_behind
from video_r1.settings.commands import PlanSettings


def run_plan(recipe: Recipe) -> int:
    """Print the plan of a recipe; return 1 if it does not fit the GPU, else 0. Raises ConfigError."""
    kept, text = cache_file(recipe), ""
    if kept is not None and kept.is_file():
        text = kept.read_text(encoding="utf-8")
        print(text, end="")
    else:
        for line in import_module("video_r1.plan.plan").plan_lines(recipe):
            print(line, flush=True)
            text += f"{line}\n"
        with suppress(OSError):  # a cache that cannot be written costs time only
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                replace_text(kept, text)
    return int("\ndoes not fit: " in text)


def cache_file(recipe: Recipe) -> Path | None:
    """Return the file of this plan, named by all that it depends on; None without a cache folder."""
    values = recipe.values()
    model = recipe.section(PlanSettings).model_config or checkpoint_behind(str(values["model_name_or_path"]))
    files = [*Path(model).glob("*.json"), Path(str(values.get("deepspeed"))), *PACKAGE.rglob("*.py")]
    given = sorted(name for section in recipe.sections for name in section.given)
    known = {
        "values": values, "given": given, "source": recipe.source, "made_for": asdict(recipe.made_for),
        "versions": [metadata.version(name) for name in ("torch", "transformers")],
        "files": sorted((str(path), path.stat().st_mtime_ns) for path in files if path.is_file()),
        "machine": [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")],
    }  # fmt: skip
    caches = cache_folder()
    return None if caches is None else caches / "plans" / f"{digest(plain(known))}.txt"
