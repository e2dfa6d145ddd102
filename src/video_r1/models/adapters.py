"""LoRA layers as the plain linear layers that they stand for: W + s·B·A (arXiv 2106.09685, equation 3)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from video_r1.models.four_bits import dense_weight, is_four_bit

logger = logging.getLogger(__name__)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight of a PEFT layer with its active adapters added, in the base weight's number format.

    The layer is left as it is. Weights in 4 bits are given in full, sharded ones (FSDP2) whole. A layer may
    also adapt a tensor of all experts: see `adapted_name`.
    """
    base = layer.get_base_layer()
    weight = dense_weight(base) if is_four_bit(base) else whole(getattr(base, adapted_name(layer)))
    if layer.merged or layer.disable_adapters:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).to(weight)
    return weight


def adapted_name(layer: Any) -> str:
    """Which parameter of its module a PEFT layer adapts: the weight, or the one of `target_parameters`."""
    return getattr(layer, "parameter_name", "weight")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor (FSDP2) gathered from all processes; others as they are. Detached."""
    gathered: Any = getattr(tensor, "full_tensor", None)
    return (tensor if gathered is None else gathered()).detach()


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Within it, the model's LoRA layers are plain linear layers with the adapters added to copies of their
    weights, so that decoding launches as many kernels as without adapters.

    For forwards under `torch.no_grad` with weights that do not change. Layers whose base is in 4 bits stay as
    they are, and so do all where a GPU has no memory for the copies.
    """
    layers = adapted_linears(model)
    if layers and not has_memory_for([layer.base_layer.weight for layer in layers.values()]):
        logger.info("sampling with adapters beside their weights: there is no memory for merged copies")
        layers = {}
    for name, layer in layers.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
        plain.bias = layer.base_layer.bias
        model.set_submodule(name, plain)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def adapted_linears(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers over plain linear layers, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and type(layer.base_layer) is nn.Linear
    }


def has_memory_for(weights: list[Tensor]) -> bool:
    """Whether a GPU has twice the memory of copies of these weights; elsewhere True."""
    device = weights[0].device
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused > 2 * sum(weight.nbytes for weight in weights)
