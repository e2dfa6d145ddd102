"""LoRA layers as the plain linear layers that they stand for: W + s·B·A (arXiv 2106.09685, equation 3)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from video_r1.errors import ConfigError
from video_r1.models.four_bits import dense_weight, is_four_bit

logger = logging.getLogger(__name__)

ROUNDED_AT_ONCE = 1 << 24  # weights, with 14 bytes of working memory each


def beyond_lora(model: Any) -> str | None:
    """What a PEFT model's adapters have besides W + s·B·A of linear layers and experts, or None.

    Neither `merged_weight` nor a model that vLLM holds would have it.
    """
    for config in model.peft_config.values():
        if config.peft_type != "LORA":
            return f"peft_type {getattr(config.peft_type, 'value', config.peft_type)}"
        for name in ("use_dora", "lora_bias", "trainable_token_indices", "alora_invocation_tokens"):
            if getattr(config, name, None):
                return name
    embeddings = (name for name, each in model.named_modules() if getattr(each, "lora_embedding_A", None))
    return next((f"adapters of the embedding {name}" for name in embeddings), None)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight of a PEFT layer with its active adapters added, in the base weight's number format (see
    `rounded_sum`).

    The layer is left as it is. Weights in 4 bits are given in full, sharded ones (FSDP2) whole. A layer may
    also adapt a tensor of all experts: see `adapted_name`.
    """
    base = layer.get_base_layer()
    weight = dense_weight(base) if is_four_bit(base) else whole(getattr(base, adapted_name(layer)))
    if layer.merged or layer.disable_adapters:
        return weight
    changes = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return rounded_sum(weight, *changes) if changes else weight


def rounded_sum(weight: Tensor, *changes: Tensor) -> Tensor:
    """weight + changes, in the weight's number format; bfloat16 is rounded so that small changes are kept.

    A bfloat16 number has 8 significant bits, so that the nearest one to W + Δ is W again where |Δ| is below
    about |W| ÷ 512: nearly everywhere in the first hundred steps of a LoRA run. So it is rounded up with the
    probability that its cut-off bits stand for (stochastic rounding, arXiv 1502.02551, section 3), by random
    numbers that are the same at each call: the sum is right on average over the weights of a row.
    """
    total = torch.empty_like(weight)
    fixed = torch.Generator(weight.device).manual_seed(0)
    cut_off = 1 << 16  # bits of a float32 that bfloat16 does not have
    rows = max(1, ROUNDED_AT_ONCE // max(1, weight[0].numel()))
    for result, own, *added in zip(*(each.split(rows) for each in (total, weight, *changes)), strict=True):
        exact = own.to(torch.float32, copy=True)
        for change in added:
            exact += change.to(exact)
        if weight.dtype == torch.bfloat16:
            noise = torch.randint(
                cut_off, exact.shape, generator=fixed, device=exact.device, dtype=torch.int32
            )
            exact = noise.add_(exact.view(torch.int32)).bitwise_and_(-cut_off).view(torch.float32)
        result.copy_(exact)
    return total


@torch.no_grad()
def add_adapters(model: nn.Module) -> None:
    """Adds a PEFT model's adapters to its weights for good; the adapters stay beside them until `unload`.

    Raises ConfigError when a sum is not finite.
    """
    layers: dict[str, Any] = {
        n: each for n, each in model.named_modules() if hasattr(each, "get_delta_weight")
    }
    for name, layer in layers.items():
        weight = merged_weight(layer)
        if not torch.isfinite(weight).all():
            raise ConfigError(f"{name}: its adapters are broken, numbers in them are not finite")
        layer.get_base_layer().get_parameter(adapted_name(layer)).copy_(weight)


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
