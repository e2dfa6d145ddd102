"""The estimate of a step on GPUs: its FLOPs against counted ones, what changes it, and what plan prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks._sizes import PATCH, SIZES, build_model, question, text
from benchmarks._timing import flops
from video_r1.cli import main
from video_r1.models.group_forward import group_logprobs
from video_r1.plan.estimate import Launches, estimate
from video_r1.plan.memory import MemoryPlan, memory_plan
from video_r1.recipe import Recipe, load_recipe

BEFORE = Launches(token=60, block=319, layer=285, replayed=False)
NOW = Launches()
SIZE = SIZES["small"]
COMPLETION, GROUP = 64, 8


def recipe_of(**changes: Any) -> Recipe:
    values = {
        "model_name_or_path": "x", "train_manifest": "x", "output_dir": "x", "dtype": "float32",
        "max_frames": SIZE.frames, "frame_pixels": SIZE.frame[0] * SIZE.frame[1] * PATCH**2,
        "num_generations": GROUP, "max_completion_length": 2 * COMPLETION, "length_reward": 0.0,
    }  # fmt: skip
    return load_recipe("rl", None, values | changes)


@pytest.fixture(scope="module")
def config() -> Any:
    with torch.device("meta"):
        return build_model(SIZE, torch.device("meta"), torch.float32).config


def planned(config: Any, recipe: Recipe) -> MemoryPlan:
    return memory_plan(config, recipe, gpu_memory=80 * 10**9, text_tokens=SIZE.text + 2)


def test_flops_of_the_update_are_those_that_are_counted(config: Any) -> None:
    """Forward and backward of a group in one row, completions at half of their limit."""
    model = build_model(SIZE, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompt = question(SIZE, generator)
    completions = [[text(SIZE, COMPLETION, generator) for _ in range(GROUP)]]
    counted = flops(lambda: group_logprobs(model, [prompt], completions).logprobs.sum().backward())
    plan = planned(config, recipe_of())
    assert plan.row.prompt == len(prompt.input_ids)
    found = estimate(config, plan.recipe, plan.traced, plan.row, plan.sharding, "h100")
    assert found.useful_flops == pytest.approx(counted, rel=0.1)


def test_what_makes_a_step_longer(config: Any) -> None:
    plan = planned(config, recipe_of())

    def seconds(recipe: Recipe = plan.recipe, gpu: str = "h100", launches: Any = NOW) -> dict[str, float]:
        found = estimate(config, recipe, plan.traced, plan.row, plan.sharding, gpu, launches)
        return {name: part.seconds for name, part in found.parts.items()}

    assert (
        seconds(launches=BEFORE)["decoding"] > 2 * seconds()["decoding"]
    )  # a small model waits for launches
    assert seconds(recipe_of(use_vllm=True), launches=BEFORE)["decoding"] == seconds()["decoding"]
    assert seconds(gpu="a100")["prefill"] > 3 * seconds()["prefill"]
    again = seconds(recipe_of(gradient_checkpointing=True))
    assert again["update"] >= seconds()["update"] and again["prefill"] == seconds()["prefill"]
    assert seconds(recipe_of(beta=0.0))["reference"] < seconds()["reference"]


def test_vllms_share_has_to_suffice(config: Any) -> None:
    """Weights, profiling run, and keys and values of one question at least."""
    recipe = recipe_of(use_vllm=True, vllm_gpu_memory_utilization=0.3, bf16=True)
    plan = planned(config, recipe)
    assert plan.vllm is not None and plan.vllm.questions > 0 and plan.fits
    weights, profile = plan.vllm.weights, plan.vllm.profile
    assert weights == 2 * plan.traced.parameters
    tokens = 2 * plan.row.prompt + 12 * 2 * COMPLETION  # both orders once, 8 + 4 completions
    assert plan.vllm.question == tokens * 2 * 2 * SIZE.layers * SIZE.kv_heads * (SIZE.hidden // SIZE.heads)
    small = replace(plan.vllm, share=weights + profile + plan.vllm.question - 1)
    assert small.questions == 0 and not replace(plan, vllm=small).fits
    assert replace(small, share=small.least).questions == 1


@pytest.mark.slow
def test_plan_prints_it(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.save_pretrained(tmp_path)
    words = ["plan", "video-r1-3b-tgrpo", "--model_config", str(tmp_path), "--gpu", "h100"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "of 74.51 GiB" in out  # its memory is known
    for part in ("prefill", "decoding", "reference", "update", "optimizer", "total"):
        assert f"\n  {part} " in out
    assert "estimated, not measured" in out and "MFU" in out and "assumed: 50% of 989 TFLOP/s" in out
    assert main([*words, "--vllm_gpu_memory_utilization", "0.001"]) == 1
    assert "vLLM's share is too small: set vllm_gpu_memory_utilization" in capsys.readouterr().out
