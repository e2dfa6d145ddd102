"""SFT on a real tiny Qwen2.5-VL: what is taught, how it is batched and normalised, what it leaves behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_questions import read_lines, training_arguments, write_manifest
from torch import Tensor
from transformers import AutoModelForImageTextToText

from video_r1.data.manifests.records import load_manifest
from video_r1.data.prompts import Prompt
from video_r1.data.templates import load_template
from video_r1.errors import ConfigError, ManifestError
from video_r1.recipe import load_recipe
from video_r1.training.sft import SFTConfig, SFTTrainer, run_sft


def make_trainer(
    checkpoint: Path, manifest: Any, folder: Path, evaluated: Any = None, **changes: Any
) -> SFTTrainer:
    return SFTTrainer(
        str(checkpoint), SFTConfig(**training_arguments(folder, **changes)), manifest, evaluated
    )


def model_of(trainer: SFTTrainer) -> Any:
    return trainer.model


def plain_logits(model: Any, prompt: Prompt, response: Tensor) -> Tensor:
    """The logits [L, V] that predict a response, by the model's own forward on this one example."""
    ids = torch.cat([prompt.input_ids, response])
    features = {
        name: value.to(model.dtype) if value.is_floating_point() and "pixel" in name else value
        for name, value in prompt.features.items()
    }
    kinds = features.pop("mm_token_type_ids").flatten()
    features["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(response)])[None]
    return model(input_ids=ids[None], **features).logits[0, len(prompt.input_ids) - 1 : -1]


def test_batch_equals_single_examples(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """Neighbours in the row and the head's chunks change nothing: the model's own loss on each example."""
    trainer = make_trainer(checkpoint, str(manifest), tmp_path)
    examples = [trainer.load(sample) for sample in load_manifest(manifest)]
    together = trainer.logprobs(model_of(trainer).eval(), examples)
    double = copy.deepcopy(model_of(trainer)).double().eval()
    alone, right = torch.zeros((), dtype=torch.float64), 0
    for sample, (prompt, response, _) in zip(load_manifest(manifest), examples, strict=True):
        text = trainer.builder.tokenizer.decode(response)
        assert text == f"{sample.process}\n{sample.solution}<|im_end|>"
        logits = plain_logits(double, prompt, response)
        alone = alone + torch.nn.functional.cross_entropy(logits, response, reduction="sum")
        right += int((logits.argmax(-1) == response).sum())
    assert len(together.logprobs) == sum(len(response) for _, response, _ in examples)
    assert together.likeliest is not None and int(together.likeliest.sum()) == right
    loss = -together.logprobs.sum()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    loss.backward()
    alone.backward()
    for parameter, reference in zip(model_of(trainer).parameters(), double.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(parameter.grad, reference.grad.float(), rtol=2e-3, atol=2e-3)


def test_accumulation_equals_one_large_batch(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """The loss is the mean over the step's tokens, however they are split: 6 questions, or 3 times 2."""
    results: list[dict[str, Tensor]] = []
    losses = []
    for size, accumulation in ((6, 1), (2, 3)):
        trainer = make_trainer(
            checkpoint, load_manifest(manifest)[2:8], tmp_path / str(size), per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, optim="sgd", max_steps=2, save_strategy="no",
            learning_rate=0.01,
        )  # fmt: skip
        trainer.train()
        results.append(dict(model_of(trainer).state_dict()))
        losses.append([line["loss"] for line in read_lines(trainer.folder / "metrics.jsonl")])
    assert losses[0][0] > losses[0][1]
    for other, loss in zip(results[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_recipe_learns_resumes_and_loads(checkpoint: Path, tmp_path: Path) -> None:
    """From a recipe: bad media set aside, the loss falls, a continued run goes on where it was, the run
    folder is a checkpoint.
    """
    data = tmp_path / "data"
    data.mkdir()
    manifest = write_manifest(data, bad=(1,))
    settings = training_arguments(
        tmp_path / "run", max_steps=12, save_steps=4, learning_rate=3e-3, model_name_or_path=str(checkpoint),
        train_manifest=str(manifest), eval_manifest=str(manifest), eval_strategy="steps", eval_steps=6,
    )  # fmt: skip

    def command(**changes: Any) -> Path:
        values = {name: str(value) for name, value in (settings | changes).items()}
        return run_sft(load_recipe("sft", None, values))

    folder = command()
    lines = read_lines(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    assert [line["problem_id"] for line in read_lines(folder / "quarantine.jsonl")] == [1]

    # Killed after step 9, with a checkpoint that was cut short: the same command does the last steps again.
    (folder / "model.safetensors").unlink()
    (folder / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 12, "log_hist')
    command()
    assert [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line] == losses
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"
    assert (folder / "chat_template.jinja").exists()

    before = (folder / "metrics.jsonl").read_text()
    command()  # finished
    assert (folder / "metrics.jsonl").read_text() == before
    with pytest.raises(ConfigError, match=r"other settings: learning_rate \(0.003 → 0.5\)"):
        command(learning_rate=0.5)
    # A run finds its checkpoint itself; one that is named would not be heard.
    with pytest.raises(ConfigError, match="resumes by itself from the last complete checkpoint"):
        command(output_dir=tmp_path / "other", resume_from_checkpoint=folder)


def test_the_last_step_is_logged(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """Otherwise a run below `logging_steps` would leave no metrics and no report."""
    make_trainer(checkpoint, str(manifest), tmp_path, logging_steps=10, save_strategy="no").train()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [3]


def test_answers_alone(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """Rows without rationales are refused with what writes them, or train the answers to direct prompts."""
    bare = [replace(sample, process=None) for sample in load_manifest(manifest)]
    with pytest.raises(
        ManifestError, match=r"none of the 8 .*video-r1 annotate .*--target answer"
    ) as refused:
        make_trainer(checkpoint, bare, tmp_path / "refused")
    assert "data check" not in str(refused.value)
    trainer = make_trainer(checkpoint, bare, tmp_path / "run", target="answer", max_steps=1)
    prompt, response, _ = trainer.load(bare[0])
    assert trainer.builder.tokenizer.decode(response) == f"{bare[0].solution}<|im_end|>"
    asked = trainer.builder.tokenizer.decode(prompt.input_ids)
    assert "Answer within <answer></answer>" in asked and "Think" not in asked
    trainer.train()
    template = load_template(tmp_path / "run" / "video_r1.json")
    assert template == trainer.builder.template and not template.thinks


def test_question_without_rationale_is_set_aside(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """Such rows, and responses over the limit, are no examples; the others are trained on."""
    samples = load_manifest(manifest)
    mixed = [
        replace(samples[0], process=None),
        replace(samples[1], process="<think>" + "far " * 200 + "</think>"),
    ]
    trainer = make_trainer(checkpoint, [*mixed, *samples[2:6]], tmp_path, max_response_length=64, max_steps=4)
    trainer.train()
    reasons = {line["problem_id"]: line["reason"] for line in read_lines(tmp_path / "quarantine.jsonl")}
    assert set(reasons) == {0, 1}
    assert "process" in reasons[0] and "max_response_length" in reasons[1]


def test_validation_counts_what_it_leaves_out(checkpoint: Path, tmp_path: Path) -> None:
    """A damaged clip and a row without a rationale; the figures are those of the other questions."""
    samples = load_manifest(write_manifest(tmp_path, bad=(1,)))
    mixed = [replace(samples[0], process=None), *samples[1:]]
    trainer = make_trainer(checkpoint, samples, tmp_path / "run", mixed, per_device_eval_batch_size=3)
    figures = trainer.evaluate()
    assert (figures["eval_questions"], figures["eval_skipped"]) == (len(samples) - 2, 2)
    good = trainer.evaluate(samples[2:])
    assert good["eval_skipped"] == 0
    for name in ("eval_loss", "eval_token_accuracy"):
        assert figures[name] == pytest.approx(good[name], rel=1e-5)
