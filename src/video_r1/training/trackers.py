"""What trackers (TensorBoard, wandb, trackio, …) are told of a run beside its series.

The Trainer gives them the series: `train/<name>` for one of metrics.jsonl, `eval/<name>` for a validation's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from video_r1.recipe import Recipe, plain


def describe_run(args: Any, folder: Path, recipe: Recipe | None) -> None:
    """Gives the run the name of its folder, where it has no other, and its recipe's settings to the trackers.

    They show what `args.to_dict` returns: TrainingArguments, which know nothing of model, adapters and data.
    (Its own entries stay as they are: it hides tokens.)
    """
    if args.run_name is None:
        args.run_name = folder.name
    if recipe is not None:
        args.to_dict = partial(_together, plain(recipe.values()), args.to_dict)


def _together(others: dict[str, Any], own: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {**others, **own()}
