"""What is handed to vLLM, checked without vLLM: weights by name, positions, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, tiny_model, tiny_processor
from torch import nn
from vllm_prompts import clip_prompts

from video_r1.data.rollouts import Rollout
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.lab.model import base_folder
from video_r1.models.loading import add_lora, load_model, load_processor
from video_r1.rollout.engine import SamplingSettings, stop_token_ids
from video_r1.rollout.engine_factory import training_engine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm import engine as vllm_engine
from video_r1.rollout.vllm.engine import VLLMEngine
from video_r1.rollout.vllm.mrope import prompt_positions
from video_r1.rollout.vllm.requests import prompt_requests
from video_r1.rollout.vllm.server import ServerEngine
from video_r1.rollout.vllm.weight_sync import checkpoint_weights
from video_r1.settings.frames import FrameBudget
from video_r1.settings.vllm import MAX_BATCHED_TOKENS, EngineSettings
from video_r1.training.tgrpo import TGRPOTrainer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_by_its_name(family: str) -> None:
    model = tiny_model(family, tiny_processor(family).tokenizer)
    weights = dict(checkpoint_weights(nn.DataParallel(model)))
    expected = model.state_dict()
    assert set(weights) == set(expected)
    for name in (name for name in weights if family == "qwen3_vl_moe" and ".experts." in name):
        expected[name] = expected[name].transpose(1, 2)  # as published, and as vLLM takes it
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_a_tied_head_is_sent() -> None:
    model: Any = load_model(base_folder(), "float32")
    weights = dict(checkpoint_weights(model))
    torch.testing.assert_close(weights["lm_head.weight"], model.get_input_embeddings().weight.detach())


def test_adapters_are_merged_and_the_model_left_alone() -> None:
    torch.manual_seed(0)
    plain = load_model(base_folder(), "float32")
    model = add_lora(plain, rank=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = dict(checkpoint_weights(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload().state_dict()
    assert set(weights) == set(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-5)


def test_modules_that_peft_saves_whole() -> None:
    base: Any = tiny_model("qwen2_vl", tiny_processor("qwen2_vl").tokenizer)
    names = set(base.state_dict())
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = get_peft_model(base, config)
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1)
    weights = dict(checkpoint_weights(model))
    assert set(weights) == names
    torch.testing.assert_close(weights["lm_head.weight"], head.modules_to_save["default"].weight.detach())


@pytest.mark.parametrize("grid", [(8, 4, 6), (2, 12, 4)])
@pytest.mark.parametrize("seconds", [0.7, 30.0])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_are_those_of_transformers(family: str, grid: tuple[int, int, int], seconds: float) -> None:
    processor = tiny_processor(family)
    model: Any = tiny_model(family, processor.tokenizer)
    times, rows, columns = grid[0], grid[1] // 2, grid[2] // 2
    kinds = torch.tensor([0] * 5 + [2] * (times * rows * columns) + [0] * 7)
    given: dict[str, Any] = {"video_grid_thw": torch.tensor([grid])}
    factor = 1.0
    if family == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([seconds])
        factor = float(torch.tensor(seconds)) * model.config.vision_config.tokens_per_second
    ids = torch.zeros_like(kinds)
    expected, _ = model.model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], **given)

    def visuals(features: Any) -> Iterator[tuple[int, int, int, int, float]]:
        yield 5, times, rows, columns, factor

    found, delta = prompt_positions(SimpleNamespace(iter_mm_grid_thw=visuals), ids.tolist(), [])
    assert found.tolist() == expected[:, 0].tolist()
    assert len(ids) + delta == int(found[:, -1].max()) + 1


def test_completions_that_are_missing_are_not_made_up() -> None:
    """Two where four were asked for are an error; only the greedy one stands for all."""
    prompt = clip_prompts(tiny_processor("qwen2_5_vl"))[0]
    rollouts = [Rollout(torch.tensor([token]), torch.zeros(1), "", "stop") for token in range(4)]
    (ask,) = prompt_requests([prompt], SamplingSettings(n=4, max_tokens=8), None, 1024, [])
    assert ask.filled(rollouts) == rollouts
    for given in (rollouts[:2], rollouts[:1], []):
        with pytest.raises(VideoR1Error, match=f"gave {len(given)} completions of 4"):
            ask.filled(given)
    (greedy,) = prompt_requests([prompt], SamplingSettings(n=4, temperature=0, max_tokens=8), None, 1024, [])
    assert greedy.filled(rollouts[:1]) == rollouts[:1] * 4
    with pytest.raises(VideoR1Error, match="gave 4 completions of 1"):
        greedy.filled(rollouts)


def test_without_vllm_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vLLM cannot be imported"):
        VLLMEngine(base_folder(), load_processor(base_folder()))


def test_weights_that_are_shared_out_are_not_read_when_the_engine_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under ZeRO-3 a parameter is empty outside of `whole_weights`."""
    calls: list[str] = []
    llm = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=512, dtype=torch.float32),
        collective_rpc=lambda name, **kwargs: calls.append(name),
    )
    monkeypatch.setattr(vllm_engine, "_start", lambda arguments: llm)
    processor = tiny_processor("qwen2_5_vl")
    model = tiny_model("qwen2_5_vl", processor.tokenizer)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    engine = VLLMEngine(model, processor, max_model_len=512)
    assert calls == [] and engine.stop_ids == stop_token_ids(model.generation_config, processor)


