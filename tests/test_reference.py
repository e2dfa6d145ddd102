"""The frozen reference model of the KL term."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from video_r1.training.reference import frozen_copy


@pytest.mark.parametrize("kind", ["ddp", "fsdp2, other"])
def test_the_copy_is_rounded_as_it_is_made(kind: str) -> None:
    """Under bf16 mixed precision. FSDP2 sends the first process's weights to the others."""
    model = tiny_model("qwen2_5_vl", tiny_tokenizer())
    accelerator: Any = SimpleNamespace(
        mixed_precision="bf16",
        is_fsdp2=kind != "ddp",
        is_main_process=kind != "fsdp2, other",
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=True)),
    )
    reference = frozen_copy(model, accelerator)
    kept = {name for name, weight in reference.named_parameters() if weight.dtype == torch.float32}
    assert ("model.language_model.embed_tokens.weight" in kept) == (kind == "ddp") == bool(kept)
    assert "model.language_model.layers.0.self_attn.q_proj.weight" not in kept
    for (name, own), copied in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert own.dtype == torch.float32 and not copied.requires_grad and own is not copied
        assert copied.is_meta == (kind == "fsdp2, other") and copied.shape == own.shape
        assert copied.is_meta or torch.equal(copied, own.to(copied.dtype)), name
    assert not any(buffer.is_meta for buffer in reference.buffers())
