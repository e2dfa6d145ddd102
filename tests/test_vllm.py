"""vLLM in this process against the trained model, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_vllm_families import check_sampling
from vllm_prompts import (
    change,
    check_weight_sync,
    clip_prompts,
    differences,
    ids,
    lab_prompts,
)

from video_r1.data.prompts import Prompt
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout.engine import SamplingSettings, sampling_logprobs
from video_r1.rollout.vllm.engine import VLLMEngine

pytestmark = pytest.mark.vllm  # the first test is the fast suite's canary


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(base_folder())


@pytest.fixture
def engine(vllm_engine: VLLMEngine) -> VLLMEngine:
    return vllm_engine


@pytest.fixture
def model(engine: VLLMEngine) -> Any:
    """The model that the engine holds the weights of."""
    model = load_model(base_folder(), "float32")
    engine.update_weights(model)
    return model


@pytest.fixture(scope="module")
def prompts(processor: Any) -> list[Prompt]:
    return clip_prompts(processor)


@SLOW
@pytest.mark.usefixtures("model")
def test_a_prompt_is_prefilled_once(
    engine: VLLMEngine, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []  # of each forward
    inner = engine.llm.apply_model(lambda model: model)[0].language_model.model
    forward = inner.forward

    def counted(*given: Any, **named: Any) -> Any:
        inputs = [*given, named.get("input_ids"), named.get("inputs_embeds")]
        tokens.append(next(len(value) for value in inputs if value is not None))
        return forward(*given, **named)

    monkeypatch.setattr(inner, "forward", counted)
    n, size = 8, len(prompts[0].input_ids)
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    assert size > 2 * block and size % block
    engine.sample(prompts[:1], SamplingSettings(n=n, max_tokens=4, seed=0))
    # The others repeat what fills no whole block, and then each has one token a forward.
    assert tokens[0] == size + (n - 1) * (size % block)
    assert 0 < max(tokens[1:]) <= n


@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=SLOW)], ids=["all weights", "LoRA"])
def test_logprobs_before_and_after_the_weight_sync(
    engine: VLLMEngine, model: Any, prompts: list[Prompt], peft: bool
) -> None:
    check_weight_sync(engine, model, prompts, peft)


@SLOW
def test_all_kinds_of_prompts(engine: VLLMEngine, model: Any, processor: Any) -> None:
    check_sampling(engine, model, processor)


@SLOW
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (0.0, 1.0)])
def test_logprobs_are_those_of_the_sampled_distribution(
    engine: VLLMEngine, model: Any, prompts: list[Prompt], temperature: float, top_p: float
) -> None:
    change(model, 0.2)  # a less certain model, so that the cut-offs matter
    engine.update_weights(model)
    settings = SamplingSettings(3, temperature, top_p, max_tokens=12, seed=3)
    for prompt, group in zip(prompts, engine.sample(prompts, settings), strict=True):
        for rollout in group:
            tokens, size = rollout.token_ids, len(prompt.input_ids)
            kinds = torch.cat([prompt.features["mm_token_type_ids"], torch.zeros_like(tokens)])
            features = {**prompt.features, "mm_token_type_ids": kinds[None]}
            row = torch.cat([prompt.input_ids, tokens])[None]
            with torch.no_grad():
                logits = model(input_ids=row, attention_mask=torch.ones_like(row), **features).logits
            expected = sampling_logprobs(logits[0, size - 1 : -1], temperature, top_p)
            found = expected.gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, found, atol=1e-2, rtol=0)
            assert rollout.logprobs.dtype == torch.float32


@SLOW
@pytest.mark.usefixtures("model")
def test_seeds_and_counts(engine: VLLMEngine, prompts: list[Prompt]) -> None:
    settings = SamplingSettings(n=4, max_tokens=16, seed=5)
    twins = [prompts[0], prompts[0]]
    first = ids(engine.sample(twins, settings))
    assert first == ids(engine.sample(twins, settings))
    assert first != ids(engine.sample(twins, replace(settings, seed=6)))
    assert first[0] != first[1]
    counted = ids(engine.sample(twins + [prompts[2]], settings, counts=[4, 0, 2]))
    assert [len(group) for group in counted] == [4, 0, 2] and counted[0] == first[0]
    torch.manual_seed(0)
    drawn = ids(engine.sample(twins, replace(settings, seed=None)))
    assert drawn != ids(engine.sample(twins, replace(settings, seed=None)))
    torch.manual_seed(0)
    assert drawn == ids(engine.sample(twins, replace(settings, seed=None)))


@SLOW
def test_more_prompts_than_one_step_takes(
    engine: VLLMEngine, model: Any, processor: Any, tmp_path: Any
) -> None:
    """Sixteen questions in both orders, as a step of the lab's recipe has them: no prompt may be split."""
    prompts = lab_prompts(tmp_path, processor, 32)
    counts = [8] * 16 + [4] * 16
    config = engine.llm.llm_engine.vllm_config
    sizes, block = [len(prompt.input_ids) for prompt in prompts], config.cache_config.block_size
    # Every completion but a prompt's first repeats what fills no whole block.
    tokens = sum(size + (n - 1) * (size % block) for size, n in zip(sizes, counts, strict=True))
    assert tokens > config.scheduler_config.max_num_batched_tokens
    groups = engine.sample(prompts, SamplingSettings(max_tokens=4, seed=1), counts)
    assert [len(group) for group in groups] == counts
    assert differences(model, prompts, groups).max() < 1e-3
