"""Model families, and what the fast paths need to know of each that the model itself does not say.

A family is an entry of `FAMILIES`, by `model_type`. What a model, its config or its processor says is not
repeated here: placeholders, chat template, rotary positions, the multiple of a frame's sides, which layers
have a state, DeepStack.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from video_r1.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about a model family."""

    name: str  # for messages
    tower_linear: str  # regular expression for the names of the tower's linear layers
    text_linear: tuple[str, ...] = (
        *ATTENTION,
        *FEED_FORWARD,
    )  # ends of the text's linear layers' names
    timestamp_tokens: int = 0  # of text before each temporal patch, about; 0: a video is one block
    windows: bool = False  # layers of the tower attend within windows of a frame
    resampled_positions: bool = False  # the tower resamples learnt positions to each frame's grid
    # Published checkpoints hold the transposes of transformers' own expert tensors; vLLM reads the former.
    transposed_experts: bool = False
    state_functions: str | None = None  # transformers' module with the functions of layers with a state

    @property
    def text_layers(self) -> str:
        """Regular expression for the names of the text model's linear layers, without adapters' wrappers."""
        return rf".*\blanguage_model\..*\.({'|'.join(self.text_linear)})"


# arXiv 2502.13923: time positions in seconds (`second_per_grid_ts`), windows in the tower
QWEN2_5_VL = Family(
    "Qwen2.5-VL",
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj))|merger\.mlp\.[02]",
    windows=True,
)
# arXiv 2409.12191: a video is one block of placeholders, its time is in the rotary positions
QWEN2_VL = Family("Qwen2-VL", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))|merger\.mlp\.[02]")
# arXiv 2511.21631: a time as text before each temporal patch, DeepStack, resampled positions
QWEN3_VL = Family(
    "Qwen3-VL",
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"
    r"|(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
    timestamp_tokens=10,
    resampled_positions=True,
)
# Experts in place of most feed-forward layers.
QWEN3_VL_MOE = replace(QWEN3_VL, name="Qwen3-VL-MoE", transposed_experts=True)
# Prompts, positions and tower of Qwen3-VL without DeepStack; three of four text layers are Gated DeltaNet,
# which has a state in place of keys and values.
QWEN3_5 = replace(
    QWEN3_VL,
    name="Qwen3.5",
    text_linear=(*ATTENTION, *FEED_FORWARD, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    state_functions="transformers.models.qwen3_5.modeling_qwen3_5",
)
# Experts in place of the feed-forward layers, one of them for every token.
QWEN3_5_MOE = replace(
    QWEN3_5, name="Qwen3.5-MoE", state_functions="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"
)
FAMILIES = {
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen2_vl": QWEN2_VL,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
}
"""Families by model type."""


def find_family(model: Any) -> Family | None:
    """Return the family of a transformers model or config; None if it takes the general path."""
    return FAMILIES.get(str(getattr(getattr(model, "config", model), "model_type", None)))


def family_of(model: Any) -> Family:
    """Return the family of a transformers model or config. Raises ConfigError on the general path."""
    found = find_family(model)
    if found is None:
        raise ConfigError(f"{type(model).__name__} cannot take a group in one row; use {family_names()}")
    return found


def family_names() -> str:
    return ", ".join(family.name for family in FAMILIES.values())


def check_kind(model: Any) -> None:
    """Raise ConfigError if the model is neither of a known family nor fit for the general path."""
    if find_family(model) is not None:
        return
    sees = hasattr(model, "get_image_features")
    if not sees or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(model).__name__} is no decoder-only vision-language model (AutoModelForImageTextToText "
            f"with get_image_features), such as {family_names()}"
        )


def text_of(model: Any) -> Any:
    """Return the text model, without head, of a transformers model for conditional generation."""
    return model.get_decoder() if find_family(model) is None else model.model.language_model


def with_cache(text: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments of a text model's forward that fill or extend `cache`."""
    renamed = "cache" in inspect.signature(text.forward).parameters  # since transformers 5.24
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}


def vision_parameters(model: Any) -> list[nn.Parameter]:
    """Return the weights of towers, mergers and projections: all except those of text model and head."""
    parts = (text_of(model), model.get_output_embeddings())
    text = {id(weight) for part in parts for weight in part.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in text]


def text_linear_layers(model: Any) -> list[str]:
    """Return the names of the text model's linear layers except routers, for LoRA on the general path."""
    text = text_of(model)
    (prefix,) = (name for name, module in model.named_modules() if module is text)
    return [
        f"{prefix}.{name}"
        for name, module in text.named_modules()
        if isinstance(module, nn.Linear) and "router" not in name
    ]


def tower_of(model: Any) -> Any:
    """Return the vision tower of a model of a known family, including the merger."""
    return model.model.visual
