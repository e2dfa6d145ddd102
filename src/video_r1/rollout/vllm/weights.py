"""The trained model's weights as vLLM takes them: whole tensors under the names of the plain model.

model (PEFT, DDP, FSDP2) ─► (name, tensor) one at a time, LoRA merged on the way ─► vLLM's reload
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from video_r1.models.adapters import adapted_name, merged_weight, whole
from video_r1.models.family import find_family
from video_r1.models.four_bits import dense_weight, is_four_bit
from video_r1.models.group_forward import vision_language_model
from video_r1.models.loading import EXPERTS

HEAD = "lm_head.weight"


@torch.no_grad()
def checkpoint_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model inside DDP, FSDP2 and PEFT by its plain name, as a published checkpoint has
    it; detached, 4 bits in full.

    The head is always among them. A model that ties it to the embedding saves no head, and vLLM would keep
    the old one without an error. Adapters are added to copies of their weights, W + s·B·A, layer by layer:
    the model itself is left as it is (merging and unmerging it in place would round its weights).
    """
    inner = vision_language_model(model)
    layers = dict(inner.named_modules())
    merged = {
        f"{_without_layers(name)}.{adapted_name(layer)}": layer
        for name, layer in layers.items()
        if hasattr(layer, "get_delta_weight")
    }
    small = {f"{_without_layers(name)}.weight": layer for name, layer in layers.items() if is_four_bit(layer)}
    family = find_family(inner)
    turned = EXPERTS if family is not None and family.transposed_experts else ()
    names = set()
    # state_dict() would share out again what FSDP2 has gathered
    for name, parameter in inner.named_parameters():
        plain = _plain_name(name)
        if plain is None:
            continue
        names.add(plain)
        if plain in merged:
            tensor = merged_weight(merged[plain])
        elif plain in small:
            tensor = dense_weight(small[plain])
        else:
            tensor = whole(parameter)
        yield plain, tensor.transpose(1, 2) if plain.endswith(turned) else tensor
    if HEAD not in names:
        yield HEAD, whole(inner.get_output_embeddings().weight)


def _plain_name(name: str) -> str | None:
    """The name without PEFT's parts; None for a tensor that only PEFT has."""
    if ".lora_" in name or ".original_module." in name:
        return None
    if ".modules_to_save." in name:
        before, after = name.split(".modules_to_save.")
        return f"{before}.{after.split('.', 1)[1]}"
    return _without_layers(name)


def _without_layers(name: str) -> str:
    """Without PEFT's wrappers, of which the experts of a layer may have several."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
