"""Whole runs on the general path: SFT, T-GRPO, evaluation and a question, with tiny models of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from general_models import GENERAL, GENERAL_ROWS, general_checkpoint
from tgrpo_trainers import make_trainer, weights
from tiny_questions import read_lines, training_arguments
from transformers import AutoModelForImageTextToText

from video_r1 import cli
from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import load_manifest
from video_r1.data.prompts import PromptBuilder
from video_r1.errors import ConfigError
from video_r1.models.loading import load_model, load_processor, size_multiple
from video_r1.rollout.engine_factory import open_engine
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import FrameBudget
from video_r1.training.sft import SFTConfig, SFTTrainer
from video_r1.training.sharded import check_sharding_of


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: general_checkpoint(family, tmp_path_factory.mktemp(family)) for family in GENERAL}


@pytest.mark.slow
@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_sft_teaches(family: str, checkpoints: dict[str, Path], manifest: Path, tmp_path: Path) -> None:
    """Clips and pictures; the response ends as the chat template ends a turn; the loss falls."""
    config = SFTConfig(**training_arguments(tmp_path, max_steps=12, logging_steps=1, learning_rate=3e-3))
    trainer = SFTTrainer(str(checkpoints[family]), config, load_manifest(manifest)[3:7])
    ends = {"smolvlm": "<end_of_utterance>", "gemma4": "<turn|>"}  # GLM's template writes none
    response = trainer.load(load_manifest(manifest)[0]).response
    assert trainer.builder.tokenizer.decode(response[-1:]) == ends.get(family, "<|im_end|>")
    trainer.train()
    losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_tgrpo_learns_and_its_checkpoint_is_plain(
    family: str, checkpoints: dict[str, Path], manifest: Path, tmp_path: Path
) -> None:
    """Two steps with shuffled clips and a KL term."""
    trainer = make_trainer(checkpoints[family], str(manifest), tmp_path, max_steps=2, beta=0.04)
    before = weights(trainer)
    trainer.train()
    groups = [group for batch in trainer.step.batches for group in batch.groups]
    assert any(group.rollouts.contrast for group in groups)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert all(line["updates/skipped"] == 0 for line in lines if "loss" in line)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert any("q_proj" in name for name in changed)
    policy = trainer.logprobs(cast(Any, trainer.model), trainer.step.batches[0]).logprobs
    assert bool(policy.isfinite().all())


@pytest.mark.parametrize("family", ["smolvlm", pytest.param("glm46v", marks=pytest.mark.slow)])
def test_eval_and_ask(
    family: str,
    checkpoints: dict[str, Path],
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pixels = ["--frame_pixels", "3136", "--image_pixels", "4704", "--device", "cpu", "--max_new_tokens", "8"]
    model = ["--model", str(checkpoints[family])]
    out = tmp_path / "out"
    command = ["eval", *model, "--manifest", str(manifest), "--out", str(out), "--max_frames", "4"]
    assert cli.main([*command, "--order", "ordered,shuffled", *pixels]) == 0
    (predictions,) = out.glob("predictions-*.jsonl")
    orders = [line["order"] for line in read_lines(predictions)]
    assert (orders.count("ordered"), orders.count("shuffled")) == (8, 5)
    assert json.loads((out / "summary.json").read_text())["questions"] == 8
    clip = manifest.parent / "0.mp4"
    assert cli.main(["ask", *model, "--path", str(clip), "--question", "Where?", *pixels]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_prompts(family: str, checkpoints: dict[str, Path], manifest: Path) -> None:
    """A clip's frames reach the processor in the order that is asked for; their tokens say who sized them."""
    processor = load_processor(checkpoints[family])
    builder = PromptBuilder(processor)
    sample = load_manifest(manifest)[0]
    media = read_media(sample, FrameBudget(frame_pixels=56 * 56, size_multiple=size_multiple(processor)))
    order = torch.randperm(len(media.frames), generator=torch.Generator().manual_seed(0))
    ordered, shuffled = builder.build(sample, media), builder.build(sample, media, order)
    assert torch.equal(ordered.input_ids, shuffled.input_ids)
    assert builder.visual_tokens(ordered.input_ids) >= len(media.frames) // 2
    name = next(name for name in ("pixel_values_videos", "pixel_values") if name in ordered.features)
    one, two = (prompt.features[name] for prompt in (ordered, shuffled))
    if family not in ("glm4v", "glm46v"):  # whose patches are of two frames
        one, two = (pixels.reshape(len(media.frames), -1) for pixels in (one, two))
        torch.testing.assert_close(one[order], two)
    assert not torch.equal(one, two)
    larger = read_media(sample, FrameBudget(frame_pixels=112 * 112, size_multiple=size_multiple(processor)))
    tokens = builder.visual_tokens(builder.build(sample, larger).input_ids)
    assert larger.frames.shape[-2:] == (112, 112)
    of_the_budget = builder.multiple is not None
    assert of_the_budget == (family in ("glm4v", "glm46v"))
    assert tokens == builder.visual_tokens(ordered.input_ids) * (4 if of_the_budget else 1)
    blind = builder.build(sample, media, torch.empty(0, dtype=torch.long), "blind")
    assert builder.visual_tokens(blind.input_ids) == 0 and not any("pixel" in key for key in blind.features)


def test_a_processor_without_videos_is_given_images(checkpoints: dict[str, Path], manifest: Path) -> None:
    processor: Any = load_processor(checkpoints["llava_onevision"])
    del processor.video_processor
    sample = load_manifest(manifest)[0]
    media = read_media(sample, FrameBudget(frame_pixels=56 * 56, max_frames=4))
    prompt = PromptBuilder(processor).build(sample, media)
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["image"] * 4 + ["text"]
    assert len(prompt.features["pixel_values"]) == 4 and "pixel_values_videos" not in prompt.features


def test_what_the_general_path_refuses(checkpoints: dict[str, Path], tmp_path: Path, manifest: Path) -> None:
    source = checkpoints["smolvlm"]
    processor = load_processor(source)
    with pytest.raises(ConfigError, match=r"4-bit weights are for Qwen2\.5-VL.* not for smolvlm; remove"):
        load_model(source, load_in_4bit=True)
    with pytest.raises(
        ConfigError, match=r"vLLM samples for Qwen2.* not known for smolvlm; set engine transformers"
    ):
        make_trainer(source, str(manifest), tmp_path, use_vllm=True)
    for engine in ("vllm", "http://127.0.0.1:9"):
        settings = EvalSettings(model=str(source), manifest="m.json", engine=engine)
        with pytest.raises(ConfigError, match=r"vLLM samples for .*not known for smolvlm"):
            open_engine(settings, PromptBuilder(processor))
    sharded: Any = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(deepspeed_plugin=None))
    with pytest.raises(ConfigError, match=r"SmolVLMForConditionalGeneration .* FSDP2 .* use DDP or ZeRO-2"):
        check_sharding_of(load_model(source), sharded)
