"""The group in one row against the expanded batch: each completion behind its own copy of the prompt."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from group_batches import VIDEO, build, expanded_logprobs, make_prompt, tokens_of
from tiny_models import FAMILY_ROWS, HYBRID
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from video_r1.data.prompts import Prompt
from video_r1.errors import ConfigError, PromptError
from video_r1.models import gated_delta
from video_r1.models.families import FAMILIES
from video_r1.models.group_forward import attending_in_rows, encode_vision, group_logprobs, prompt_positions
from video_r1.models.loading import add_lora, freeze_vision

torch.set_num_threads(1)


def gradients(model: torch.nn.Module, logprobs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    ours: dict[str, Tensor], reference: dict[str, Tensor], relative: float = 1e-4
) -> None:
    assert ours.keys() == reference.keys()
    largest = max(float(g.norm()) for g in reference.values())
    for name, expected in reference.items():
        error = float((ours[name] - expected).norm())
        assert error <= relative * float(expected.norm()) + 1e-7 * largest, name


VIDEO_A = ("video", (3, 4, 4))
VIDEO_B = ("video", (2, 2, 6))
IMAGE_A = ("image", (1, 4, 6))
BATCHES = {
    "text only, one group": [((11,), (3, 6))],
    "videos, images and text, groups of one and ragged ones, completions of several buckets": [
        ((5, VIDEO_A, 7), (4, 1, 9, 3)),
        ((2, IMAGE_A, 3), (7, 2, 5)),
        ((9,), (3,)),
        ((1, VIDEO_B, 6), (1, 1, 12)),
        ((2, VIDEO_B, 1, VIDEO_A, 2), (4, 6, 2)),
        ((2, IMAGE_A, 1), (70, 3, 140, 66, 1, 64, 65)),
    ],
}


@pytest.mark.parametrize("family", FAMILY_ROWS)
@pytest.mark.parametrize("case", BATCHES)
def test_equals_the_expanded_batch(family: str, case: str) -> None:
    model = build(family)
    prompts = [make_prompt(family, *parts) for parts, _ in BATCHES[case]]
    completions = [tokens_of(*lengths) for _, lengths in BATCHES[case]]
    reference = [expanded_logprobs(model, p, c, 0.7) for p, c in zip(prompts, completions, strict=True)]
    expected = torch.cat([logprobs for logprobs, _ in reference])
    weights = torch.randn(len(expected))
    expected_gradients = gradients(model, expected, weights)

    result = group_logprobs(model, prompts, completions, temperature=0.7, with_entropy=True)

    assert result.lengths.tolist() == [len(tokens) for group in completions for tokens in group]
    torch.testing.assert_close(result.logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.entropy, torch.cat([e for _, e in reference]), atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, result.logprobs, weights), expected_gradients)


def one_batch(family: str) -> tuple[list[Prompt], list[list[Tensor]]]:
    """A video with three ragged completions and an image with two."""
    prompts = [make_prompt(family, 4, VIDEO_A, 3), make_prompt(family, 2, IMAGE_A, 5)]
    return prompts, [tokens_of(5, 9, 2), tokens_of(7, 7)]


def expanded_batch(
    model: Any, prompts: list[Prompt], completions: list[list[Tensor]], temperature: float = 1.0
) -> Tensor:
    pairs = zip(prompts, completions, strict=True)
    return torch.cat([expanded_logprobs(model, p, c, temperature)[0] for p, c in pairs])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = build(family).train()
    prompts, completions = one_batch(family)
    weights = torch.randn(30)
    plain = gradients(model, group_logprobs(model, prompts, completions).logprobs, weights)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attending_in_rows(model):
        result = group_logprobs(model, prompts, completions).logprobs
        assert_same_gradients(gradients(model, result, weights), plain, relative=1e-6)
    with pytest.raises(CheckpointError):  # layers that run again outside must not attend in another way
        gradients(model, group_logprobs(model, prompts, completions).logprobs, weights)
    torch.testing.assert_close(result, expanded_batch(model, prompts, completions), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_lora(family: str) -> None:
    model = add_lora(build(family), rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1 if family in HYBRID else 0.3)
    prompts, completions = one_batch(family)
    weights = torch.randn(30)
    expected = expanded_batch(model, prompts, completions)
    result = group_logprobs(model, prompts, completions).logprobs
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, result, weights), gradients(model, expected, weights))
    with model.disable_adapter(), torch.no_grad():
        reference = group_logprobs(model, prompts, completions).logprobs
        torch.testing.assert_close(reference, expanded_batch(model, prompts, completions), atol=1e-5, rtol=0)
    assert float((reference - result.detach()).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_close_to_float32_as_the_expanded_batch(family: str, autocast: bool) -> None:
    model = build(family)
    prompts, completions = one_batch(family)
    exact = expanded_batch(model, prompts, completions).detach()
    model.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = group_logprobs(model, prompts, completions).logprobs
        expanded = expanded_batch(model, prompts, completions)
    result.sum().backward()
    assert result.dtype == torch.float32
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    errors = [float((found.detach() - exact).abs().mean()) for found in (result, expanded)]
    assert 0 < errors[0] < 2 * errors[1]


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_a_frozen_tower_runs_once_for_all_policies(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    freeze_vision(model)
    prompts, completions = one_batch(family)
    expected = group_logprobs(model, prompts, completions).logprobs
    calls = []
    tower = model.model.visual.forward
    monkeypatch.setattr(model.model.visual, "forward", lambda *a, **k: calls.append(1) or tower(*a, **k))
    shared = encode_vision(model, prompts)
    assert len(calls) == 1  # for images and videos together
    for _ in range(2):
        result = group_logprobs(model, prompts, completions, vision_features=shared).logprobs
        torch.testing.assert_close(result, expected, atol=0, rtol=0)
    # Any part of the batch can be scored with its part of the features.
    part = group_logprobs(model, prompts[1:], completions[1:], vision_features=shared[1:]).logprobs
    torch.testing.assert_close(part, expected[16:], atol=1e-5, rtol=0)
    assert len(calls) == 1
    weights = torch.randn(30)
    trained = gradients(model, result, weights)
    assert not any("visual" in name for name in trained) and any("q_proj" in name for name in trained)


def test_positions_by_hand() -> None:
    """2 text tokens, start, 2 frames of one token 1.5 s apart at 2 positions a second, end, 1 text token."""
    model = build("qwen2_5_vl")
    prompt = make_prompt("qwen2_5_vl", 2, ("video", (2, 2, 2), 1.5), 1)
    positions, after = prompt_positions(model, prompt)
    assert positions.tolist() == [[0, 1, 2, 3, 6, 4, 5], [0, 1, 2, 3, 3, 4, 5], [0, 1, 2, 3, 3, 4, 5]]
    assert after == 6


def functions_of(family: str) -> list[Any]:
    """The functions of transformers that a row replaces."""
    module = FAMILIES[family].state_functions
    names = (gated_delta.CONVOLUTION, gated_delta.RULE) if module else ()
    return [getattr(import_module(str(module)), name) for name in names]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_generation_between_updates_is_unchanged(family: str) -> None:
    model = build(family)
    configs = model.config.text_config, model.config.vision_config
    functions = functions_of(family)
    prompt = make_prompt(family, 3, VIDEO_A, 2)
    before = model.generate(prompt.input_ids[None], **prompt.features, max_new_tokens=5, do_sample=False)
    for _ in range(2):
        group_logprobs(model, [prompt], [tokens_of(4, 4)])
    assert {part._attn_implementation for part in configs} == {"sdpa"} and functions_of(family) == functions
    after = model.generate(prompt.input_ids[None], **prompt.features, max_new_tokens=5, do_sample=False)
    assert torch.equal(before, after)
    assert "video_r1" not in model.config.to_json_string()  # nor in a checkpoint


def test_a_sampled_placeholder_is_an_ordinary_token() -> None:
    model = build("qwen2_5_vl")
    prompt = make_prompt("qwen2_5_vl", 3, VIDEO_A, 2)
    completions = tokens_of(5, 4)
    completions[0][2] = VIDEO
    other = completions[1].clone()
    result = group_logprobs(model, [prompt], [[*completions, other]]).logprobs
    torch.testing.assert_close(result[5:9], result[9:], atol=1e-6, rtol=0)
    expected, _ = expanded_logprobs(model, prompt, [other], 1.0)
    torch.testing.assert_close(result[9:], expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("process_group")
def test_through_a_distributed_wrapper() -> None:
    """DDP reduces gradients only after a forward pass of its own, so scoring has to go through it."""
    model = build("qwen2_5_vl")
    prompts, completions = one_batch("qwen2_5_vl")
    expected = gradients(model, group_logprobs(model, prompts, completions).logprobs, torch.ones(30))
    reduced = []

    def halve(state, bucket):  # DDP compares annotations with its own types, so there are none
        reduced.append(1)
        done = torch.futures.Future()
        done.set_result(bucket.buffer() / 2)
        return done

    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(None, halve)
    result = group_logprobs(wrapped, prompts, completions).logprobs
    halved = gradients(model, result, torch.ones(30))
    assert reduced
    assert_same_gradients({name: 2 * grad for name, grad in halved.items()}, expected, relative=1e-6)
    assert type(model).forward is type(build("qwen2_5_vl")).forward and "forward" not in model.__dict__


def test_refuses() -> None:
    model = build("qwen2_5_vl")
    prompts, completions = one_batch("qwen2_5_vl")
    with pytest.raises(ValueError, match="2 prompts and 1 groups"):
        group_logprobs(model, prompts, completions[:1])
    with pytest.raises(PromptError, match="prompt 1: 6 visual placeholders but 0 visual features"):
        group_logprobs(model, prompts, completions, vision_features=[encode_vision(model, prompts)[0], None])
    with pytest.raises(ConfigError, match="Linear is no decoder-only vision-language model"):
        group_logprobs(torch.nn.Linear(2, 2), prompts, completions)
    model.config.text_config.layer_types[1] = "sliding_attention"
    with pytest.raises(ConfigError, match="sliding-window"):
        group_logprobs(model, prompts, completions)
    text = build("qwen2_5_vl").train()
    text.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        group_logprobs(text, prompts, completions)
