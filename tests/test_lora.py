"""LoRA: what is adapted in each family, continuing, merging. The same with 4-bit weights: test_qlora.py."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from resume_runs import any_format, comparable, write_recipe
from safetensors.torch import load_file, save_file
from tgrpo_trainers import make_trainer, policy_of, weights
from tiny_models import FAMILY_ROWS, tiny_checkpoint

from video_r1.cli import main
from video_r1.errors import ConfigError
from video_r1.models import lora
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import add_lora, load_model, load_processor, merge_adapter
from video_r1.models.lora import rounded_sum
from video_r1.rewards import scoring
from video_r1.training.trainer import QuestionTrainer


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_adapted_layers(family: str, tmp_path: Path) -> None:
    """All linear layers of the text model, and of the vision tower where it is asked for; never the head."""
    folder = tiny_checkpoint(family, tmp_path)
    for vision in (False, True):
        model = load_model(folder)
        linear = {
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and (vision or ".visual." not in name)
            and name != "lm_head"
            and not name.endswith("shared_expert_gate")  # one number a token
        }
        adapted = add_lora(model, rank=2, alpha=4, vision_tower=vision)
        found = {
            name.removeprefix("base_model.model.")
            for name, module in adapted.named_modules()
            if hasattr(module, "lora_A")
        }
        assert found == linear
        trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
        assert len(trained) == 2 * len(linear) and all("lora_" in name for name in trained)


def run(recipe: Path, folder: Path, *options: str) -> int:
    return main(["rl", str(recipe), "--output_dir", str(folder), *options])


@pytest.mark.slow
def test_run_is_continued_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA run that is continued equals an uninterrupted one bit for bit, with dropout and a reference; its
    merged checkpoint computes what the adapted model computes.
    """
    monkeypatch.setattr(scoring, "format_scores", any_format)
    recipe = write_recipe(
        tmp_path, use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.1, lora_vision_tower=True,
        max_steps=4, learning_rate=0.01,
    )  # fmt: skip
    whole, parted, merged = (tmp_path / name for name in ("whole", "parted", "merged"))
    assert run(recipe, whole) == 0
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoint-4")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (parted / name).unlink()
    assert run(recipe, parted) == 0
    assert comparable(parted) == comparable(whole)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (whole, parted)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert any("visual" in name for name in adapters[0])
    assert comparable(whole)[-1]["policy/kl"] > 1e-6  # to the model without adapters

    assert main(["merge", str(whole), str(merged)]) == 0
    adapted: Any = peft.PeftModel.from_pretrained(load_model(tmp_path / "model"), str(whole))
    plain = load_model(merged)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
    assert load_processor(merged).chat_template
    with pytest.raises(ConfigError, match=r"these are adapters.*video-r1 merge"):
        load_model(whole)
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        merge_adapter(merged, tmp_path / "again")
    with pytest.raises(ConfigError, match="there is no such folder"):
        merge_adapter(tmp_path / "nothing", tmp_path / "again")


@pytest.mark.parametrize("size", [3e-5, 1e-3])
def test_small_changes_of_bfloat16_weights_are_kept(size: float) -> None:
    """The part of Δ that the sum has, as its projection on Δ. Rounding to the nearest number keeps less than
    a third of a small one, so that a run's first steps would sample from the model without adapters.
    """
    torch.manual_seed(0)
    weight = (0.03 * torch.randn(512, 1024)).bfloat16()
    change = 2 * size * torch.randn(512, 64) @ (torch.rand(64, 1024) - 0.5) / 8

    def kept(merged: torch.Tensor) -> float:
        return float(((merged.float() - weight.float()) * change).sum() / change.square().sum())

    merged = rounded_sum(weight, change)
    assert merged.dtype == torch.bfloat16 and abs(kept(merged) - 1) < 0.03
    assert size > 1e-4 or kept((weight.float() + change).bfloat16()) < 0.33
    assert torch.equal(merged, rounded_sum(weight, change))  # a continued run samples the same
    exact = weight.float() + change
    assert ((merged.float() - exact).abs() <= 2.0 ** (exact.abs().log2().floor() - 7)).all()


def test_large_weights_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, change = torch.randn(6, 5, 4).bfloat16(), 1e-3 * torch.randn(6, 5, 4)
    at_once = rounded_sum(weight, change, change)
    assert not torch.equal(at_once, weight)
    monkeypatch.setattr(lora, "ROUNDED_AT_ONCE", 50)  # two rows, which makes three parts
    assert torch.equal(rounded_sum(weight, change, change), at_once)


