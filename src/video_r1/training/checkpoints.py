"""Checkpoints that are whole or absent: written under another name, flushed to the disk, then renamed.

    unfinished/checkpoint-100/…  ─► flush ─► rename ─► checkpoint-100/
    unfinished/model/…           ─► flush ─► rename file by file, config.json last ─► the run folder

A process that is killed, or a disk that fills up, leaves an `unfinished` folder behind, which nothing loads.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from video_r1.errors import VideoR1Error, first_line
from video_r1.files import LAST_FILES, flush, flush_folder
from video_r1.processes import is_lost_process

UNFINISHED = "unfinished"
TRAINING_FILES = (
    *("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "pytorch_model_fsdp"),
    *("latest", "zero_to_"),  # DeepSpeed's, beside a folder
)
"""How the files begin that only a run that is continued needs."""


def publish_folder(source: Path, target: Path) -> None:
    """Puts the complete folder `source` in the place of `target`; what was there before is removed after.

    `source` lies alone in a folder of the same file system, which is removed. `target` never holds a mixture.
    """
    flush_folder(source)
    earlier = source.with_name(f"{source.name}.earlier")
    if target.exists():
        target.rename(earlier)
    source.rename(target)
    flush(target.parent)
    shutil.rmtree(source.parent)


def publish_files(source: Path, target: Path) -> None:
    """Moves the files of a model's folder into `target`, one rename each, config.json last.

    `source` lies alone in a folder, which is removed.
    """
    flush_folder(source)
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name in LAST_FILES):
        path.replace(target / path.name)
    flush(target)
    shutil.rmtree(source.parent)


def publish_copy(checkpoint: Path, target: Path) -> None:
    """Makes `target` a model folder with a checkpoint's model and processor, without its training state."""
    copy = target / UNFINISHED / "model"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file() and not path.name.startswith(TRAINING_FILES):
            shutil.copyfile(path, copy / path.name)
    publish_files(copy, target)


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turns a failure to write `what` below `folder` into a VideoR1Error that says how to go on.

    What is unfinished is removed, which also makes room for the files of other programs.
    """
    try:
        yield
    # safetensors and torch.save report a full disk by errors of their own
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_lost_process(error):
            raise
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        reason = first_line(error)
        try:
            free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MB are free"
        except OSError:
            free = "the disk does not answer"
        whole = last_whole_checkpoint(folder)
        rest = f"{whole.name} is whole" if whole is not None else "there is no earlier checkpoint"
        raise VideoR1Error(
            f"{folder}: {what} cannot be written: {reason} ({free}). {rest}: make room or mend the disk, "
            "then start the same command again; it goes on from there"
        ) from error


def check_writable(folder: Path) -> None:
    """Raises VideoR1Error when files cannot be made in the folder (which is made, where it is missing)."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)  # another process of the run may have been here
    except OSError as error:
        raise VideoR1Error(
            f"output_dir {folder} cannot be written: {error.strerror or error}; choose another one"
        ) from error


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end; None when there is none.

    trainer_state.json is the last file of a checkpoint, so one that can be read marks the others as whole.
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            steps[read_state(path)["global_step"]] = path
        except (OSError, ValueError, KeyError, TypeError):  # half-written: killed while it was saved
            continue
    return steps[max(steps)] if steps else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


class BestCheckpoint(TrainerCallback):
    """Takes up a continued run's validation: its best checkpoint, wherever the run folder lies now, and no
    second validation before the first step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        if state.global_step == 0:
            return
        args.eval_on_start = False
        best = best_checkpoint(self.folder, state.best_global_step)
        if best is not None:
            state.best_model_checkpoint = str(best)


def best_checkpoint(folder: Path, step: int | None) -> Path | None:
    """The checkpoint of the best validation's step; None where there was no validation, or no checkpoint."""
    best = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    return best if step and best.is_dir() else None


def stopped_early(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint (its trainer_state.json) is the last one of a run that early stopping ended."""
    saved = state["stateful_callbacks"].get(EarlyStoppingCallback.__name__)
    return saved is not None and (
        saved["attributes"]["early_stopping_patience_counter"] >= saved["args"]["early_stopping_patience"]
    )
