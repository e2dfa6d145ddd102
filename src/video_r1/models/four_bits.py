"""QLoRA's frozen weights (arXiv 2305.14314): 4 bits each, in bitsandbytes' layers.

    W ─► NF4 codes of 64 weights + their scale (itself in 8 bits) ─► W̃, one layer at a time, when it is used

Adapters learn beside W̃, not beside W. So a merged checkpoint is W̃ + s·B·A: `record_four_bits` writes down in
a checkpoint with adapters how W became W̃, and `recorded_four_bits` reads it back when they are merged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from video_r1.files import replace_json
from video_r1.packages import check_bitsandbytes

RECORD = "base_quantization.json"
IN_FULL = ("model.visual", "lm_head")
"""Modules whose linear layers keep their number format. The embeddings do too: they are no linear layers."""


def four_bits() -> Any:
    """NF4 with double quantisation for the linear layers of the text model alone. Products are bfloat16 on a
    GPU and float32 on a CPU, where bfloat16 is not faster.

    Raises ConfigError when bitsandbytes is not installed.
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
    """Stops bitsandbytes from rearranging a layer's codes when it is first used without gradients on a CPU.

    Where the CPU has AVX512-BF16, that is for inference only: layers so changed have no backward pass, round
    their scales, and refuse shapes that are no multiples of the block.
    """
    for layer in model.modules():
        if is_four_bit(layer):
            layer.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def is_four_bit(layer: nn.Module) -> bool:
    return type(getattr(layer, "weight", None)).__name__ == "Params4bit"


def dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight [out, in] in full: W̃ for one in 4 bits, detached."""
    weight: Any = layer.weight
    if not is_four_bit(layer):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit  # an extra of this package, and in use here

    return dequantize_4bit(weight.data, weight.quant_state)


def record_four_bits(model: Any, folder: Path) -> None:
    """Writes beside a model's adapters how its base was quantised; nothing for a model that was not."""
    config = model.config
    if getattr(config, "quantization_config", None) is not None:
        record = {"dtype": str(config.dtype).removeprefix("torch."), **config.quantization_config.to_dict()}
        replace_json(folder / RECORD, record)


def recorded_four_bits(folder: Path) -> tuple[str, Any] | None:
    """What `record_four_bits` wrote into the folder, if anything: the number format before, and how.

    Raises ConfigError when bitsandbytes is not installed.
    """
    if not (folder / RECORD).is_file():
        return None
    from transformers import BitsAndBytesConfig

    check_bitsandbytes(f"{folder}: its adapters belong to 4-bit weights: merging them")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return record.pop("dtype"), BitsAndBytesConfig.from_dict(record)
