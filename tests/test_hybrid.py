"""Models with Gated DeltaNet layers: a prompt's state is made once and forked, and gradients flow back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from group_batches import build, expanded_logprobs, make_prompt, tokens_of
from test_group_forward import assert_same_gradients, gradients
from test_rollout_transformers import PROCESSORS, assert_same, build_model, build_prompts
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from video_r1.models import gated_delta
from video_r1.models.attention import fork_layout, group_spans
from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine

CLIP = ("video", (2, 4, 4))


def test_fork_layout_by_hand() -> None:
    """Two groups in a row of 10 tokens, and a convolution over 3.

    token   0 1 2 3 4 5 6 7 8 9
            P P P c c d|Q Q e e
    """
    layout = fork_layout(group_spans([3, 2], [[2, 1], [2, 0]]), 3, torch.device("cpu"))
    # The shorter prompt stands first and repeats its last token; its state belongs to group 1.
    assert [part.tolist() for part in layout.prompts] == [[[6, 7, 7], [0, 1, 2]]]
    assert [part.tolist() for part in layout.in_prompts] == [[[True, True, False], [True] * 3]]
    assert layout.states.tolist() == [1, 0]
    assert [part.tolist() for part in layout.completions] == [[[5, 5], [3, 4], [8, 9]]]
    assert [part.tolist() for part in layout.forks] == [[0, 0, 1]]
    flat = [6, 7, 7, 0, 1, 2, 5, 5, 3, 4, 8, 9]
    assert [flat[place] for place in layout.back.tolist()] == list(range(10))
    none = 10  # two predecessors, then the segment itself
    expected = [none, none, 0, 1, 2, 1, 2, 3, 4, 1, 2, 5, none, none, 6, 7, 6, 7, 8, 9, 6, 7]
    assert layout.inputs.tolist() == expected
    assert [expected[place] for place in layout.outputs.tolist()] == list(range(10))


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_a_prompt_shorter_than_the_convolution(family: str) -> None:
    model = build(family)
    prompts = [make_prompt(family, 1), make_prompt(family, 2), make_prompt(family, 70)]
    completions = [tokens_of(6, 2), tokens_of(1, 5), tokens_of(3, 80)]
    expected = torch.cat(
        [expanded_logprobs(model, p, c, 1.0)[0] for p, c in zip(prompts, completions, strict=True)]
    )
    weights = torch.randn(len(expected))
    result = group_logprobs(model, prompts, completions).logprobs
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    ours = gradients(model, result, weights)
    assert_same_gradients(ours, gradients(model, expected, weights))


def test_the_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens through the rule of a row: the prompt and the completions, and not a prompt for each of them."""
    model = build("qwen3_5")
    prompt, completions = make_prompt("qwen3_5", 100), tokens_of(*[9] * 8)
    group_logprobs(model, [prompt], [completions])  # puts the functions in place
    seen: list[tuple[int, int]] = []
    rule = getattr(modeling_qwen3_5, gated_delta.RULE).__wrapped__

    def counting(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[0], query.shape[1]))
        return rule(query, *args, **kwargs)

    monkeypatch.setattr(modeling_qwen3_5, gated_delta.RULE, gated_delta.forked_rule(counting))
    group_logprobs(model, [prompt], [completions])
    assert seen == [(1, 100), (8, 8)] * 2


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_hybrid_completions_do_not_depend_on_the_batch(family: str) -> None:
    """Prompts of three lengths are prefilled apart, and completions that end take their states with them."""
    model, prompts = build_model(family, stop_share=0.05), build_prompts(family)
    settings = SamplingSettings(n=4, max_tokens=20, seed=11)
    together = TransformersEngine(model, PROCESSORS[family]).sample(prompts, settings)
    assert len({len(rollout.token_ids) for group in together for rollout in group}) > 3
    narrow = TransformersEngine(model, PROCESSORS[family], max_sequences=4)
    assert_same(together, narrow.sample(prompts, settings))
    assert_same(
        together[1:2],
        TransformersEngine(model, PROCESSORS[family]).sample(prompts, settings, [0, 4, 0])[1:2],
    )
    prefills: list[tuple[int, ...]] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: prefills.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    twins = [prompts[0], prompts[2], prompts[0]]
    TransformersEngine(model, PROCESSORS[family]).sample(twins, SamplingSettings(n=2, max_tokens=1, seed=1))
    hook.remove()
    short, long = sorted({len(prompt.input_ids) for prompt in twins})
    assert prefills == [(1, short), (2, long)]  # equal lengths together