BEYOND: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "adapters of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("what", BEYOND)
def test_adapters_that_are_more_than_lora_are_not_trained(checkpoint: Path, what: str) -> None:
    """Their completions would be sampled from another policy than the one that learns."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **BEYOND[what]})
    with pytest.raises(ConfigError, match=f"{what}.*rollouts support only LoRA"):
        add_lora(load_model(checkpoint), config=config)


def test_such_adapters_are_merged_whole(checkpoint: Path, tmp_path: Path) -> None:
    """Of a run elsewhere."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
    model: Any = peft.get_peft_model(load_model(checkpoint), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in filter(lambda each: each.requires_grad, model.parameters()):
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapters")
    load_processor(checkpoint).save_pretrained(tmp_path / "adapters")
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected, before = model.eval()(tokens).logits, load_model(checkpoint)(tokens).logits
        found = load_model(merge_adapter(tmp_path / "adapters", tmp_path / "merged"))(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.01


def test_broken_adapters_are_not_merged(checkpoint: Path, tmp_path: Path) -> None:
    model = with_trained_adapters(checkpoint)
    next(each for name, each in model.named_parameters() if "lora_B" in name).data.fill_(torch.inf)
    model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(ConfigError, match="they contain non-finite numbers"):
        merge_adapter(tmp_path / "adapters", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["names", "some names", "one more", "sizes", "base"])
def test_cases_adapters_that_do_not_fit(checkpoint: Path, tmp_path: Path, change: str) -> None:
    """They are merged into nothing, or not whole: refused. A moved base is named on the command line."""
    folder, out = tmp_path / "adapters", tmp_path / "merged"
    with_trained_adapters(checkpoint).save_pretrained(folder)
    load_processor(checkpoint).save_pretrained(folder)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    if change == "base":
        config.write_text(config.read_text().replace(str(checkpoint), "/elsewhere/base"))
        with pytest.raises(ConfigError, match=r"adapter_config.json.*--base_model"):
            merge_adapter(folder, out)
        assert main(["merge", str(folder), str(out), "--base_model", str(checkpoint)]) == 0
        return
    first = next(iter(tensors))
    for name in list(tensors) if change == "names" else [first]:
        tensor = tensors.pop(name) if "names" in change else tensors[name]
        wrong = name if change == "sizes" else name.replace("layers", "blocks")
        tensors[wrong] = torch.zeros(3, 7) if change == "sizes" else tensor.clone()
    save_file(tensors, file)
    with pytest.raises(ConfigError, match="its adapters do not fit"):
        merge_adapter(folder, out)
    assert not out.exists()
    resuming: Any = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False)
    with pytest.raises(ConfigError, match="its adapters do not fit this model"):
        QuestionTrainer.restore_weights(resuming, str(folder), with_trained_adapters(checkpoint))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.lora_A.weight", "scores.weight"])
def test_cases_weights_that_a_model_does_not_know(
    checkpoint: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapters in a checkpoint's own file would be dropped: refused. Other weights are named in a line."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    save_file(load_file(folder / "model.safetensors") | {name: torch.ones(2)}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    refusal = pytest.raises(ConfigError, match=r"these are adapters beside a model.*video-r1 merge")
    with refusal if "lora" in name else nullcontext():
        load_model(folder)
    assert "lora" in name or "1 weights are not part of the model, e.g. scores.weight" in caplog.text


def with_trained_adapters(checkpoint: Path) -> Any:
    model = add_lora(load_model(checkpoint), rank=4, alpha=8, dropout=0.2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.slow
def test_the_reference_has_the_adapters_that_training_starts_from(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    """Adapters that have learnt before are part of it, without dropout, also when the run is continued; the
    policy's own come back.
    """
    start = with_trained_adapters(checkpoint).eval()
    settings = {"learning_rate": 0.02, "beta": 0.04, "max_steps": 4, "save_steps": 2}
    trainer = make_trainer(with_trained_adapters(checkpoint), str(manifest), tmp_path / "whole", **settings)
    trainer.train()
    assert trainer.reference is not None
    policy: Any = policy_of(trainer).train()
    (batch,) = trainer.step.batches
    completions = [[rollout.token_ids for rollout in group.ordered] for group in batch.trained]
    with torch.no_grad(), start.disable_adapter():
        base = group_logprobs(start, [group.prompt for group in batch.trained], completions).logprobs
    with torch.no_grad():
        expected = group_logprobs(start, [group.prompt for group in batch.trained], completions).logprobs
    before = weights(trainer)
    with trainer.reference.in_place_of(policy, trainer.accelerator) as reference:
        found = trainer.logprobs(reference, batch).logprobs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((base - expected).abs().mean()) > 0.1
    after = weights(trainer)
    assert policy.training and all(torch.equal(after[name], value) for name, value in before.items())
    adapters = sum(weight.nbytes for weight in policy.parameters() if weight.requires_grad)
    copies = trainer.reference.adapters.values()
    assert sum(weight.nbytes for module in copies for weight in module.parameters()) == adapters

    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    parted = make_trainer(with_trained_adapters(checkpoint), str(manifest), tmp_path / "parted", **settings)
    parted.train(resume_from_checkpoint=str(tmp_path / "parted" / "checkpoint-2"))
    assert comparable(tmp_path / "parted") == comparable(tmp_path / "whole")
