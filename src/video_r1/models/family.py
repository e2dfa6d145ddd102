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


def family_of(model: Any) -> Family:
    """The family of a transformers model or of its config. Raises ConfigError where there is none."""
    kind = str(getattr(getattr(model, "config", model), "model_type", None))
    found = known_families().get(kind)
    if found is None:
        names = ", ".join(family.name for family in known_families().values())
        raise ConfigError(f"{type(model).__name__} cannot take a group in one row; use {names}")
    return found


def text_of(model: Any) -> Any:
    """The text model, without head, of a transformers model for conditional generation."""
    return model.get_submodule(family_of(model).text)


def tower_of(model: Any) -> Any:
    """Its vision tower, merger included."""
    return model.get_submodule(family_of(model).tower)
