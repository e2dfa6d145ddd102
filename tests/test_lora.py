"""LoRA: what is adapted in each family, continuing, merging. The same with 4-bit weights: test_qlora.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from resume_runs import any_format, comparable, write_recipe
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_checkpoint

from video_r1.cli import main
from video_r1.errors import ConfigError
from video_r1.models.loading import add_lora, load_model, load_processor, merge_adapter
from video_r1.rewards import group


@pytest.mark.parametrize("family", FAMILIES)
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
        }
        adapted = add_lora(model, rank=2, alpha=4, vision_tower=vision)
        found = {
            name.removeprefix("base_model.model.")
            for name, module in adapted.named_modules()
            if hasattr(module, "lora_A")
        }
        assert found == linear


def run(recipe: Path, folder: Path, *options: str) -> int:
    return main(["rl", str(recipe), "--output_dir", str(folder), *options])


def test_run_is_continued_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA run that is continued equals an uninterrupted one bit for bit, with dropout and a reference; its
    merged checkpoint computes what the adapted model computes.
    """
    monkeypatch.setattr(group, "format_scores", any_format)
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


def test_contradictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert run(recipe, tmp_path / "run", "--load_in_4bit") == 2
    assert "load_in_4bit (option --load_in_4bit) is true while use_peft is false" in capsys.readouterr().err
