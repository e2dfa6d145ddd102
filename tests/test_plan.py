"""`video-r1 plan RECIPE`: the recipe's own machine, shapes without the hub, and options that make it fit."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from measured_memory import model_of
from transformers import AutoModelForImageTextToText

from video_r1.cli import main
from video_r1.errors import ConfigError
from video_r1.plan.plan import gpu_memory, nearest_recipe, of_stage, planned_sharding
from video_r1.plan.shapes import is_published, model_config, published, published_config
from video_r1.recipe import load_recipe
from video_r1.recipe_files import checkpoint_behind, model_folder, packaged_recipes
from video_r1.settings.commands import GPUS, PlanSettings, gpu_named
from video_r1.settings.training import SFTSettings

GB = 10**9
SETTINGS: dict[str, Any] = {
    "model_name_or_path": "x", "train_manifest": "x", "output_dir": "x", "dtype": "float32", "bf16": False,
    "max_frames": 8, "frame_pixels": (4 * 28) ** 2, "image_pixels": 28**2, "num_generations": 4,
    "max_completion_length": 256, "gradient_accumulation_steps": 4, "length_range": [10, 250],
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "machine"),
    [
        ("video-r1-7b-tgrpo", (8, True, 80 * GB, "rl")),
        ("video-r1-7b-tgrpo --sharding none --gpu h200", (8, False, 141 * GB, "rl")),
        ("video-r1-7b-tgrpo-lora --gpus 4 --sharding zero3", (4, True, 80 * GB, "rl")),
        ("mine.yaml", (8, True, 48 * GB, "sft")),
        ("bare.yaml --gpu_memory 24GB", (1, False, 24 * GB, "rl")),
    ],
)
def test_a_plan_is_for_the_recipes_machine_unless_told_otherwise(
    words: str, machine: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("mine.yaml").write_text("base: video-r1-7b-sft\nmade_for: {gpu_memory: 48GB}\n")
    Path("bare.yaml").write_text("epsilon: 0.1\n")
    name, *options = words.split()
    pairs = dict(zip((option[2:] for option in options[::2]), options[1::2], strict=True))
    recipe = load_recipe("plan", name, pairs)
    sharding = planned_sharding(recipe)
    found = sharding.processes, sharding.weights, gpu_memory(recipe), of_stage(recipe).command
    assert found == machine


@pytest.mark.parametrize(("line", "passes"), [("", 2), ("gradient_accumulation_steps: 5\n", 5)])
def test_a_plan_of_sft_has_the_defaults_of_sft(line: str, passes: int, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"made_for: {{command: sft}}\n{line}")
    recipe = of_stage(load_recipe("plan", tmp_path / "mine.yaml", {"max_response_length": "99"}))
    assert recipe.values()["gradient_accumulation_steps"] == passes
    training = recipe.section(SFTSettings)
    assert (training.gradient_accumulation_steps, training.max_response_length) == (passes, 99)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B", "Qwen/Qwen3-VL-30B-A3B"])
def test_the_table_has_the_shapes_of_published_checkpoints(name: str) -> None:
    entry = published()[name]
    config = published_config(f"{name}-Instruct")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    weights = sum(weight.numel() for weight in model.parameters())
    assert weights / 1e9 == pytest.approx(entry["total"], abs=0.006)
    assert config.dtype == torch.bfloat16
    assert config.model_type == entry["model_type"]


def test_packaged_recipes_need_no_hub() -> None:
    for name in packaged_recipes():
        if name != "lab-eval":
            values = load_recipe("plan", name).values()
            assert model_config(model_folder(checkpoint_behind(values["model_name_or_path"]))).vision_config


def test_a_folder_goes_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_published("Qwen/Qwen3-VL-8B-Thinking") and not is_published("Qwen/Qwen3-VL-8B-Instruct-FP8")
    model_of(128, 4, 2048).config.save_pretrained("Qwen/Qwen3-VL-8B-Thinking")
    assert not is_published("Qwen/Qwen3-VL-8B-Thinking")
    assert model_config("Qwen/Qwen3-VL-8B-Thinking").get_text_config().hidden_size == 128


def remedies(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[float, list[tuple[list[str], float]]]:
    """The peak of a plan that does not fit, and its remedies: options and the peak with them, in MiB."""
    assert main(words) == 1
    head, _, tail = capsys.readouterr().out.partition("\nit does not fit ")
    peak = float(head.partition("does not fit: ")[2].split()[0].replace(",", ""))
    rows = [line.rsplit(maxsplit=1) for line in tail.splitlines() if line.startswith("  --")]
    return peak, [(shlex.split(options), 1024 * float(most)) for options, most in rows]


def plan_of(folder: Path, *shape: int) -> list[str]:
    """The command for a recipe and a model of this shape in the folder, but for the GPU's memory."""
    model_of(*shape).config.save_pretrained(folder)
    (folder / "my.yaml").write_text(yaml.safe_dump(SETTINGS))
    return ["plan", str(folder / "my.yaml"), "--model_config", str(folder), "--gpu_memory"]


