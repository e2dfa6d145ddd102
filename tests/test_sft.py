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

from video_r1.data.records import load_manifest
from video_r1.errors import ConfigError
from video_r1.recipe import load_recipe
from video_r1.training.sft import IGNORED, SFTConfig, SFTTrainer, pad_examples, response_loss, run_sft


def make_trainer(
    checkpoint: Path, manifest: Any, folder: Path, evaluated: Any = None, **changes: Any
) -> SFTTrainer:
    return SFTTrainer(
        str(checkpoint), SFTConfig(**training_arguments(folder, **changes)), manifest, evaluated
    )


def model_of(trainer: SFTTrainer) -> Any:
    return trainer.model


def test_loss_is_on_the_response_alone(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """A batch of clips and pictures of different length: labels, padding, and every example's own media."""
    trainer = make_trainer(checkpoint, str(manifest), tmp_path)
    samples = [load_manifest(manifest)[index] for index in (0, 5, 3, 6)]  # video, image, video, image
    examples = [trainer.load(sample) for sample in samples]
    batch = pad_examples(examples, trainer.pad_token_id)
    tokenizer = trainer.builder.tokenizer
    for row, sample, (prompt, response) in zip(range(4), samples, examples, strict=True):
        start, end = len(prompt.input_ids), len(prompt.input_ids) + len(response)
        taught = batch["labels"][row] != IGNORED
        assert taught.nonzero()[:, 0].tolist() == list(range(start, end))
        assert batch["attention_mask"][row].tolist() == [1] * end + [0] * (len(taught) - end)
        text = tokenizer.decode(batch["labels"][row][taught])
        assert text == f"{sample.process}\n{sample.solution}<|im_end|>"
    frames = [prompt.features["pixel_values_videos"] for prompt, _ in (examples[0], examples[2])]
    torch.testing.assert_close(batch["pixel_values_videos"], torch.cat(frames), rtol=0, atol=0)
    assert (
        len(batch["image_grid_thw"]) == len(batch["video_grid_thw"]) == len(batch["second_per_grid_ts"]) == 2
    )


def test_batch_equals_single_examples(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """Padding, neighbours and the cut of the head change nothing: the model's own loss on each example."""
    trainer = make_trainer(checkpoint, str(manifest), tmp_path)
    examples = [trainer.load(sample) for sample in load_manifest(manifest)]
    batch = pad_examples(examples, trainer.pad_token_id)
    together, hits, tokens = response_loss(model_of(trainer).eval(), batch)
    double = copy.deepcopy(model_of(trainer)).double().eval()
    alone, right = torch.zeros((), dtype=torch.float64), 0
    for prompt, response in examples:
        row = pad_examples([(prompt, response)], 0)
        labels = row.pop("labels")
        features = {
            name: value.double() if value.is_floating_point() else value for name, value in row.items()
        }
        logits = double(**features).logits[0, :-1]
        start = len(prompt.input_ids) - 1
        assert labels[0, start + 1 :].tolist() == response.tolist()
        alone = alone + torch.nn.functional.cross_entropy(logits[start:], response, reduction="sum")
        right += int((logits[start:].argmax(-1) == response).sum())
    assert tokens == sum(len(response) for _, response in examples) and int(hits) == right
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    together.backward()
    alone.backward()
    for parameter, reference in zip(model_of(trainer).parameters(), double.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(parameter.grad, reference.grad.float(), rtol=2e-3, atol=2e-3)


def test_accumulation_equals_one_large_batch(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """The loss is the mean over the step's tokens, however they are cut: 5 questions as 5, 2 + 2 + 1 and
    ones.
    """
    results: list[dict[str, Tensor]] = []
    losses = []
    for size, accumulation in ((5, 1), (2, 3), (1, 5)):
        trainer = make_trainer(
            checkpoint, load_manifest(manifest)[2:7], tmp_path / str(size), per_device_train_batch_size=size,
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
    folder = run_sft(load_recipe("sft", None, {name: str(value) for name, value in settings.items()}))
    lines = read_lines(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    assert [line["problem_id"] for line in read_lines(folder / "quarantine.jsonl")] == [1]

    # Killed after step 9, with a checkpoint that was cut short: the same command does the last steps again.
    (folder / "model.safetensors").unlink()
    (folder / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 12, "log_hist')
    run_sft(load_recipe("sft", None, {name: str(value) for name, value in settings.items()}))
    assert [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line] == losses
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"
    assert (folder / "chat_template.jinja").exists()

    before = (folder / "metrics.jsonl").read_text()
    run_sft(load_recipe("sft", None, {name: str(value) for name, value in settings.items()}))  # finished
    assert (folder / "metrics.jsonl").read_text() == before
    with pytest.raises(ConfigError, match=r"other settings: learning_rate \(0.003 → 0.5\)"):
        run_sft(
            load_recipe(
                "sft", None, {name: str(v) for name, v in (settings | {"learning_rate": 0.5}).items()}
            )
        )
    # A run finds its checkpoint itself; one that is named would not be heard.
    settings |= {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": str(folder)}
    with pytest.raises(ConfigError, match="goes on from the last whole checkpoint"):
        run_sft(load_recipe("sft", None, {name: str(value) for name, value in settings.items()}))


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
