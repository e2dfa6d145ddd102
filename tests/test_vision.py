"""The vision tower in few calls gives what transformers gives; fast paths that are broken are not taken."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from group_batches import build, make_prompt
from tiny_models import FAMILY_ROWS
from torch import Tensor

from benchmarks.launches import counted
from video_r1.data.prompts import Prompt
from video_r1.models import vision
from video_r1.models.checked import TOLERANCE, Checked, tolerance
from video_r1.models.group_forward import encode_vision
from video_r1.models.vision import attending_in_segments, attention_by_length


def prompts_of(family: str) -> list[Prompt]:
    """A clip and a picture whose windows have four lengths, and a question without either."""
    parts = [(3, ("video", (3, 12, 20)), 2), (("image", (1, 8, 10)), 2), (4,)]
    return [make_prompt(family, *part) for part in parts]


def transformers_own(model: Any, prompts: list[Prompt]) -> Tensor:
    """The features of all visuals as transformers computes them, from an untouched model."""
    kinds = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    found = [(p.features[a], p.features[b]) for p in prompts for a, b in kinds if a in p.features]
    pixels, grids = (torch.cat(parts) for parts in zip(*found, strict=True))
    output = model.model.get_image_features(pixels, grids, return_dict=True)
    layers = output.get("deepstack_features") or []
    return torch.cat([torch.cat(output.pooler_output), *map(torch.cat, layers)])


def few_calls(model: Any, prompts: list[Prompt]) -> Tensor:
    found = [part for part in encode_vision(model, prompts) if part is not None]
    layers = zip(*(part.deepstack for part in found), strict=True)
    return torch.cat([torch.cat([part.embeddings for part in found]), *map(torch.cat, layers)])


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_values_and_gradients_are_those_of_transformers(family: str) -> None:
    torch.manual_seed(0)
    plain = build(family)
    model, prompts = copy.deepcopy(plain), prompts_of(family)
    expected, found = transformers_own(plain, prompts), few_calls(model, prompts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    weights = torch.randn_like(expected)
    for result in (expected, found):
        (result * weights).sum().backward()
    for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            assert two.grad is not None
            torch.testing.assert_close(
                two.grad, one.grad, rtol=1e-4, atol=1e-4 * float(one.grad.abs().max()), msg=name
            )
    assert "forward" not in vars(model.model.visual.patch_embed.proj)
    assert model.model.visual.config._attn_implementation == "sdpa"


def test_attention_is_called_once_a_layer_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip of 16 frames as its length grows: transformers' calls grow, these do not."""
    model = build("qwen2_5_vl")
    few = [
        counted(lambda n=n: few_calls(model, [make_prompt("qwen2_5_vl", ("video", (n, 12, 20)))])).kernels
        for n in (2, 8)
    ]
    assert few[0] == few[1]


def test_another_attention_is_left_alone() -> None:
    model = build("qwen2_5_vl")
    model.model.visual.config._attn_implementation = "eager"
    prompts = prompts_of("qwen2_5_vl")
    torch.testing.assert_close(
        few_calls(model, prompts), transformers_own(model, prompts), rtol=1e-5, atol=2e-5
    )
    assert model.model.visual.config._attn_implementation == "eager"


# ---- Fast paths that check themselves


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this device")


@pytest.mark.parametrize(
    ("fast", "said"),
    [
        (failing, "fails with RuntimeError: no kernel for this device"),
        (lambda x: 2.01 * x, "is off by 0.01"),
        (lambda x: x + x.detach(), "is off by 0.5"),  # right values, wrong gradients
        (lambda x: x * float("nan"), "is off by inf"),
    ],
)
def test_a_broken_fast_path_is_not_taken(fast: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    path = Checked("doubling", fast, doubled)
    x = torch.randn(5, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (gradient,) = torch.autograd.grad(path(x).sum(), [x])
            assert torch.equal(gradient, torch.full((5,), 2.0))
    assert [record.message for record in caplog.records if said in record.message]
    assert len(caplog.records) == 1


def test_a_fast_path_that_agrees_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def fast(x: Tensor) -> Tensor:
        calls.append(x)
        return x + x

    path = Checked("doubling", fast, doubled)
    x = torch.randn(5)
    assert [path(x).equal(2 * x) for _ in range(3)] == [True] * 3 and len(calls) == 4
    assert not caplog.text
    only = Checked("doubling", fast, failing)  # no engine for the plain one
    assert only(x).equal(2 * x)
    assert "doubling is used unchecked: the plain path fails here (no kernel for this device)" in caplog.text


def test_gradients_are_compared_when_they_are_first_needed(caplog: pytest.LogCaptureFixture) -> None:
    """A rollout comes before the first update: the values are right there, the gradients wrong later."""
    path = Checked("doubling", lambda x: x + x.detach(), doubled)
    x = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        assert path(x).equal(2 * x) and path.agrees and not caplog.text
    (gradient,) = torch.autograd.grad(path(x).sum(), [x])
    assert gradient.equal(torch.full((5,), 2.0)) and "doubling is off by" in caplog.text


def test_rounding_is_no_disagreement() -> None:
    """A gradient of a float32 weight has gone through bf16 where autocast is on: the plain path is as far
    from the truth as the fast one."""
    weight, patches = torch.randn(3, 3), torch.randn(4, 3)
    assert tolerance([weight]) == TOLERANCE and tolerance([weight, weight.bfloat16()]) == 3 * 2**-7
    with torch.autocast("cpu", torch.bfloat16):
        assert tolerance([weight]) == 3 * 2**-7
        path = Checked("a product", lambda x, w: 1.01 * (x @ w), torch.matmul)
        path(patches, weight.requires_grad_())
    assert path.agrees and path.gradients_agree


def test_broken_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As on a GPU whose variable-length attention fails: the tower's values stay, also when recomputed."""
    torch.manual_seed(0)
    plain = build("qwen2_5_vl")
    model, prompts = copy.deepcopy(plain), prompts_of("qwen2_5_vl")
    packed = Checked("variable-length attention", failing, attention_by_length)
    monkeypatch.setattr(vision, "attention_by_length", packed)
    model.model.visual.gradient_checkpointing_enable()
    model.train()
    with caplog.at_level(logging.WARNING), attending_in_segments(model.model.visual):
        found = few_calls(model, prompts)
        found.sum().backward()
    torch.testing.assert_close(found, transformers_own(plain, prompts), rtol=1e-5, atol=2e-5)
    assert packed.agrees is False and caplog.text.count("variable-length attention") == 1
