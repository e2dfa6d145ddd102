"""A run in its folder: started, or continued from its last whole checkpoint; its model saved at the end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from video_r1.data.records import Sample, load_manifest
from video_r1.errors import ConfigError
from video_r1.models.loading import add_lora, freeze_vision, load_model, load_processor, lora_options
from video_r1.packages import check_optimizer
from video_r1.recipe import Recipe, plain
from video_r1.settings.shared import DataSettings, ModelSettings
from video_r1.training.checkpoints import (
    LAST_FILES,
    UNFINISHED,
    check_writable,
    last_whole_checkpoint,
    publish_copy,
    read_state,
)
from video_r1.training.validation import best_checkpoint, stopped_early

if TYPE_CHECKING:
    from video_r1.training.trainer import QuestionTrainer

logger = logging.getLogger(__name__)

LENGTHS = ("max_steps", "num_train_epochs")
MAY_CHANGE = frozenset(
    (
        "output_dir",  # where the folder is now
        *LENGTHS,
        "logging_steps",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "eval_steps",
        "eval_strategy",
    )
    + ("report_to", "run_name", "disable_tqdm", "log_rollouts", "media_threads", "media_cache_mb")
    + ("media_seconds", "media_memory_mb")
    + ("vllm_server_base_url", "vllm_server_timeout", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode")
)
"""Settings that may differ when a run is continued: they leave the steps that are done as they are."""


def run_recipe(recipe: Recipe, trainer: Callable[..., QuestionTrainer], config: type[Any]) -> Path:
    """Trains what a resolved recipe says. Returns the run folder, which is a checkpoint as well.

    config: the dataclass of the trainer's settings. A run folder that holds a whole checkpoint is continued
    from it. Raises ConfigError, ManifestError, and what the trainer raises.
    """
    args = config(**recipe.arguments_for(config))

    def build() -> QuestionTrainer:
        training, validation = manifests_of(recipe)
        model, processor = model_of(recipe)
        return trainer(
            model,
            args=args,
            train_dataset=training,
            eval_dataset=validation,
            processing_class=processor,
            recipe=recipe,
        )

    return run_in_folder(recipe, str(args.output_dir), build)


def run_in_folder(recipe: Recipe, folder: str | Path, build: Callable[[], QuestionTrainer]) -> Path:
    """Train what `build` returns in the run folder, and save model and processor there. Returns the folder.

    A folder with a whole checkpoint is continued from it; a finished run is left as it is. Raises ConfigError
    when the checkpoint belongs to a run with other settings, VideoR1Error when the folder cannot be written,
    and what training raises.
    """
    folder = Path(folder)
    if recipe.values().get("resume_from_checkpoint"):
        raise ConfigError(
            "resume_from_checkpoint: a run goes on from the last whole checkpoint in output_dir by itself; "
            "to start another one from a checkpoint's weights, name it in model_name_or_path"
        )
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is not None:
        changed = changed_settings(recipe, folder)
        refused = [
            f"{name} ({old!r} → {new!r})" for name, (old, new) in changed.items() if name not in MAY_CHANGE
        ]
        if refused:
            raise ConfigError(
                f"output_dir {folder} holds a run with other settings: {', '.join(refused)}. Choose another "
                "output_dir, or remove the folder to start again"
            )
        if is_finished(folder) and not any(name in changed for name in LENGTHS):
            logger.warning("%s: this run is finished; remove the folder to run it again", folder)
            return folder
        logger.warning("%s: continuing from %s", folder, checkpoint.name)
    check_optimizer(str(recipe.values().get("optim", "")))  # before weights are loaded
    check_writable(folder)
    trainer = build()
    state = {} if checkpoint is None else read_state(checkpoint)
    if checkpoint is not None and (state["global_step"] >= trainer.whole_steps() or stopped_early(state)):
        # All steps are done; what is missing is the model of a run that was killed while it was saved.
        best = None
        if trainer.args.load_best_model_at_end:
            best = best_checkpoint(folder, state["best_global_step"])
        if trainer.is_world_process_zero():
            publish_copy(checkpoint if best is None else best, folder)
        return folder
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # what a killed run did not end to write
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.publish_model()
    return folder


def changed_settings(recipe: Recipe, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Settings of the recipe that differ from those in the folder's config.yaml: name to (there, here)."""
    try:
        there = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{folder / 'config.yaml'} cannot be read: {error}; choose another output_dir"
        ) from error
    here = plain(recipe.values())
    return {name: (there[name], here[name]) for name in here if name in there and there[name] != here[name]}


def is_finished(folder: Path) -> bool:
    """Whether the run's model was saved after its last start, which writes config.yaml."""
    settings = folder / "config.yaml"
    if not settings.is_file() or not any(folder.glob("*.safetensors")):
        return False
    model = [path for name in LAST_FILES if (path := folder / name).is_file()]
    return any(path.stat().st_mtime_ns >= settings.stat().st_mtime_ns for path in model)


def model_of(recipe: Recipe) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor that a recipe names, frozen and with adapters as it says. Raises ConfigError."""
    settings = recipe.section(ModelSettings)
    assert settings.model_name_or_path is not None  # a recipe without it is refused
    model = load_model(
        settings.model_name_or_path,
        settings.dtype,
        settings.attn_implementation,
        settings.trust_remote_code,
        load_in_4bit=settings.load_in_4bit,
    )
    if settings.freeze_vision_tower:
        freeze_vision(model)
    if settings.use_peft:
        set_seed(int(recipe.values()["seed"]))  # new adapters are drawn at random
        model = add_lora(model, **lora_options(settings))
    return model, load_processor(settings.model_name_or_path, settings.trust_remote_code)


def manifests_of(recipe: Recipe) -> tuple[list[Sample], list[Sample] | None]:
    """Training and validation questions of a recipe. Raises ManifestError with every problem."""
    data = recipe.section(DataSettings)
    assert data.train_manifest is not None  # a recipe without it is refused
    training, validation = (
        None if path is None else load_manifest(path, data.media_root, data.allow_urls)
        for path in (data.train_manifest, data.eval_manifest)
    )
    return training or [], validation
