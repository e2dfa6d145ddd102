"""Model shapes for a plan: from a folder, the table of published checkpoints (shapes.toml) or the hub."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from video_r1.errors import ConfigError, first_line
from video_r1.models.loading import checked_source


@cache
def published() -> dict[str, Any]:
    """Return shapes.toml: checkpoints by name without -Instruct and -Thinking; `families`: defaults."""
    return tomllib.loads(Path(__file__).with_name("shapes.toml").read_text(encoding="utf-8"))


def plain_name(source: str) -> str:
    return source.removesuffix("-Instruct").removesuffix("-Thinking")


def is_published(source: str) -> bool:
    """Return whether the table has the shape; a folder of this name takes precedence."""
    return plain_name(source) in published().keys() - {"families"} and not Path(source).exists()


def published_config(source: str) -> PreTrainedConfig:
    entry = published()[plain_name(source)]
    tied, kind = entry["tie_word_embeddings"], entry["model_type"]
    family = published()["families"].get(kind, {"text_config": {}, "vision_config": {}})
    text = {**family["text_config"], **entry["text_config"]}
    text |= {"tie_word_embeddings": tied, "bos_token_id": None}
    vision = {**family["vision_config"], **entry["vision_config"]}
    return AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, tie_word_embeddings=tied, dtype="bfloat16",
        **family.get("more", {}),
    )  # fmt: skip


def published_frame(kind: str) -> int:
    """Return the tokens of a frame, with its time, of a model on the general path whose size is fixed.

    Raises ConfigError for a model type whose processor has to be asked.
    """
    family = published()["families"].get(kind, {})
    if "frame_tokens" not in family:
        raise ConfigError(
            f"a plan of {kind} asks its processor how many tokens a clip has: name a folder with its files "
            "too in model_name_or_path or --model_config"
        )
    return family["frame_tokens"]


def model_config(source: str | None) -> PreTrainedConfig:
    """Load the config of a checkpoint folder or hub id; the hub is asked only if the table lacks it."""
    if not source:
        raise ConfigError(
            "a plan needs the model's shape: name a checkpoint folder or a hub id in model_name_or_path or "
            "with --model_config"
        )
    if is_published(source):
        return published_config(source)
    try:
        config = AutoConfig.from_pretrained(checked_source(source, with_weights=False))
    except (OSError, ValueError, ConfigError) as error:
        reason = first_line(error).removeprefix(f"{source}: ")
        raise ConfigError(
            f"{source}: its config.json cannot be read ({reason}); it is all "
            "that a plan needs: if the checkpoint does not exist yet or the hub is out of reach, name a "
            "folder with the config.json of a model of the same shape in --model_config, or one of "
            f"{', '.join(name for name in published() if name != 'families')}"
        ) from error
    if not hasattr(config, "vision_config"):
        raise ConfigError(f"{source}: {config.model_type!r} is not a video-language model, e.g. Qwen2.5-VL")
    return config
