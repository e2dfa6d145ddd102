"""Checkpoints that are whole or absent: written under another name, flushed to the disk, then renamed.

    unfinished/checkpoint-100/…  ─► flush ─► rename ─► checkpoint-100/
    unfinished/model/…           ─► flush ─► rename file by file, config.json last ─► the run folder

A process that is killed, or a disk that fills up, leaves an `unfinished` folder behind, which nothing loads.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from video_r1.errors import VideoR1Error, first_line
from video_r1.files import LAST_FILES, flush, flush_folder
from video_r1.processes import is_lost_process

UNFINISHED = "unfinished"
TRAINING_FILES = (
    *("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "pytorch_model_fsdp"),
    *("latest", "zero_to_"),  # DeepSpeed's, beside a folder
)
"""First letters of files that only a resumed run needs."""


def publish_folder(source: Path, target: Path) -> None:
    """Replace `target` by the complete folder `source`, alone in its parent folder, which is removed."""
    flush_folder(source)
    earlier = source.with_name(f"{source.name}.earlier")
    if target.exists():
        target.rename(earlier)
    source.rename(target)
    flush(target.parent)
    shutil.rmtree(source.parent)


def publish_files(source: Path, target: Path) -> None:
    """Move a model's files from `source`, whose parent is removed, into `target`, config.json last."""
    flush_folder(source)
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name in LAST_FILES):
        path.replace(target / path.name)
    flush(target)
    shutil.rmtree(source.parent)


def publish_copy(checkpoint: Path, target: Path) -> None:
    """Copy a checkpoint's model and processor, without its training state, into `target`."""
    copy = target / UNFINISHED / "model"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file() and not path.name.startswith(TRAINING_FILES):
            shutil.copyfile(path, copy / path.name)
    publish_files(copy, target)


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn a failure to write `what` below `folder` into a VideoR1Error; remove unfinished files."""
    try:
        yield
    # safetensors and torch.save have their own errors for a full disk
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_lost_process(error):
            raise
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        whole = last_whole_checkpoint(folder)
        rest = f"{whole.name} is whole" if whole is not None else "there is no earlier checkpoint"
        raise VideoR1Error(
            f"{folder}: {what} cannot be written: {first_line(error)}. {rest}: make room or repair the disk, "
            "then start the same command again to resume from there"
        ) from error


def check_writable(folder: Path) -> None:
    """Raise VideoR1Error if no files can be created in the folder; create the folder if it is missing."""
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
    """Return a run's newest checkpoint with a readable trainer_state.json, which is written last; or None."""
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            steps[read_state(path)["global_step"]] = path
        except (OSError, ValueError, KeyError, TypeError):  # half-written: killed while it was saved
            continue
    return steps[max(steps)] if steps else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def best_checkpoint(folder: Path, step: int | None) -> Path | None:
    """Return the checkpoint of the best validation's step; None without a validation or checkpoint."""
    best = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    return best if step and best.is_dir() else None


def stopped_early(state: Mapping[str, Any]) -> bool:
    """Whether early stopping ended the run at the checkpoint with this trainer_state.json."""
    saved = state["stateful_callbacks"].get(EarlyStoppingCallback.__name__)
    return saved is not None and (
        saved["attributes"]["early_stopping_patience_counter"] >= saved["args"]["early_stopping_patience"]
    )
