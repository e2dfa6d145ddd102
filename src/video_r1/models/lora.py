"""LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314).

Adapters as the plain linear layers W + s·B·A that they stand for; frozen weights in 4 bits:

    W ─► NF4 codes of 64 weights + their scale (itself in 8 bits) ─► W̃, one layer at a time, when it is used

QLoRA's adapters are trained beside W̃, not beside W, so a merged checkpoint is W̃ + s·B·A. `record_four_bits`
writes how W became W̃ into a checkpoint with adapters; `recorded_four_bits` reads it when they are merged.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from video_r1.availability import check_bitsandbytes
from video_r1.errors import ConfigError
from video_r1.files import replace_json

logger = logging.getLogger(__name__)

ROUNDED_AT_ONCE = 1 << 24  # weights; each needs 14 bytes of working memory
RECORD = "base_quantization.json"
IN_FULL = ("model.visual", "lm_head")
"""Modules whose linear layers keep their number format, like the embeddings."""


def import_peft() -> Any:
    """Return the package peft. Raises ConfigError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs the package peft: pip install 'video-r1[lora]'") from error
    return peft


def load_adapters(model: Any, folder: str | Path, base: object = "this model") -> None:
    """Load the adapters in a folder into a PEFT model. base: names its base model in the error.

    Raises ConfigError unless names and shapes in the folder are those of the model's adapters: peft keeps the
    initial values, which change nothing, of what it does not find.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing weights, which are an error here
            found = model.load_adapter(str(folder), "default", is_trainable=True)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder}: its adapters do not fit {base}: {reason}") from error
    missing = [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    if wrong := sorted([*missing, *found.unexpected_keys]):
        raise ConfigError(
            f"{folder}: its adapters do not fit {base}: {len(missing)} weights are missing and "
            f"{len(found.unexpected_keys)} have names that the model does not know, e.g. {wrong[0]}"
        )


def beyond_lora(model: Any) -> str | None:
    """Return what a PEFT model's adapters have besides W + s·B·A, which sampling would ignore, or None."""
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
    """Return a PEFT layer's weight plus active adapters, in the base weight's format (`rounded_sum`).

    Weights in 4 bits are dequantised, sharded ones (FSDP2) gathered.
    """
    base = layer.get_base_layer()
    weight = dense_weight(base) if is_four_bit(base) else whole(getattr(base, adapted_name(layer)))
    if layer.merged or layer.disable_adapters:
        return weight
    changes = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return rounded_sum(weight, *changes) if changes else weight


def rounded_sum(weight: Tensor, *changes: Tensor) -> Tensor:
    """Return weight + changes in the weight's number format; small changes survive in bfloat16.

    The bfloat16 number nearest to W + Δ is W again if |Δ| is below about |W| ÷ 512: nearly everywhere in the
    first hundred steps of a LoRA run. So the sum is rounded up with the probability that its cut-off bits
    stand for (stochastic rounding, arXiv 1502.02551, section 3), with the same random numbers at each call.
    """
    total = torch.empty_like(weight)
    fixed = torch.Generator(weight.device).manual_seed(0)
    cut_off = 1 << 16  # range of the float32 bits that bfloat16 lacks
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
    """Add a PEFT model's adapters to its weights. Raises ConfigError if a sum is not finite."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "get_delta_weight"):
            weight = merged_weight(layer)
            if not torch.isfinite(weight).all():
                raise ConfigError(f"{name}: its adapters are broken: they contain non-finite numbers")
            base = cast(nn.Module, cast(Any, layer).get_base_layer())
            base.get_parameter(adapted_name(layer)).copy_(weight)


def adapted_name(layer: Any) -> str:
    """Return the parameter that a PEFT layer adapts: the weight, or the one of `target_parameters`."""
    return getattr(layer, "parameter_name", "weight")


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor detached, and gathered from all ranks if it is sharded (FSDP2)."""
    gathered: Any = getattr(tensor, "full_tensor", None)
    return (tensor if gathered is None else gathered()).detach()


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Replace the model's LoRA layers by plain linear layers with merged copies of their weights.

    Decoding then launches as many kernels as without adapters. Layers with a 4-bit base are not replaced; on
    a GPU without memory none are.
    """
    layers = adapted_linears(model)
    if layers and not has_memory_for([layer.base_layer.weight for layer in layers.values()]):
        logger.info("sampling with separate adapters: there is no memory for merged copies of the weights")
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
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and type(layer.base_layer) is nn.Linear
    }


def has_memory_for(weights: list[Tensor]) -> bool:
    """Return whether a GPU has twice the memory of copies of these weights; True on other devices."""
    device = weights[0].device
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused > 2 * sum(weight.nbytes for weight in weights)


def four_bits() -> Any:
    """Return the config of NF4 with double quantisation for the text model's linear layers.

    Products are bfloat16 on a GPU and float32 on a CPU, where bfloat16 is not faster. Raises ConfigError when
    bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    check_bitsandbytes("load_in_4bit")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        bnb_4bit_quant_storage=torch.bfloat16,  # so that FSDP can share them out
        llm_int8_skip_modules=list(IN_FULL),
    )


def keep_codes_as_they_are(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging a layer's codes at its first use without gradients on a CPU.

    With AVX512-BF16 it does so, for inference only: such layers have no backward pass, round their scales and
    reject shapes that are not multiples of the block.
    """
    for layer in model.modules():
        if is_four_bit(layer):
            layer.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def is_four_bit(layer: nn.Module) -> bool:
    return type(getattr(layer, "weight", None)).__name__ == "Params4bit"


def dense_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight [out, in], detached; W̃ for a layer in 4 bits."""
    weight: Any = layer.weight
    if not is_four_bit(layer):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit  # an extra; installed, as it is in use

    return dequantize_4bit(weight.data, weight.quant_state)


def record_four_bits(model: Any, folder: Path) -> None:
    """Write to a folder of adapters how their base was quantised, if it was."""
    config = model.config
    if getattr(config, "quantization_config", None) is not None:
        record = {"dtype": str(config.dtype).removeprefix("torch."), **config.quantization_config.to_dict()}
        replace_json(folder / RECORD, record)


def recorded_four_bits(folder: Path) -> tuple[str, Any] | None:
    """Return the number format and config that `record_four_bits` wrote, or None. Raises ConfigError."""
    if not (folder / RECORD).is_file():
        return None
    from transformers import BitsAndBytesConfig

    check_bitsandbytes(f"{folder}: its adapters belong to 4-bit weights: merging them")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record.pop("dtype"), BitsAndBytesConfig.from_dict(record)
