"""Loading checkpoints: what comes back, and one named error for each way in which a folder can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from general_models import general_model, general_processor
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, FAMILY_ROWS, moving_square, tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from video_r1.cli import main
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import PromptBuilder
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.models.loading import (
    freeze_vision,
    keep_angles_exact,
    load_model,
    load_processor,
    size_multiple,
)
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.general import GeneralEngine
from video_r1.rollout.transformers import TransformersEngine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_loads_each_family(checkpoints: dict[str, Path], family: str) -> None:
    model = load_model(checkpoints[family], dtype="bfloat16")
    assert model.config.model_type == family
    assert model.dtype == torch.bfloat16 and not model.training
    assert size_multiple(load_processor(checkpoints[family])) == (28 if family.startswith("qwen2") else 32)


def test_experts_are_saved_as_published(tmp_path: Path) -> None:
    """vLLM reads those of Qwen3-VL-MoE as [experts, in, out], and transformers either way."""
    made = load_model(tiny_checkpoint("qwen3_vl_moe", tmp_path / "made", for_vllm=True))
    made.save_pretrained(tmp_path / "saved")
    saved, own = load_file(tmp_path / "saved" / "model.safetensors"), made.state_dict()
    turned = [name for name in own if ".experts." in name]
    assert len(turned) == 2 * 3
    for name, weight in own.items():
        assert torch.equal(saved[name], weight.transpose(1, 2) if name in turned else weight), name
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in own.items())


def copy_without(folder: Path, target: Path, *patterns: str) -> Path:
    shutil.copytree(folder, target)
    for pattern in patterns:
        for file in target.glob(pattern):
            file.unlink()
    return target


def text_model(folder: Path, target: Path) -> Path:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)).save_pretrained(target)
    return target


def truncated_weights(folder: Path, target: Path) -> Path:
    copy_without(folder, target)
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return target


def lost_weight(folder: Path, target: Path) -> Path:
    copy_without(folder, target)
    weights = load_file(target / "model.safetensors")
    del weights[next(name for name in weights if "q_proj.weight" in name)]
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def a_file(folder: Path, target: Path) -> Path:
    target.write_text("{}")
    return target


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, target: target, "no such folder"),
        (a_file, "this is a file"),
        (lambda folder, target: copy_without(folder, target, "config.json"), "no config.json"),
        (text_model, "'gpt2' is not a video-language model"),
        (lambda folder, target: copy_without(folder, target, "*.safetensors"), "no file .*safetensors"),
        (truncated_weights, "cannot be loaded"),
        (lost_weight, r"1 weights are missing, e.g. .*q_proj"),
    ],
)
def test_names_what_is_wrong(
    checkpoints: dict[str, Path], tmp_path: Path, make: Callable[[Path, Path], Path], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(make(checkpoints["qwen2_5_vl"], tmp_path / "model"))


def test_unknown_dtype(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="dtype 'half_float' is unknown"):
        load_model(checkpoints["qwen2_5_vl"], dtype="half_float")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("*.jinja", "no chat template"), ("*processor_config.json", "the processor (cannot be loaded|has no)")],
)
def test_incomplete_processor(
    checkpoints: dict[str, Path], tmp_path: Path, pattern: str, message: str
) -> None:
    folder = copy_without(checkpoints["qwen2_5_vl"], tmp_path / "model", pattern)
    with pytest.raises(ConfigError, match=message):
        load_processor(folder)


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_a_frozen_tower(checkpoints: dict[str, Path], family: str) -> None:
    model = load_model(checkpoints[family])
    frozen = freeze_vision(model)
    assert frozen == sum(p.numel() for n, p in model.named_parameters() if ".visual." in n) > 0
    assert all(p.requires_grad == (".visual." not in n) for n, p in model.named_parameters())


def test_rotary_frequencies_are_computed_again() -> None:
    """ZeRO-3 leaves them rounded to the weights' number format."""
    model: Any = tiny_model("qwen2_5_vl", tiny_tokenizer())
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert exact
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if "inv_freq" in name:
                setattr(module, name, buffer.bfloat16())
    keep_angles_exact(model)
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in exact.items())


def spoiled(folder: Path, target: Path, value: float = float("nan")) -> str:
    """Copy a checkpoint whose first query projection of the text model is not finite."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name and "vision" not in name)
    save_file(tensors | {name: tensors[name] * value}, target / "model.safetensors", {"format": "pt"})
    return str(target)


@pytest.mark.parametrize("command", ["ask", "eval", "audit", "annotate", "sft", "rl", "teacher", "general"])
def test_cases_weights_that_are_not_finite(
    command: str, checkpoint: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that loads a model says so before it works, also of a model of the general path."""
    good, value = checkpoint, float("inf") if command == "rl" else float("nan")
    if command == "general":
        processor = general_processor("smolvlm")
        for part in (general_model("smolvlm", processor), processor):
            part.save_pretrained(tmp_path / "good")
        good = tmp_path / "good"
    bad, out = spoiled(good, tmp_path / "bad", value), str(tmp_path / "out")
    trains = ["--train_manifest", str(manifest), "--output_dir", out, "--max_steps", "1"]
    asks = ["ask", bad, str(manifest.parent / "0.mp4"), "What?"]
    words = {
        "ask": asks,
        "general": asks,
        "eval": ["eval", bad, str(manifest), "--out", out],
        "audit": ["data", "audit", str(manifest), "--model", bad, "--out", f"{out}.json"],
        "annotate": ["annotate", str(manifest), "--teacher", bad, "--out", f"{out}.json"],
        "sft": ["sft", "--model_name_or_path", bad, *trains, "--target", "answer"],
        "rl": ["rl", "--model_name_or_path", bad, *trains],
        "teacher": ["rl", "--model_name_or_path", str(good), *trains, "--teacher_model_name_or_path", bad],
    }
    assert main(words[command]) == 2
    said = capsys.readouterr().err
    assert f"{bad}: the weights " in said and "hold NaN or infinity (torch.float32)" in said


def test_cases_probabilities_that_are_not_numbers(checkpoint: Path, tmp_path: Path) -> None:
    """Finite weights whose products are not, for both engines of this process."""
    processor, model = load_processor(checkpoint), load_model(checkpoint)
    frames = torch.from_numpy(moving_square(4)).permute(0, 3, 1, 2).contiguous()
    clip = Media(frames, torch.arange(4, dtype=torch.float64) / 2, 2.0, "video")
    prompt = PromptBuilder(processor).build(Sample(1, "?", "video", "OCR", "<answer>x</answer>", "c"), clip)
    cast(Any, model.get_output_embeddings()).weight.data.fill_(3e38)
    for engine in (TransformersEngine(model, processor), GeneralEngine(model, processor)):
        for temperature in (0.0, 1.0):
            sampling = SamplingSettings(max_tokens=4, temperature=temperature)
            with pytest.raises(VideoR1Error, match="the model's probabilities are not numbers"):
                engine.sample([prompt], sampling)
