"""The table of families, against tiny models of each and docs/models.md."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from group_batches import build
from test_group_forward import assert_same_gradients, expanded_batch, gradients, one_batch
from tiny_models import FAMILIES, FAMILY_ROWS

from video_r1.errors import ConfigError
from video_r1.models.families import FAMILIES as KNOWN
from video_r1.models.families import family_of, text_of, tower_of
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import EXPERTS, add_lora
from video_r1.models.lora import add_adapters
from video_r1.rollout.vllm.weight_sync import checkpoint_weights

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def rows_of(header: str) -> list[list[str]]:
    """The cells of the table that begins with this one."""
    table = DOCUMENT.read_text(encoding="utf-8").partition(f"| {header} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_every_family_has_a_file_a_row_and_a_tiny_model() -> None:
    rows = {row[0].strip("`"): row[1] for row in rows_of("`model_type`")}
    assert rows == {kind: family.name for kind, family in KNOWN.items()}
    assert set(rows) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_the_parts_of_a_family_are_where_its_file_says(family: str) -> None:
    model = build(family)
    assert family_of(model) is family_of(model.config) is KNOWN[family]
    assert text_of(model) is model.model.language_model and tower_of(model) is model.model.visual
    has_states = any("linear_attn" in name for name, _ in model.named_modules())
    assert (family_of(model).state_functions is not None) == has_states
    assert family_of(model).windows == hasattr(model.model.visual, "window_size")
    assert family_of(model).resampled_positions == hasattr(model.model.visual, "num_grid_per_side")


def test_an_unknown_family_is_named_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigError, match=r"Linear cannot take .* use Qwen2.5-VL, Qwen2-VL, Qwen3.5, Qwen3.5-M"
    ):
        family_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_lora_of_a_familys_experts(family: str) -> None:
    """Named, the tensors of all experts are adapted, an adapter for each; the row equals separate rows, and
    vLLM is handed what a merged checkpoint has."""
    torch.manual_seed(0)
    model: Any = add_lora(build(family), rank=2, targets=["q_proj", *EXPERTS])
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len([name for name in adapted if ".experts" in name]) == 2 * 3
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts, completions = one_batch(family)
    weights = torch.randn(30)
    expected = expanded_batch(model, prompts, completions)
    result = group_logprobs(model, prompts, completions).logprobs
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    ours = gradients(model, result, weights)
    assert_same_gradients(ours, gradients(model, expected, weights))
    assert all(float(ours[name].abs().max()) > 0 for name in ours if ".experts." in name)
    handed = dict(checkpoint_weights(model))
    added = copy.deepcopy(model)
    add_adapters(added)
    saved = added.unload().state_dict()
    merged = model.merge_and_unload().state_dict()  # PEFT's own sum
    assert handed.keys() == saved.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-6, msg=name)
        turned = family == "qwen3_vl_moe" and ".experts." in name  # as published
        found = handed[name].transpose(1, 2) if turned else handed[name]
        torch.testing.assert_close(found, weight, rtol=0, atol=1e-6, msg=name)
    with pytest.raises(ConfigError, match=r"lora_dropout is 0\.1; adapters of experts\.down_proj need"):
        add_lora(build(family), dropout=0.1, targets=["experts.down_proj"])
