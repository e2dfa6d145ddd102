"""What the fast paths need to know of a model family and cannot ask of the model itself.

Each family is one file in `models/families/`, named by the `model_type` of its config; adding one is adding
a file. What a model, its config or its processor says is not repeated there: placeholders and chat template
(the processor), rotary positions (`get_rope_index` of transformers' class), the multiple of a frame's sides
(the image processor's patch × merge), which layers have a state (`layer_types`), DeepStack (the tower).
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from video_r1.errors import ConfigError

FILES = "video_r1.models.families"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """name: what people call it.

    timestamp_tokens: tokens of text before each temporal patch of a video, about; 0 where a video's patches
        stand in one block.
    text, tower: where text model and vision tower are in transformers' model for conditional generation.
    text_linear: the linear layers of the text model that LoRA adapts, by the last part of their names.
    tower_linear: those of the tower, a regular expression for their names within it.
    windows: whether layers of the tower attend within windows of a frame.
    resampled_positions: whether the tower resamples learnt positions to each frame's grid.
    transposed_experts: whether the experts' tensors of the published checkpoints are the transposes of
        transformers' own; vLLM takes the published ones.
    state_functions: for models whose layers have a recurrent state, transformers' module with the functions
        that they call (models/gated_delta.py).
    """

    name: str
    tower_linear: str
    text_linear: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD)
    timestamp_tokens: int = 0
    windows: bool = False
    resampled_positions: bool = False
    transposed_experts: bool = False
    state_functions: str | None = None
    text: str = "model.language_model"
    tower: str = "model.visual"

    @property
    def text_layers(self) -> str:
        """A regular expression for the names of the text model's linear layers, adapters' wrappers aside."""
        return rf".*\b{self.text.rpartition('.')[2]}\..*\.({'|'.join(self.text_linear)})"

    @property
    def tower_layers(self) -> str:
        """The same for the vision tower."""
        return rf".*\b{self.tower.rpartition('.')[2]}\.({self.tower_linear})"


@cache
def known_families() -> dict[str, Family]:
    """All families, by model type."""
    names = sorted(module.name for module in pkgutil.iter_modules(import_module(FILES).__path__))
    return {name: import_module(f"{FILES}.{name}").FAMILY for name in names}


def find_family(model: Any) -> Family | None:
    """The family of a transformers model or of its config; None for one that takes the general path."""
    return known_families().get(str(getattr(getattr(model, "config", model), "model_type", None)))


def family_of(model: Any) -> Family:
    """As `find_family`. Raises ConfigError where there is none."""
    found = find_family(model)
    if found is None:
        raise ConfigError(f"{type(model).__name__} cannot take a group in one row; use {family_names()}")
    return found


def family_names() -> str:
    return ", ".join(family.name for family in known_families().values())


def check_kind(model: Any) -> None:
    """Raises ConfigError for what is neither of a known family nor fit for the general path."""
    if find_family(model) is not None:
        return
    sees = hasattr(model, "get_image_features")
    if not sees or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(model).__name__} is no vision-language model with a decoder alone (one of "
            f"AutoModelForImageTextToText, with get_image_features), such as {family_names()}"
        )


def text_of(model: Any) -> Any:
    """The text model, without head, of a transformers model for conditional generation."""
    family = find_family(model)
    return model.get_decoder() if family is None else model.get_submodule(family.text)


def vision_parameters(model: Any) -> list[nn.Parameter]:
    """All weights but those of text model and head: of towers, mergers, projections."""
    parts = (text_of(model), model.get_output_embeddings())
    text = {id(weight) for part in parts for weight in part.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in text]


def text_linear_layers(model: Any) -> list[str]:
    """The names of the text model's linear layers but routers, for LoRA on the general path."""
    text = text_of(model)
    (prefix,) = (name for name, module in model.named_modules() if module is text)
    return [
        f"{prefix}.{name}"
        for name, module in text.named_modules()
        if isinstance(module, nn.Linear) and "router" not in name
    ]


def tower_of(model: Any) -> Any:
    """Its vision tower, merger included."""
    return model.get_submodule(family_of(model).tower)
