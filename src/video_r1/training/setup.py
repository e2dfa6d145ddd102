"""What both trainers are given: questions, and a model with its processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from video_r1.data.records import Sample, load_manifest
from video_r1.errors import ConfigError
from video_r1.models.loading import add_lora, freeze_vision, load_model, load_processor
from video_r1.recipe import Recipe
from video_r1.settings.shared import DataSettings, ModelSettings

Questions = str | Path | Sequence[Sample] | datasets.Dataset


def as_samples(questions: Questions | None) -> list[Sample]:
    """Samples of a manifest's path, a data set or a list. Raises ManifestError with every problem."""
    if questions is None:
        return []
    if isinstance(questions, (str, Path, datasets.Dataset)):
        return load_manifest(questions)
    return list(questions)


def as_validation(
    questions: Questions | dict[str, Questions] | None,
) -> list[Sample] | dict[str, list[Sample]] | None:
    """Held-out questions as samples, by name where there are several sets."""
    if isinstance(questions, dict):
        return {name: as_samples(part) for name, part in questions.items()}
    return None if questions is None else as_samples(questions)


def given_model(
    model: str | Path | PreTrainedModel, processor: ProcessorMixin | None, peft_config: Any = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor of a trainer's arguments; a path or hub id is loaded. Raises ConfigError."""
    if processor is None:
        source = model if isinstance(model, (str, Path)) else model.config.name_or_path
        if not source:
            raise ConfigError("the model comes from no checkpoint: pass its processor as processing_class")
        processor = load_processor(source)
    loaded = load_model(model) if isinstance(model, (str, Path)) else model
    return (
        loaded if peft_config is None else cast(PreTrainedModel, add_lora(loaded, config=peft_config))
    ), processor


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
        model = add_lora(
            model,
            settings.lora_r,
            settings.lora_alpha,
            settings.lora_dropout,
            lora_config(settings),
            settings.lora_vision_tower,
        )
    return model, load_processor(settings.model_name_or_path, settings.trust_remote_code)


def lora_config(settings: ModelSettings) -> Any:
    """A peft configuration for the modules that are named; None where the default ones are wanted."""
    if not settings.lora_target_modules:
        return None
    import peft  # an extra of this package

    return peft.LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_target_modules),
        task_type="CAUSAL_LM",
    )


def manifests_of(recipe: Recipe) -> tuple[list[Sample], list[Sample] | None]:
    """Training and validation questions of a recipe. Raises ManifestError with every problem."""
    data = recipe.section(DataSettings)
    assert data.train_manifest is not None  # a recipe without it is refused
    training, validation = (
        None if path is None else load_manifest(path, data.media_root, data.allow_urls)
        for path in (data.train_manifest, data.eval_manifest)
    )
    return training or [], validation
