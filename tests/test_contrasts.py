"""Contrast clips: their frames by hand, their prompts, and what is asked and measured with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from test_prompts import PROCESSORS, make_clip, make_sample
from tgrpo_trainers import first_step, make_trainer, policy_of
from tiny_questions import read_lines, row

from video_r1.data.manifests.records import load_manifest
from video_r1.data.prompts import PromptBuilder, TextPrompts, blind_prompt, contrast_order, contrast_prompt
from video_r1.data.rollouts import Rollout
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import freeze_vision, load_model, load_processor
from video_r1.rollout.endpoint_engine import chat_request
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm.requests import engine_input, prompt_requests, server_request, visuals_of
from video_r1.settings.frames import Contrast

CONTRASTS = get_args(Contrast)


def frames(contrast: Contrast, count: int, seed: int = 0) -> list[int] | None:
    shown = contrast_order(contrast, [count], torch.Generator().manual_seed(seed))
    return None if shown is None else shown.tolist()


def test_contrast_frames() -> None:
    assert frames("reversed", 8) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert frames("blind", 8) == []
    shuffled = frames("shuffled", 8)
    assert shuffled is not None and sorted(shuffled) == list(range(8)) != shuffled
    for seed in range(20):
        frozen, dropped = frames("frozen", 6, seed), frames("dropped", 8, seed)
        assert frozen is not None and len(frozen) == 6 and len(set(frozen)) == 1
        assert dropped is not None and len(dropped) == 4 and dropped == sorted(set(dropped))
    assert {frames("frozen", 4, seed)[0] for seed in range(40)} == {0, 1, 2, 3}  # type: ignore[index]
    assert {n for seed in range(40) for n in frames("dropped", 8, seed) or ()} == set(range(8))
    assert [len(frames("dropped", count) or ()) for count in (4, 6, 10, 16)] == [2, 2, 4, 8]


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_contrast_of_a_short_clip(contrast: Contrast) -> None:
    assert frames(contrast, 1) is None
    assert (frames(contrast, 2) is None) == (contrast == "dropped")  # a pair is one temporal patch
    assert frames("single", 8) == [4, 4] and frames("single", 9) == [4, 4]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("contrast", CONTRASTS)
def test_contrast_prompt(family: str, contrast: Contrast) -> None:
    """Frames, their times and the sampling rate that reach the model; the question is the same."""
    builder, clip = PromptBuilder(PROCESSORS[family]), make_clip(family, 8, 4.0)
    ordered = builder.build(make_sample(), clip)
    prompt = contrast_prompt(make_sample(), clip, builder, contrast, torch.Generator().manual_seed(0))
    assert prompt is not None and prompt.order == contrast and ordered.order == "ordered"
    shown = contrast_order(contrast, [8], torch.Generator().manual_seed(0))
    assert shown is not None and prompt.permutation is not None
    assert torch.equal(prompt.permutation, shown)
    assert torch.equal(prompt.media[0].frames, clip.frames[shown])
    if contrast == "blind":
        assert builder.visual_tokens(prompt.input_ids) == 0
        assert not any("pixel" in name or "grid" in name for name in prompt.features)
        assert [part["type"] for part in prompt.messages[0]["content"]] == ["text"]
    elif contrast == "dropped":
        assert torch.equal(prompt.media[0].timestamps, clip.timestamps[shown])
        assert prompt.media[0].fps == 1.0  # 4 frames of 4 seconds
        assert prompt.features["video_grid_thw"].tolist()[0][0] == 2
    elif contrast == "single":
        assert prompt.features["video_grid_thw"].tolist()[0][0] == 1
        assert builder.visual_tokens(prompt.input_ids) * 4 == builder.visual_tokens(ordered.input_ids)
    else:
        assert torch.equal(prompt.input_ids, ordered.input_ids)
        assert torch.equal(prompt.media[0].timestamps, clip.timestamps)


def test_contrasts_of_temporal_patches() -> None:
    def shown(contrast: Contrast, count: int, seed: int = 0) -> list[int] | None:
        found = contrast_order(contrast, [count], torch.Generator().manual_seed(seed), "patch")
        return None if found is None else found.tolist()

    assert shown("reversed", 8) == [6, 7, 4, 5, 2, 3, 0, 1]
    assert shown("reversed", 2) is None and shown("shuffled", 2) is None  # one patch has no order
    assert shown("shuffled", 4) == [2, 3, 0, 1]
    orders = {tuple(shown("shuffled", 6, seed) or ()) for seed in range(60)}
    assert len(orders) == 5 and all(order[1::2] == tuple(n + 1 for n in order[::2]) for order in orders)
    for contrast in ("frozen", "dropped", "blind"):
        assert shown(contrast, 8) == frames(contrast, 8)


@pytest.mark.parametrize(
    ("permutation", "patches"),
    [
        (None, None), ([4, 5, 0, 1, 2, 3], [2, 0, 1]), ([0, 1, 4, 5], [0, 2]), ([5, 4, 3, 2, 1, 0], None),
        ([1, 2, 3, 4, 5, 0], None), ([], None), ([0, 1, 2], None),
    ],
)  # fmt: skip
def test_patches_of_a_prompt(permutation: list[int] | None, patches: list[int] | None) -> None:
    order = None if permutation is None else torch.tensor(permutation, dtype=torch.long)
    prompt = PromptBuilder(PROCESSORS["qwen2_5_vl"]).build(make_sample(), make_clip("qwen2_5_vl", 6), order)
    assert (None if prompt.patches is None else prompt.patches.tolist()) == patches


@pytest.mark.slow
def test_a_frozen_tower_sees_a_clip_twice(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """When its question is sampled, and once for drops, updates and KL. The steps are those of a tower that
    sees contrast clips and all else anew."""
    lines, seen = [], []
    samples = [sample for sample in load_manifest(manifest) if sample.data_type == "video"][:4]
    for frozen in (False, True):
        model = load_model(checkpoint)
        freeze_vision(model)
        folder = tmp_path / str(frozen)
        trainer = make_trainer(
            model, samples, folder, temporal_rule="likelihood_gate", contrast_unit="patch", max_steps=2,
            beta=0.1, num_iterations=2, save_strategy="no", per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.vision_is_frozen = frozen
        patches: list[int] = []
        for towers in (policy_of(trainer), cast(Any, trainer.reference).model):
            towers.model.visual.register_forward_pre_hook(lambda _, args, to=patches: to.append(len(args[0])))
        trainer.train()
        lines.append(read_lines(folder / "metrics.jsonl"))
        seen.append(sum(patches))
    clip = trainer.step.batches[0].groups[0].prompt.features["pixel_values_videos"]
    assert seen[1] == len(samples) * len(clip) * 2
    # when it is sampled, for the contrast, the reference and each of two updates
    assert seen[0] == len(samples) * len(clip) * 5
    timed = ("time", "seconds/", "speed/", "memory/")
    for ours, others in zip(*lines, strict=True):
        for name in ours:
            if not name.startswith(timed):
                assert ours[name] == pytest.approx(others[name], abs=1e-4), name


class Elsewhere(RolloutEngine):
    """An engine that is none of ours, whose log-probs are rounded."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.update_weights, self.rest, self.close = engine.update_weights, engine.rest, engine.close

    def sample(self, *args: Any, **options: Any) -> list[list[Rollout]]:
        groups = self.engine.sample(*args, **options)
        return [[replace(one, logprobs=one.logprobs.bfloat16().float()) for one in each] for each in groups]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["float32", "another engine"])
