"""Each family in vLLM: the trainer's tokens and pixels, and its log-probs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, HYBRID, has_timestamps, tiny_model, tiny_processor
from vllm_prompts import check_weight_sync, clip_prompts, rare_prompts, several_prompts

from video_r1.data.prompts import Prompt
from video_r1.errors import ConfigError
from video_r1.files import warn_once
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.vllm.engine import VLLMEngine
from video_r1.rollout.vllm.requests import engine_input, server_request, visual_blocks, visuals_of
from video_r1.rollout.vllm.serve import cpu_options
from video_r1.training.preflight import sampler_difference, warn_of_difference

# Of log-probs, the mean and the largest. In bfloat16 a token may go to another expert than the trainer's.
ROUNDING = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.05, 2.0)}


def model_of(family: str) -> Any:
    """In the number format that vLLM computes in without a GPU: bfloat16 where layers have a state."""
    model: Any = tiny_model(family, tiny_processor(family).tokenizer, for_vllm=True)
    return model.bfloat16() if family in HYBRID else model


def prompts_of(processor: Any) -> list[Prompt]:
    first, *clips = clip_prompts(processor)
    return [first, *clips, *several_prompts(processor), *clips[-1:], *rare_prompts(processor)]


def patches(calls: Sequence[dict[str, Any]]) -> set[bytes]:
    """The pixels of all visuals, patch by patch."""
    found = [call[name] for call in calls for name in ("pixel_values", "pixel_values_videos") if name in call]
    return {row.tobytes() for row in torch.cat(found).view(torch.uint8).numpy()}


def check_received(prompts: Sequence[Prompt], calls: Sequence[dict[str, Any]], dtype: torch.dtype) -> None:
    """What the model's tower was given is the trainer's own, bit by bit."""
    given = [{name: pixels.to(dtype) for name, pixels in prompt.features.items()} for prompt in prompts]
    assert patches(calls) == patches(given)
    assert {value.dtype for call in calls for name, value in call.items() if "pixel" in name} == {dtype}


def checked(engine: Any, given: Prompt, scored: Prompt, model: Any) -> None:
    """The check before the first step, of an engine that is given another prompt than the trainer scores."""
    other: Any = SimpleNamespace(
        sample=lambda prompts, *rest: engine.sample([given] * len(prompts), *rest),
        update_weights=engine.update_weights,
    )
    warn_once.cache_clear()
    warn_of_difference(sampler_difference(other, model, [scored] * 4, 1.0))


def check_mismatch_is_found(engine: Any, model: Any, clip: Prompt, caplog: pytest.LogCaptureFixture) -> None:
    """By the check before the first step: other times in the prompt, and other pixels."""
    video = clip.features["pixel_values_videos"]
    darker = replace(clip, features={**clip.features, "pixel_values_videos": video - 1})
    ids = clip.input_ids.clone()
    for first, _ in visual_blocks(clip):
        ids[first - 3] += 1  # in the time before a patch, where there are times
    for prompt, same in ((clip, True), (darker, False), (replace(clip, input_ids=ids), False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checked(engine, prompt, clip, model)
        assert ("log-probs differ" in caplog.text) == (not same)


def check_sampling(engine: VLLMEngine, model: Any, processor: Any) -> None:
    """Compare pixels as the tower gets them, and log-probs before and after two weight syncs."""
    prompts = prompts_of(processor)
    engine.update_weights(model)
    calls: list[dict[str, Any]] = []
    inner = engine.llm.apply_model(lambda model: model)[0]
    embed = inner.embed_multimodal
    inner.embed_multimodal = lambda **given: calls.append(given) or embed(**given)
    engine.sample(prompts, SamplingSettings(n=2, max_tokens=1))
    del inner.embed_multimodal
    check_received(prompts, calls, model.dtype)
    check_weight_sync(engine, model, prompts, peft=False, rounding=ROUNDING[model.dtype])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])  # Qwen2.5-VL: test_vllm.py
def test_sampling_in_the_process(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = model_of(family), tiny_processor(family)
    engine = VLLMEngine(model, processor, max_model_len=1024, max_sequences=32)
    try:
        check_sampling(engine, model, processor)
        check_mismatch_is_found(engine, model, clip_prompts(processor)[0], caplog)
    finally:
        engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_visuals_of_a_prompt(family: str) -> None:
    """They fill the prompt's placeholders, in order; together their pixels are those of the prompt. What
    shows the same has the same digest, so that vLLM keeps its features."""
    prompts = prompts_of(tiny_processor(family))
    for prompt in prompts[:-1]:
        visuals = visuals_of(prompt, torch.float32)
        places = [place for visual in visuals for place in range(visual.first, visual.first + visual.length)]
        assert places == prompt.features["mm_token_type_ids"].nonzero().view(-1).tolist()
        grids = prompt.features[f"{prompt.media[0].kind}_grid_thw"]
        steps = int(grids[:, 0].sum())
        assert len(visuals) == (steps if has_timestamps(family) else len(grids))
        pixels = [tensor for visual in visuals for name, tensor in visual.tensors.items() if "pixel" in name]
        (expected,) = (tensor for name, tensor in prompt.features.items() if "pixel" in name)
        assert torch.equal(torch.cat(pixels), expected)
    clip, shuffled, *_, slow, _, frozen, blind = [
        [visual.digest for visual in visuals_of(prompt, torch.float32)] for prompt in prompts
    ]
    assert blind == [] and len(set(frozen)) == 1 and not set(clip) & set(shuffled)
    assert (clip == slow) == (family != "qwen2_5_vl")  # there the time is one of the visual's tensors


@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_is_sent_what_the_process_gets(family: str) -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item

    for prompt in prompts_of(tiny_processor(family))[:-1]:
        body = json.loads(json.dumps(server_request(prompt, {"n": 2}, torch.bfloat16)))
        given, sent = engine_input(prompt, torch.bfloat16), body["features"]
        assert body["token_ids"] == given["prompt_token_ids"] == prompt.input_ids.tolist()
        assert sent["mm_hashes"] == given["mm_hashes"]
        (kind,) = given["mm_placeholders"]
        for place, at, data, item in zip(
            sent["mm_placeholders"][kind], given["mm_placeholders"][kind],
            sent["kwargs_data"][kind], given["mm_kwargs"][kind], strict=True,
        ):  # fmt: skip
            assert place == {"offset": at.offset, "length": at.length}
            decoded: Any = decode_mm_kwargs_item(data)
            assert decoded.keys() == item.keys()
            assert all(torch.equal(decoded[name].data, item[name].data) for name in item)


def test_states_need_bfloat16_without_a_gpu() -> None:
    """Said before vLLM starts, which would fail at the first request."""
    config = model_of("qwen3_5").config
    assert cpu_options(config, "auto")["enable_prefix_caching"] is False
    with pytest.raises(ConfigError, match=r"dtype float32: without a GPU, .* Qwen3.5 in bfloat16 only; use"):
        cpu_options(config, "float32")
    assert "enable_prefix_caching" not in cpu_options(model_of("qwen3_vl").config, "float32")
