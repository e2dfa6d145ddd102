"""The memory of weights in 4 bits and of optimizer states in 8, as bitsandbytes has them, for the plan of a
run on a machine that need not have bitsandbytes.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from video_r1.models.lora import IN_FULL

BLOCK = 64  # weights that share a scale, a byte
SCALES = 256  # scales that share a float32
STATES = 256  # optimizer states of 8 bits that share a float32
SMALLEST = 4096  # weights of a tensor whose states are in 8 bits; smaller ones have float32


class FourBitLinear(nn.Module):
    """A linear layer's codes and scales without their values; two weights are one element of `weight`."""

    def __init__(self, layer: nn.Linear, compute: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.compute = compute
        count = layer.weight.numel()
        self.weight = nn.Parameter(torch.empty(math.ceil(count / 2), dtype=torch.uint8), requires_grad=False)
        scales = math.ceil(count / BLOCK)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("coarse", torch.empty(math.ceil(scales / SCALES)))

    def forward(self, x: Tensor) -> Tensor:
        product = _Product.apply(x.to(self.compute), self.weight, self.out_features)
        assert product is not None
        return (product if self.bias is None else product + self.bias.to(self.compute)).to(x.dtype)


class _Product(torch.autograd.Function):
    """Makes the whole weight and its scales for a moment, in both directions; keeps codes, not the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, out_features: int) -> Tensor:
        ctx.shape = out_features, x.shape[-1]
        return x @ _whole(x, ctx.shape).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ _whole(grad, ctx.shape), None, None


def _whole(like: Tensor, shape: tuple[int, int]) -> Tensor:
    scales = like.new_empty(math.ceil(math.prod(shape) / BLOCK), dtype=torch.float32)
    weight = like.new_empty(shape)
    del scales
    return weight


def in_four_bits(model: nn.Module, compute: torch.dtype) -> None:
    """Puts stand-ins in place of the layers that `load_in_4bit` quantises, below their adapters too."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not any(part in name for part in (*IN_FULL, "lora_")):
            model.set_submodule(name, FourBitLinear(layer, compute))


def eight_bit_states(model: nn.Module) -> int:
    """Bytes of 8-bit AdamW's two moments; in float32 for small tensors and, by the Trainer, embeddings."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    total = 0
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        count = weight.numel()
        in_full = count < SMALLEST or any(weight is embedding for embedding in embeddings)
        total += 2 * (4 * count if in_full else count + 4 * math.ceil(count / STATES))
    return total
