"""A second device for torch on a machine that has none, called "second".

Its tensors lie in the host's memory and its operators are the CPU's, but an operator refuses tensors of two
devices, as a GPU does. What gives the CPU's results on it has moved everything to where it should be.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils import backend_registration, cpp_extension

from video_r1.models import attention

NAME = "second"


def register(build: Path) -> torch.device:
    """Compiles the device into `build` (about 20 seconds, the first time) and makes it known to torch."""
    cpp_extension.load(
        "video_r1_second_device",
        [str(Path(__file__).parent / "device.cpp")],
        extra_cflags=["-O1"],
        build_directory=str(build),
    )
    backend_registration.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    backend_registration.generate_methods_for_privateuse1_backend()
    attention.flex_attention_forward = _flex_attention_forward
    return torch.device(NAME, 0)


def _module() -> types.ModuleType:
    """What torch, accelerate and transformers ask of torch.<device>."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "set_device": None, "synchronize": None, "empty_cache": None, "manual_seed": None,
        "manual_seed_all": None, "_is_in_bad_fork": False, "is_bf16_supported": True,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(module, name, lambda *args, _answer=answer, **kwargs: _answer)
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_rng_state_all = lambda: [torch.get_rng_state()]
    module.set_rng_state_all = lambda states: torch.set_rng_state(states[0])
    return module


def _flex_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """FlexAttention knows the devices that it supports by name: here its mask function, written out."""
    seen = create_mask(mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device=str(query.device))
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2), None
