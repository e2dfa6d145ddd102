"""A reference that follows the policy, and validation by several sampled answers."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tgrpo_trainers import make_trainer, policy_of
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForImageTextToText, TrainerCallback

from video_r1.errors import ConfigError
from video_r1.training.reference import frozen_copy, mix


def test_the_reference_is_mixed_as_in_trl() -> None:
    callbacks: Any = pytest.importorskip("trl.trainer.callbacks")
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs = copy.deepcopy(reference)
    callbacks.SyncRefModelCallback._sync_target_model(policy, theirs, 0.3)
    mix(reference, policy, 0.3)
    assert torch.equal(reference.weight, theirs.weight) or torch.allclose(reference.weight, theirs.weight)
    assert not torch.allclose(reference.weight, policy.weight, atol=1e-3)


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


def test_it_follows_the_policy_every_few_steps(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """After each second step; a checkpoint has it, and is a model like any other."""
    policies, references = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            policies.append(copy.deepcopy(policy_of(trainer).lm_head.weight.detach()))
            references.append(reference().lm_head.weight.detach().clone())

    def reference() -> Any:
        return trainer.reference.model  # type: ignore[union-attr]

    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, callbacks=[Watch()], sync_ref_model=True, max_steps=4,
        ref_model_sync_steps=2, ref_model_mixup_alpha=0.75, save_steps=2, learning_rate=0.01,
    )  # fmt: skip
    trainer.train()
    assert torch.equal(references[0], references[1]) and torch.equal(references[2], references[3])
    torch.testing.assert_close(references[2], 0.75 * policies[2] + 0.25 * references[0])
    assert not torch.allclose(references[2], references[0], atol=1e-4)
    saved = tmp_path / "checkpoint-2"
    assert [path.name for path in saved.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(saved).lm_head.weight, policies[2])
    assert (saved / "reference" / "model.safetensors").exists()
    assert not (tmp_path / "reference").exists()  # the run folder is a model alone


def test_one_that_follows_is_float32_in_mixed_precision(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    """In bf16 it would lose the small steps that it takes towards the policy."""
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, bf16=True, sync_ref_model=True)
    reference: Any = trainer.reference.model  # type: ignore[union-attr]
    assert {weight.dtype for weight in reference.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "sync_ref_model is true while beta is 0"),
        ({"peft": LoraConfig(r=2, target_modules=["q_proj"])}, "adapters are trained here"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha is 1.5; it must be above 0 and at most 1"),
    ],
)
def test_what_cannot_follow_is_refused(
    checkpoint: Path, manifest: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(checkpoint, str(manifest), tmp_path, **{"sync_ref_model": True, **changes})
