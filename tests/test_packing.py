"""The row's rule of who sees whom, as pieces and as a block mask, and the chunks of the head."""

from __future__ import annotations

import runpy
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.flex_attention import flex_attention_forward

from video_r1.models import attention, group_forward
from video_r1.models.attention import BLOCK, block_mask, group_spans, groups_attention_forward, row_layout


@pytest.mark.parametrize("rows", [1, 7])
def test_chunks_of_the_head(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk is larger than allowed; values and gradients do not depend on it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 50, bias=False)
    hidden, targets = torch.randn(23, 8, requires_grad=True), torch.randint(0, 50, (23,))
    targets[::3] = layer(hidden[::3]).argmax(-1)
    monkeypatch.setitem(group_forward.CHUNK_LOGITS, "cpu", rows * 50)
    monkeypatch.setattr(group_forward, "LEAST_ROWS", 1)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    logprobs, entropy, likeliest = group_forward.token_logprobs(
        layer, hidden, targets, 50, group_forward.Scoring(0.5, entropy=True, likeliest=True)
    )
    upstream = torch.randn(23)
    ours = torch.autograd.grad(logprobs, (hidden, layer.weight), upstream)
    assert max(seen) <= rows
    distribution = torch.distributions.Categorical(logits=hidden @ layer.weight.T / 0.5)
    expected = distribution.log_prob(targets)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, distribution.entropy())
    assert likeliest is not None and torch.equal(likeliest, distribution.probs.argmax(-1) == targets)
    for a, b in zip(ours, torch.autograd.grad(expected, (hidden, layer.weight), upstream), strict=True):
        torch.testing.assert_close(a, b)


def visible_by_hand(prompts: list[int], completions: list[list[int]]) -> Tensor:
    """[N, N] bool: the rule of the row, one token at a time."""
    names = [
        (group, member)
        for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True))
        for member, length in enumerate([prompt, *lengths])
        for _ in range(length)
    ]
    return torch.tensor(
        [
            [k <= q and names[k] in (names[q], (names[q][0], 0)) for k in range(len(names))]
            for q in range(len(names))
        ]
    )


ROWS = [([130, 300], [[5, 200, 0, 140], [64]]), ([260], [[30] * 5]), ([1, 1], [[], [3, 2]])]


@pytest.mark.parametrize(("prompts", "completions"), ROWS)
def test_block_mask(prompts: list[int], completions: list[list[int]]) -> None:
    """Every pair of the rule is kept, pairs outside are masked, and blocks without any are skipped."""
    expected = visible_by_hand(prompts, completions)
    mask = block_mask(group_spans(prompts, completions), torch.device("cpu"))
    indices = torch.arange(len(expected))
    rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), indices[:, None], indices[None])
    assert torch.equal(rule, expected)
    blocks = -(-len(expected) // BLOCK)
    padded = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[: len(expected), : len(expected)] = expected
    tiles = padded.view(blocks, BLOCK, blocks, BLOCK)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(3).any(1))
    full = torch.zeros(blocks, blocks, dtype=torch.bool)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        full[row, mask.full_kv_indices[0, 0, row, :count].long()] = True
    assert torch.equal(full, tiles.all(3).all(1))


@pytest.mark.parametrize(("prompts", "completions"), ROWS)
def test_flex_attention_agrees_with_the_pieces(prompts: list[int], completions: list[list[int]]) -> None:
    layout = row_layout(prompts, completions, torch.device("cpu"))
    q, k, v = (torch.randn(1, heads, layout.groups[-1].ends[-1], 16) for heads in (4, 2, 2))
    module: Any = torch.nn.Module()
    pieces, _ = groups_attention_forward(module, q, k, v, None, scaling=0.3, group_layout=layout)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible_by_hand(prompts, completions), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(pieces, expected.transpose(1, 2), atol=1e-5, rtol=0)
    mask = block_mask(group_spans(prompts, completions), torch.device("cpu"))
    with torch.compiler.set_stance("force_eager"):
        flex, _ = flex_attention_forward(module, q, k, v, mask, scaling=0.3)
    torch.testing.assert_close(flex, pieces, atol=1e-5, rtol=0)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """FlexAttention needs a C compiler and Python's headers: without them SDPA takes its place, with one
    warning."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(attention, "flex_attention_forward", fails)
    prompts, completions = ROWS[0]
    layout = row_layout(prompts, completions, torch.device("cpu"))
    on_gpu = replace(layout, block_mask=block_mask(group_spans(prompts, completions), torch.device("cpu")))
    states = q, k, v = [
        torch.randn(1, heads, layout.groups[-1].ends[-1], 16, requires_grad=True) for heads in (4, 2, 2)
    ]
    found = []
    for each in (layout, on_gpu, on_gpu):
        out, _ = groups_attention_forward(torch.nn.Module(), q, k, v, None, group_layout=each)
        found.append([out, *torch.autograd.grad(out.square().sum(), states)])
    for one, two in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
    assert caplog.text.count("FlexAttention fails with RuntimeError: Failed to find C compiler") == 1


def test_the_set_up_names_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(Path(__file__).parents[1] / "setup" / "check_cuda.py"))
    assert "install a C compiler (gcc) and Python's headers (python3." in capsys.readouterr().err
