"""Linear layers on a CPU through oneDNN, without gradients.

torch multiplies float32 matrices on a CPU through MKL, which rearranges the weight at every call. Decoding
multiplies a few rows by all weights at every token and spends most of its time on that. oneDNN takes weights
that are arranged once. `python -m benchmarks.rollout` measures the gain.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from video_r1.models.checked import Checked
from video_r1.models.families import text_of, tower_of

LEAST_PRODUCTS = 2**20  # multiplications; a call of oneDNN costs 10 µs more, too much for smaller products
MOST_ARRANGED_BYTES = 2**30  # arranged weights are copies; a larger model's weights are not copied


@contextmanager
def onednn_linears(model: Any, rows: int) -> Iterator[None]:
    """Let float32 linear layers and the patch embedding of a Qwen-VL model on a CPU use oneDNN.

    rows: completions decoded at once; small layers are not changed. For forwards under `torch.no_grad`, with
    weights that do not change. Results differ from torch's in the last bits. Does nothing on other devices,
    under autocast and if torch has no oneDNN; layers that have another forward (adapters, quantised, hooked)
    or sharded weights are not changed.
    """
    decoding: list[Any] = []
    once: list[Any] = []
    available = torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")
    if available:
        kernels(torch.ones(2, 16), torch.linspace(-1, 1, 128).view(8, 16))
    if available and kernels.agrees:
        text = [*text_of(model).modules(), model.get_output_embeddings()]
        plain = [layer for layer in text if _plain(layer)]
        decoding = [layer for layer in plain if rows * layer.weight.numel() >= LEAST_PRODUCTS]
        tower = tower_of(model).modules() if decoding else ()
        once = [layer for layer in tower if _plain(layer)]
    copied = sum(layer.weight.nbytes for layer in decoding) <= MOST_ARRANGED_BYTES
    for layer in decoding:
        weight = layer.weight.detach()
        arranged = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if copied else weight
        layer.forward = partial(_linear, weight, arranged, layer.bias)
    patches = [layer for layer in once if isinstance(layer, nn.Conv3d)]
    for layer in once:
        weight = layer.weight.detach().flatten(1)
        function = _patches if layer in patches else _linear
        layer.forward = partial(function, weight, weight, layer.bias)
    try:
        yield
    finally:
        for layer in decoding + once:
            del layer.forward


def _plain(module: Any) -> bool:
    """Return whether it is a float32 linear layer on the CPU, or the tower's patch convolution."""
    if type(module) not in (nn.Linear, nn.Conv3d) or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight.data) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32


def _arranged_product(inputs: Tensor, weight: Tensor) -> Tensor:
    arranged = torch.ops.mkldnn._reorder_linear_weight(weight, len(inputs))
    return torch.ops.mkldnn._linear_pointwise.default(inputs, arranged, None, "none", [], None)


kernels = Checked("linear layers through oneDNN", _arranged_product, functional.linear)


def _linear(weight: Tensor, arranged: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """Multiply inputs [..., K] by the weight [N, K]: [..., N]."""
    if inputs.numel() * len(weight) < LEAST_PRODUCTS:
        return functional.linear(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(inputs, arranged, bias, "none", [], None)


def _patches(weight: Tensor, arranged: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """Convolve patches [patches, C, T, H, W] by weight [N, C*T*H*W] -> [patches, N, 1, 1, 1]."""
    return _linear(weight, arranged, bias, inputs.flatten(1))[..., None, None, None]
