"""`video-r1 plan` of models on the general path, against real passes on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from general_models import GENERAL_ROWS, general_checkpoint, general_model, general_processor
from measured_memory import most_at_once, tensor_bytes
from test_memory_plan import recipe_of

from video_r1.cli import main
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.errors import ConfigError
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import freeze_vision
from video_r1.plan.memory import MemoryPlan, memory_plan, sharding_of
from video_r1.recipe import Recipe
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.general import GeneralEngine

TEXT = 40
FRAMES = {"frame_pixels": 56 * 56, "image_pixels": 56 * 56}


def planned(family: str, recipe: Recipe, **how: Any) -> tuple[MemoryPlan, Any]:
    processor = general_processor(family)
    model: Any = general_model(family, processor)
    plan = memory_plan(model.config, recipe, text_tokens=TEXT, device_type="cpu", processor=processor, **how)
    return plan, model


def longest_prompt(family: str, tokens: int) -> Prompt:
    """Eight frames, as the plan's recipe allows, and so many tokens of text and frames."""
    processor = general_processor(family)
    clip = Media(torch.zeros(8, 3, 56, 56, dtype=torch.uint8), torch.arange(8).double(), 8.0, "video")
    question = Sample(1, "?", "video", "free-form", "", "x")
    built = PromptBuilder(processor).build(question, clip)
    more = torch.full((tokens - len(built.input_ids),), 5)
    features = {
        name: torch.cat([value, torch.zeros_like(more)]) if name == "mm_token_type_ids" else value
        for name, value in built.features.items()
    }
    return Prompt(torch.cat([built.input_ids, more]), features, (clip,), None, [])


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_every_family_has_a_plan(family: str) -> None:
    recipe = recipe_of(**FRAMES, gradient_checkpointing=True)
    plan, model = planned(family, recipe)
    assert plan.traced.parameters == sum(weight.numel() for weight in model.parameters())
    assert plan.parts["weights"] == tensor_bytes([*model.parameters(), *model.buffers()])
    assert set(plan.phases) == {"update", "optimizer step", "rollout"}
    assert plan.row.tokens == plan.row.questions * plan.row.completions * (
        plan.row.prompt + plan.row.completion - 1
    )
    assert plan.peak > plan.parts["weights"] + plan.parts["optimizer"] + plan.parts["activations"]


@pytest.mark.parametrize(
    ("family", "frozen"), [("smolvlm", False), pytest.param("internvl", True, marks=pytest.mark.slow)]
)
def test_the_plan_agrees_with_a_measured_update_and_rollout(family: str, frozen: bool) -> None:
    plan, model = planned(family, recipe_of(**FRAMES, beta=0.0, freeze_vision_tower=frozen))
    if frozen:
        freeze_vision(model)
    prompt = longest_prompt(family, plan.row.prompt + 30)
    assert plan.row.visual <= plan.row.prompt <= len(prompt.input_ids)
    prompt = Prompt(prompt.input_ids[: plan.row.prompt], prompt.features, prompt.media, None, [])
    if "mm_token_type_ids" in prompt.features:
        prompt.features["mm_token_type_ids"] = prompt.features["mm_token_type_ids"][: plan.row.prompt]
    completions = [[torch.arange(100, 148) + g for g in range(8)]]

    def update() -> None:
        model.zero_grad(set_to_none=True)
        group_logprobs(model, [prompt], completions, with_entropy=True).logprobs.mean().backward()

    update()
    model.zero_grad(set_to_none=True)
    assert plan.traced.update_peak == pytest.approx(most_at_once(update), rel=0.25)
    engine = GeneralEngine(model, general_processor(family))
    sampling = SamplingSettings(n=8, max_tokens=48, seed=0)
    engine.sample([prompt], sampling)
    beyond = plan.phases["rollout"] - plan.phases["optimizer step"] + plan.parts["gradients"]
    assert beyond == pytest.approx(most_at_once(lambda: engine.sample([prompt], sampling)), rel=0.25)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = general_checkpoint("smolvlm", tmp_path / "model")
    command = ["plan", "lab-tgrpo", "--model_config", str(folder), "--gpu", "h100"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "the general path: the prompt is computed again for each completion" in said
    assert main([*command, "--gpu_memory", "1MB"]) == 1
    assert "load_in_4bit" not in capsys.readouterr().out
    (folder / "processor_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert main(command) == 2
    assert "the processor cannot be loaded" in capsys.readouterr().err


def test_what_the_general_path_refuses() -> None:
    for setting, named in (
        ({"use_vllm": True}, "engine vllm"),
        ({"load_in_4bit": True, "use_peft": True}, "load_in"),
    ):
        with pytest.raises(ConfigError, match=f"smolvlm takes the general path, .* not work with {named}"):
            planned("smolvlm", recipe_of(**FRAMES, **setting))
    with pytest.raises(ConfigError, match=r"not work with sharded weights \(4 GPUs, FSDP2\)"):
        planned("smolvlm", recipe_of(**FRAMES), sharding=sharding_of({}, 4, "fsdp2"))
    config: Any = general_model("internvl", general_processor("internvl")).config
    with pytest.raises(ConfigError, match="a plan of internvl asks its processor"):
        memory_plan(config, recipe_of(**FRAMES), device_type="cpu")