def test_a_clip_that_does_not_move_loses_nothing(
    checkpoint: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a still clip all orders are one: drops are exactly 0, however the sampler rounds, since both sides
    are computed in one way. In float32 one of them is what was sampled with."""
    image = np.zeros((56, 56, 3), np.uint8)
    image[10:30, 20:40] = (220, 30, 30)
    (tmp_path / "clip").mkdir()
    for number in range(8):
        Image.fromarray(image).save(tmp_path / "clip" / f"{number}.png")
    still = row(1, "multiple choice", "video", "clip/") | {"fps": 4.0}
    (tmp_path / "still.json").write_text(json.dumps([still, still | {"problem_id": 2}]))

    model = load_model(checkpoint, "float32")
    trainer = make_trainer(
        model, str(tmp_path / "still.json"), tmp_path / "run", temporal_rule="likelihood_gate",
        temporal_contrast="shuffled", per_device_train_batch_size=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    if case == "another engine":
        trainer.engine = cast(Any, Elsewhere(cast(TransformersEngine, trainer.engine)))
    scored: list[int] = []

    def heard(*args: Any, **options: Any) -> Any:
        scored.append(1)
        return group_logprobs(*args, **options)

    monkeypatch.setattr("video_r1.training.logprob_contrast.group_logprobs", heard)
    batches, _ = first_step(trainer)
    groups = [group for batch in batches for group in batch["batch"].groups]
    drops = torch.cat([drops for group in groups for drops in group.rollouts.token_contrasts])
    if case == "float32":
        assert len(scored) == 2 and drops.abs().max() < 1e-4
        return
    assert len(scored) == 4 and not drops.any()
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group.ordered])
    packed = torch.cat([trainer.logprobs(policy_of(trainer), batch["batch"]).logprobs for batch in batches])
    assert (sampled - packed).abs().max() > 1e-3  # or there would be nothing to see


@pytest.mark.parametrize("frames_as", ["images", "video"])
def test_a_blind_question_to_an_endpoint_is_text(frames_as: Any) -> None:
    blind = blind_prompt(make_sample(), make_clip("qwen2_5_vl"), TextPrompts())
    body = chat_request("m", blind, frames_as, SamplingSettings(), 1, 0)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["text"]
    assert "media_io_kwargs" not in body


def test_a_blind_question_to_vllm_is_token_ids(checkpoint: Path) -> None:
    builder, clip = PromptBuilder(load_processor(checkpoint)), make_clip("qwen2_5_vl")
    blind = blind_prompt(make_sample(), clip, builder)
    ids = blind.input_ids.tolist()
    assert engine_input(blind, torch.bfloat16) == {"type": "token", "prompt_token_ids": ids}
    (ask,) = prompt_requests([blind], SamplingSettings(), None, limit=1000, stop_ids=[1])
    body = server_request(blind, ask.parameters, torch.bfloat16)
    assert body == {"token_ids": ids, "sampling_params": ask.parameters}
    assert len(visuals_of(builder.build(make_sample(), clip), torch.bfloat16)) == 1
