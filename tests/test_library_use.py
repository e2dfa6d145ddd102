"""The README's lines, run as they stand there, on a model and data of a few kilobytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_models import tiny_checkpoint
from tiny_questions import KINDS, read_lines, training_arguments, write_manifest

from video_r1 import SFTConfig, SFTTrainer, TGRPOConfig, TGRPOTrainer
from video_r1.cli import main
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import ManifestError

README = Path(__file__).parents[1] / "README.md"
T_GRPO = README.parent / "docs" / "t-grpo.md"


def taught_checkpoint(folder: Path, manifest: Path) -> Path:
    """A tiny model after a cold start of a second, so that it sometimes writes the format."""
    tiny_checkpoint("qwen2_5_vl", folder / "base")
    args = SFTConfig(
        **training_arguments(folder / "sft", max_steps=40, learning_rate=4e-3, save_strategy="no")
    )
    trainer = SFTTrainer(str(folder / "base"), args, str(manifest))
    trainer.train()
    trainer.save_model()
    return folder / "sft"


@pytest.mark.slow
def test_readme_lines_train(tmp_path: Path) -> None:
    """The ten lines with another model, folder and length."""
    manifest = write_manifest(tmp_path)
    checkpoint = taught_checkpoint(tmp_path, manifest)
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
        if "TGRPOTrainer" in block
    ]
    assert len(code.strip().splitlines()) <= 10
    small = (
        "num_generations=8, max_completion_length=48, use_cpu=True, frame_pixels=56 * 56, "
        "image_pixels=56 * 84, length_reward=0.0"
    )
    replacements = {
        '"Qwen/Qwen2.5-VL-3B-Instruct"': repr(str(checkpoint)),
        '"runs/mine"': repr(str(tmp_path / "mine")),
        '"my.json"': repr(str(manifest)),
        "num_generations=8": small,
        "max_steps=1000": "max_steps=3",
    }
    for written, used in replacements.items():
        assert written in code
        code = code.replace(written, used)
    exec(compile(code, "README.md", "exec"), {})
    lines = read_lines(tmp_path / "mine" / "metrics.jsonl")
    assert len(lines) == 3 and any(line["reward/format"] > 0 for line in lines)
    assert (tmp_path / "mine" / "checkpoint-3" / "model.safetensors").exists()
    words = ["ask", str(tmp_path / "mine"), str(tmp_path / "0.mp4"), "Which way?", "--max_new_tokens", "4"]
    assert main(words) == 0


def test_data_set_and_reward_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `datasets.Dataset` of the record fields, paths relative to the current folder, and a function with
    TRL's signature, which gets what docs/t-grpo.md says. Its completions are too short for a length reward.
    """
    monkeypatch.chdir(tmp_path)
    rows = json.loads(write_manifest(tmp_path).read_text())
    seen: list[str] = []
    (told,) = re.findall(r"^\| `prompts`.*?^\| every other", T_GRPO.read_text(), re.DOTALL | re.MULTILINE)
    documented = {name for line in told.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}

    def has_think(completions: list[str], problem_type: list[str], **columns: Any) -> list[float]:
        seen.extend(problem_type)
        assert {"completions", "problem_type", *columns} == documented
        assert {len(column) for column in columns.values()} == {len(completions)}
        assert len(completions) in (8, 6)  # the trial of four questions, and then three a step
        assert isinstance(completions[0], str) and isinstance(columns["completion_ids"][0][0], int)
        assert columns["prompts"][0].startswith(columns["problem"][0])
        return [float(len(text) % 3) for text in completions]

    args = TGRPOConfig(**training_arguments(tmp_path / "run", num_generations=2, max_completion_length=8))
    trainer = TGRPOTrainer(
        str(tiny_checkpoint("qwen2_5_vl", tmp_path / "model")),
        reward_funcs=["accuracy", has_think],
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    assert set(seen) == set(KINDS)
    assert all("reward/has_think" in line for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_rows_are_checked_by_the_constructor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = json.loads(write_manifest(tmp_path).read_text())
    model = str(tiny_checkpoint("qwen2_5_vl", tmp_path / "model"))
    args = SFTConfig(**training_arguments(tmp_path / "run"))
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset={"held out": rows[:2]})
    assert trainer.train_dataset == load_manifest(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match=r"list: 1 problem: row 1 \(id 0\): solution is missing"):
        SFTTrainer(model, args, train_dataset=[rows[0] | {"solution": None}])
    with pytest.raises(ManifestError, match="not generator"):
        SFTTrainer(model, args, train_dataset=(row for row in rows))  # pyright: ignore[reportArgumentType]