@pytest.mark.slow
def test_each_remedy_fits_when_it_is_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = plan_of(tmp_path, 256, 4, 8192)
    peak, _ = remedies([*words, "1MB"], capsys)
    _, found = remedies([*words, f"{0.8 * peak:.0f}MiB"], capsys)
    names = {" ".join(word for word in options if word.startswith("--")) for options, _ in found}
    assert "--gradient_checkpointing" in names
    assert "--max_completion_length --length_range" in names
    assert any({"--use_peft", "--load_in_4bit", "--max_frames"} < {*options} for options, _ in found)
    for options, most in found:
        assert main([*words, f"{0.8 * peak:.0f}MiB", *options]) == 0
        out = capsys.readouterr().out
        assert float(out.rpartition("\nfits: ")[2].split()[0]) == pytest.approx(
            most, abs=6
        )  # two decimals of GiB


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        *((name, name) for name in GPUS),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("4090", "rtx-4090"), ("RTX3090", "rtx-3090"),
        ("rtx_a6000", "a6000"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40S", "l40s"), ("RTX PRO 6000 Blackwell", "rtx-pro-6000"), ("B200 180GB", "b200"),
        ("Tesla A10", "a10"), ("h20", "h20"), ("A100-40GB", None), ("a10g", None), ("l40", None),
        ("GH200", None), ("rtx 6000 ada", None), ("v100", None), ("", None),
    ],
)  # fmt: skip
def test_gpus_under_the_names_that_people_type(typed: str, name: str | None) -> None:
    assert gpu_named(typed) == name
    if name is None:
        with pytest.raises(ConfigError, match=r"gpu is .*known are a100, .*give gpu_memory"):
            PlanSettings(gpu=typed)
    else:
        assert PlanSettings(gpu=typed).kind == name


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("video-r1-7b-tgrpo --gpu_memory 24GB --gpus 2", "video-r1-3b-tgrpo-lora --gpu_memory 24GB --gpus 2"),
        ("qwen3-vl-8b-sft --gpu l40s --gpus 1", "--gpu_memory 48GB"),
        ("video-r1-7b-tgrpo --gpu h100 --gpus 1", "video-r1-7b-tgrpo-lora --gpu_memory 80GB"),
        ("video-r1-7b-tgrpo --gpu_memory 4GB --gpus 1", None),
    ],
)
def test_the_nearest_recipe_of_a_machine_without_one(words: str, name: str | None) -> None:
    command, *options = shlex.split(words)
    given = dict(zip(options[::2], options[1::2], strict=True))
    recipe = load_recipe("plan", command, {key[2:]: value for key, value in given.items()})
    sharding, memory = planned_sharding(recipe), gpu_memory(recipe)
    plan: Any = SimpleNamespace(sharding=sharding, gpu_memory=memory, recipe=of_stage(recipe))
    said = nearest_recipe(plan)
    assert said is None if name is None else name in str(said)


def test_cases_a_cache_for_a_user_without_a_home() -> None:
    """A job with a cleared environment and a user id without an entry in /etc/passwd."""
    code = (
        "import os; os.environ.pop('HOME', None); os.environ.pop('XDG_CACHE_HOME', None)\n"
        "os.getuid = lambda: 54321\n"
        "from video_r1.files import cache_folder\n"
        "assert cache_folder() is None\n"
        "from video_r1.errors import ConfigError\n"
        "from video_r1.data.sources.remote import open_remote_cache\n"
        "try: open_remote_cache(None, 1)\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "name a folder" in done.stdout
