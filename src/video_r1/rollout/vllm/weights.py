"""The trained model's weights as vLLM takes them: whole tensors under the names of the plain model.

model (PEFT, DDP, FSDP2) ─► (name, tensor) one at a time, LoRA merged on the way ─► vLLM's reload
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from video_r1.models.four_bits import dense_weight, is_four_bit
from video_r1.models.group_forward import vision_language_model

HEAD = "lm_head.weight"


@torch.no_grad()
def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model inside DDP, FSDP2 and PEFT by its plain name; detached, 4 bits in full.

    The head is always among them. A model that ties it to the embedding saves no head, and vLLM would keep
    the old one without an error. Adapters are added to copies of their weights, W + s·B·A, layer by layer:
    the model itself is left as it is (merging and unmerging it in place would round its weights).
    """
    inner = vision_language_model(model)
    layers = dict(inner.named_modules())
    merged = {name: layer for name, layer in layers.items() if hasattr(layer, "get_delta_weight")}
    small = {name.removesuffix(".base_layer"): layer for name, layer in layers.items() if is_four_bit(layer)}
    names = set()
    for name, tensor in inner.state_dict().items():
        plain = _plain_name(name)
        owner, _, rest = (plain or "").partition(".weight")
        if plain is None or (rest and owner in small):  # PEFT's own, or the scales of 4-bit weights
            continue
        names.add(plain)
        if plain.endswith(".weight") and owner in merged:
            yield plain, _merged(merged[owner])
        elif plain.endswith(".weight") and owner in small:
            yield plain, dense_weight(small[owner])
        else:
            yield plain, _whole(tensor)
    if HEAD not in names:
        yield HEAD, _whole(inner.get_output_embeddings().weight).detach()


def _merged(layer: Any) -> Tensor:
    base = layer.base_layer
    weight = dense_weight(base) if is_four_bit(base) else _whole(base.weight)
    if layer.merged or layer.disable_adapters:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).to(weight)
    return weight


def _plain_name(name: str) -> str | None:
    """The name without PEFT's parts; None for a tensor that only PEFT has."""
    if ".lora_" in name or ".original_module." in name:
        return None
    if ".modules_to_save." in name:
        before, after = name.split(".modules_to_save.")
        return f"{before}.{after.split('.', 1)[1]}"
    return name.replace(".base_layer.", ".")


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor (FSDP2) gathered from all processes; others as they are."""
    gathered: Any = getattr(tensor, "full_tensor", None)
    return (tensor if gathered is None else gathered()).detach()
