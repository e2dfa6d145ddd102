"""QLoRA and 8-bit AdamW on the CPU, with bitsandbytes' own kernels: training, continuing, merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from resume_runs import any_format, comparable, write_recipe
from tgrpo_trainers import make_trainer, weights
from tiny_models import FAMILY_ROWS, tiny_checkpoint, tiny_processor
from torch import Tensor

from video_r1 import availability
from video_r1.cli import main
from video_r1.errors import ConfigError
from video_r1.models.loading import add_lora, load_model
from video_r1.models.lora import is_four_bit, record_four_bits
from video_r1.rewards import scoring
from video_r1.rollout.vllm import engine as vllm_engine
from video_r1.rollout.vllm.weight_sync import checkpoint_weights

bitsandbytes = pytest.importorskip("bitsandbytes")
IDS = torch.arange(40)[None]
QLORA: dict[str, Any] = {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "lora_alpha": 8}


def adapted(checkpoint: Path, seed: int = 0, **options: Any) -> Any:
    """A model in 4 bits with adapters that add something."""
    model = add_lora(load_model(checkpoint, load_in_4bit=True), rank=4, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def bits(tensor: Tensor) -> Tensor:
    """Codes are stored as bfloat16, where some mean no number, which never equals itself."""
    return tensor.reshape(-1).view(torch.uint8)


def changed_weights(before: dict[str, Tensor], trainer: Any) -> set[str]:
    after = weights(trainer)
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(bits(after[name]), bits(before[name]))}


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


# ---- The model


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_the_text_layers_are_in_four_bits(family: str, tmp_path: Path) -> None:
    """All linear layers of the text model and no others; every other weight as the file has it."""
    folder = tiny_checkpoint(family, tmp_path)
    model, plain = load_model(folder, load_in_4bit=True), load_model(folder)
    expected = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and ".visual." not in name and name != "lm_head"
    }
    assert {name for name, module in model.named_modules() if is_four_bit(module)} == expected
    small = add_lora(model, rank=4)
    assert all("lora_" in name for name, weight in small.named_parameters() if weight.requires_grad)
    others = {
        name: weight
        for name, weight in model.named_parameters()
        if "lora_" not in name and type(weight).__name__ != "Params4bit"
    }
    assert all(
        torch.equal(weight, plain.get_parameter(name.replace(".base_layer", "")))
        for name, weight in others.items()
    )


def test_gradients_are_those_of_the_numbers_that_four_bits_stand_for(checkpoint: Path) -> None:
    """Against the same model with its layers' W̃ in float32; also after it has been used without gradients,
    for which bitsandbytes would rearrange the codes on some CPUs.
    """
    model = adapted(checkpoint)
    reference = peft.get_peft_model(
        load_model(checkpoint, load_in_4bit=True).dequantize(), model.peft_config["default"]
    )
    peft.set_peft_model_state_dict(reference, peft.get_peft_model_state_dict(model))
    before = gradients(model.train())
    expected = gradients(reference.train())
    assert before.keys() == expected.keys() and all("lora_" in name for name in before)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    after = gradients(model.train())
    for name, gradient in expected.items():
        torch.testing.assert_close(before[name], gradient, rtol=1e-4, atol=1e-5)
        assert torch.equal(after[name], before[name])
    assert max(float(gradient.abs().max()) for gradient in before.values()) > 0.1


# ---- Training


@pytest.mark.slow
def test_a_merged_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a plain checkpoint that computes what the 4-bit model computes with its adapters, and what vLLM
    would be given.
    """
    monkeypatch.setattr(scoring, "format_scores", any_format)
    recipe = write_recipe(tmp_path, **QLORA, lora_dropout=0.1, max_steps=2, learning_rate=0.01)
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    assert main(["rl", str(recipe), "--output_dir", str(whole)]) == 0
    assert main(["merge", str(whole), str(merged)]) == 0
    base = load_model(tmp_path / "model", load_in_4bit=True)
    small: Any = peft.PeftModel.from_pretrained(base, str(whole))
    plain = load_model(merged)
    assert plain.dtype == torch.float32 and not hasattr(plain.config, "quantization_config")
    assert not any(is_four_bit(module) for module in plain.modules())
    dense = peft.PeftModel.from_pretrained(
        load_model(tmp_path / "model", load_in_4bit=True).dequantize(), str(whole)
    )
    with torch.no_grad():
        logits = plain(IDS).logits
        torch.testing.assert_close(logits, small(IDS).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=0, atol=1e-4)
        before = load_model(tmp_path / "model", load_in_4bit=True)(IDS).logits
        assert (logits - before).abs().max() > 0.1
    same_weights(dict(checkpoint_weights(small)), plain)


def same_weights(handed_over: dict[str, Tensor], plain: Any) -> None:
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(handed_over.pop(name), value, rtol=0, atol=1e-6)
    assert set(handed_over) <= {"lm_head.weight"}


def test_a_package_that_is_missing_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(checkpoint).save_pretrained(tmp_path / "adapters")
    record_four_bits(load_model(checkpoint, load_in_4bit=True), tmp_path / "adapters")
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^load_in_4bit needs .* pip install 'video-r1\[qlora\]'$"):
        load_model(checkpoint, load_in_4bit=True)
    assert main(["merge", str(tmp_path / "adapters"), str(tmp_path / "out")]) == 2
    assert "merging them needs the package bitsandbytes: pip install" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="optim: paged_adamw_8bit needs"):
        make_trainer(checkpoint, [], tmp_path, optim="paged_adamw_8bit")


def test_vllm_is_given_layers_without_adapters_in_full(checkpoint: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = peft.get_peft_model(load_model(checkpoint, load_in_4bit=True), config)
    same_weights(dict(checkpoint_weights(model)), load_model(checkpoint, load_in_4bit=True).dequantize())


def test_vllm_is_told_of_no_four_bits(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the weights that they stand for."""
    told: list[dict[str, Any]] = []
    llm = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512, dtype=torch.float32))

    def started(arguments: dict[str, Any]) -> Any:
        told.append(json.loads(Path(arguments["model"], "config.json").read_text()))
        return llm

    monkeypatch.setattr(vllm_engine, "_start", started)
    vllm_engine.VLLMEngine(adapted(checkpoint), tiny_processor("qwen2_5_vl"), max_model_len=512)
    assert "quantization_config" not in told[0]


# ---- 8-bit AdamW


@pytest.mark.slow
def test_eight_bit_adamw_trains_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, its states in 8 bits included."""
    monkeypatch.setattr(scoring, "format_scores", any_format)
    recipe = write_recipe(tmp_path, optim="adamw_8bit", max_steps=4, learning_rate=1e-3)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert main(["rl", str(recipe), "--output_dir", str(whole)]) == 0
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoint-4")
    (parted / "config.json").unlink()
    assert main(["rl", str(recipe), "--output_dir", str(parted)]) == 0
    assert comparable(parted) == comparable(whole)
    assert comparable(whole)[-1]["policy/kl"] > 1e-4
    for name in ("model.safetensors", "checkpoint-4/optimizer.pt"):
        assert (parted / name).read_bytes() == (whole / name).read_bytes(), name
    states = torch.load(whole / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    kept = [state for part in states.values() for state in part["__bnb_optimizer_quant_state__"].values()]
    assert any(tensor.dtype == torch.uint8 and tensor.numel() > 4096 for tensor in kept)
