"""What a checkpoint says of how it was trained, and that every command that loads it goes by that."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from tgrpo_trainers import make_trainer
from tiny_questions import training_arguments

from video_r1 import SFTConfig, SFTTrainer
from video_r1.recipe import load_recipe
from video_r1.rollout.engine_factory import open_prompts
from video_r1.settings.decoding import AskSettings, EvalSettings
from video_r1.settings.shared import ModelSettings, PromptSettings
from video_r1.settings.training_record import BUDGET, RECORD

LEARNT = {"fps": 4.0, "min_frames": 2, "max_frames": 6, "frame_pixels": 56 * 56, "image_pixels": 56 * 84}
TEMPLATE = "Look: {question}\n{options}\n{hint}\n#hint OCR: Read it."


@pytest.fixture(scope="module")
def trained(checkpoint: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an SFT with frames and words of its own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "template.txt").write_text(TEMPLATE)
    arguments = training_arguments(folder / "run", **LEARNT, max_steps=1)
    args = SFTConfig(**arguments, prompt_template=str(folder / "template.txt"))
    SFTTrainer(str(checkpoint), args, str(manifest)).train()
    return folder / "run"


def budget(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in BUDGET}


def test_it_stands_beside_the_processor(trained: Path) -> None:
    """In the run folder and in each checkpoint, readable without this package."""
    for folder in (trained, trained / "checkpoint-1"):
        record = json.loads((folder / RECORD).read_text())
        assert {name: record[name] for name in BUDGET} == LEARNT
        assert record["dtype"] == "float32" and record["positions"] == "transformers"
        assert record["prompt_template"].startswith("Look: {question}\n{options}\n{hint}\n#hint ")


def test_commands_take_it_as_their_default(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ask, eval, annotate, sft, rl, serve; frame counts that are asked for stay. Nothing is warned of."""
    model = {"model": str(trained)}
    ask = load_recipe("ask", None, {**model, "path": "x.mp4", "question": "?"}).section(AskSettings)
    assert budget(ask) == LEARNT and ask.dtype == "float32"
    builder, frames = open_prompts(ask)
    assert builder.template.text == "Look: {question}\n{options}\n{hint}"
    assert builder.template.hints["OCR"] == "Read it." and frames.max_frames == 6
    evaluation = load_recipe("eval", None, {**model, "manifest": "x", "frames": "16,32"}).section(
        EvalSettings
    )
    assert budget(evaluation) == LEARNT and evaluation.frame_counts == [16, 32]
    teacher = {"manifest": "x", "teacher": str(trained), "out": "y.json"}
    assert budget(load_recipe("annotate", None, teacher).section(PromptSettings)) == LEARNT
    for command in ("sft", "rl"):
        values = {"model_name_or_path": str(trained), "train_manifest": "x", "output_dir": "y"}
        recipe = load_recipe(command, None, values)
        assert budget(recipe.section(PromptSettings)) == LEARNT
        assert recipe.section(ModelSettings).dtype == "auto"  # updates need the file's own number format
    assert load_recipe("serve", None, model).values()["dtype"] == "float32"
    assert not caplog.records


def test_what_differs_is_warned_of(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a recipe or as an option; what is the same, in whatever file, is not."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"frame_pixels": 200704, "fps": 4, "max_frames": 6}))
    same, other = tmp_path / "same.txt", tmp_path / "other.txt"
    same.write_text(TEMPLATE)
    other.write_text(TEMPLATE + "\n#hint numerical: Count.")
    overrides = {"model": str(trained), "manifest": "x", "dtype": "bfloat16", "prompt_template": str(same)}
    with caplog.at_level(logging.WARNING):
        settings = load_recipe("eval", recipe, overrides).section(EvalSettings)
    assert settings.frame_pixels == 200704 and settings.min_frames == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{said}, while {trained} was trained with {learnt}: it may answer worse"
        for said, learnt in (("frame_pixels is 200704", "3136"), ("dtype is bfloat16", "float32"))
    ]
    caplog.clear()
    load_recipe("eval", None, {**overrides, "dtype": "float32", "prompt_template": str(other)})
    assert [record.getMessage().partition(" is ")[0] for record in caplog.records] == ["prompt_template"]


def test_a_library_run_goes_by_it_too(
    trained: Path, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What TGRPOConfig is not given comes from the checkpoint, and goes on into the next one."""
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(trained, str(manifest), tmp_path / "rl", max_frames=4, max_steps=1)
    assert budget(trainer.settings) == LEARNT | {"max_frames": 4}
    assert [r.getMessage().split()[:3] for r in caplog.records if "trained with" in r.getMessage()] == [
        ["max_frames", "is", "4,"]
    ]
    trainer.train()
    record = json.loads((tmp_path / "rl" / RECORD).read_text())
    assert record["max_frames"] == 4 and record["prompt_template"].startswith("Look: ")