def engine_without_vllm(heard: Callable[..., Any]) -> VLLMEngine:
    """`heard` is called in place of each method of vLLM's `LLM`, by name and arguments."""

    class LLM:
        llm_engine = SimpleNamespace(reset_encoder_cache=lambda: None, add_request=lambda *given: "0")

        def __getattr__(self, name: str) -> Any:
            return lambda *given, **named: heard(name, *given, *named.values()) or [1]

    engine = VLLMEngine.__new__(VLLMEngine)
    engine.llm, engine.tokenizer = LLM(), tiny_processor("qwen2_vl").tokenizer
    engine.max_model_len, engine.stop_ids, engine._neighbours = 4096, [], None
    engine._sleep, engine._asleep = True, False
    return engine


def test_memory_goes_back_once_and_weights_come_before_the_next_rollouts() -> None:
    """Sleep of level 2 needs a GPU; here vLLM is replaced by what it is asked for."""
    calls: list[tuple[Any, ...]] = []
    engine = engine_without_vllm(lambda *call: calls.append(call[:2]))
    engine.rest()
    engine.rest()
    assert calls == [("sleep", 2)]
    engine.update_weights(tiny_model("qwen2_vl", engine.tokenizer))
    woken = [("wake_up", ["weights"]), ("collective_rpc", "reload_weights"), ("wake_up", ["kv_cache"])]
    assert calls[1:4] == woken and engine._asleep is False
    engine._sleep = False
    engine.rest()
    assert engine._asleep is False and calls[-1] != ("sleep", 2)


@pytest.mark.vllm
def test_vllm_computes_without_the_trainers_autocast() -> None:
    seen: list[bool] = []
    engine = engine_without_vllm(lambda *call: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        engine.update_weights(tiny_model("qwen2_vl", engine.tokenizer))
        engine.sample([], SamplingSettings())
        assert torch.is_autocast_enabled("cpu")
    assert seen and not any(seen)


def test_what_vllm_reserves_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many sequences as a step samples, and the tokens that `plan` counts."""
    told: list[dict[str, Any]] = []
    llm = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512, dtype=torch.float32))
    monkeypatch.setattr(vllm_engine, "_start", lambda arguments: told.append(arguments) or llm)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    processor = tiny_processor("qwen2_5_vl")
    model, budget = tiny_model("qwen2_5_vl", processor.tokenizer), FrameBudget()
    settings = EngineSettings(engine="vllm")
    training_engine(model, processor, settings, longest=512, sequences=12, frames=budget)
    assert (told[0]["max_num_seqs"], told[0]["max_num_batched_tokens"]) == (12, MAX_BATCHED_TOKENS)
    assert "vLLM starts" in capsys.readouterr().err


@pytest.mark.parametrize("has_own_weights", [True, False])
def test_gathered_weights_are_freed_before_vllm_samples(has_own_weights: bool) -> None:
    events: list[str] = []

    @contextmanager
    def gathered() -> Iterator[str]:
        events.append("gather")
        yield "model"
        events.append("free")

    engine = SimpleNamespace(
        has_own_weights=has_own_weights,
        update_weights=lambda model: events.append("sync"),
        rest=lambda: events.append("rest"),
    )
    trainer: Any = SimpleNamespace(engine=engine, whole_policy=gathered)
    with TGRPOTrainer.synced_engine(trainer):
        events.append("sample")
    sampled = ["free", "sample"] if has_own_weights else ["sample", "free"]
    assert events == ["gather", "sync", *sampled, "rest"]
    assert VLLMEngine.has_own_weights and ServerEngine.has_own_weights
    assert not TransformersEngine.has_own_weights
