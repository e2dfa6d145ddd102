"""The in-process engine against `model.generate` and a plain forward, for all families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, has_timestamps, moving_square, tiny_model, tiny_processor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.rollouts import Rollout
from video_r1.models import lora
from video_r1.models.checked import Checked
from video_r1.models.group_forward import group_logprobs
from video_r1.models.lora import merged_adapters
from video_r1.rollout import engine, shared_prefix
from video_r1.rollout.engine import SamplingSettings, draw_tokens, sampling_logprobs
from video_r1.rollout.general import GeneralEngine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.sharded import whole_weights

PROCESSORS = {family: tiny_processor(family) for family in FAMILIES}
QUESTION = Sample(1, "Whither?", "video", "multiple choice", "<answer>B</answer>", "x", ("A. up", "B. left"))
SHORT = Sample(2, "How many?", "image", "numerical", "<answer>1</answer>", "x")


def build_prompts(family: str) -> list[Prompt]:
    """A clip, an image and a shorter shuffled clip: three lengths, both modalities."""
    builder = PromptBuilder(PROCESSORS[family])
    size = 64 if has_timestamps(family) else 56
    frames = torch.from_numpy(moving_square(8, size, size)).permute(0, 3, 1, 2).contiguous()
    times = torch.arange(8, dtype=torch.float64) / 2
    return [
        builder.build(QUESTION, Media(frames, times, 4.0, "video")),
        builder.build(SHORT, Media(frames[3:4], times[:1], 0.0, "image")),
        builder.build(QUESTION, Media(frames[:4], times[:4], 3.3, "video"), torch.tensor([2, 0, 3, 1])),
    ]


def build_model(family: str, stop_share: float = 0.0) -> Any:
    """The tiny model with log-probs of a usual size, about -6; besides the usual end tokens, `stop_share` of
    its vocabulary ends a completion."""
    model: Any = tiny_model(family, PROCESSORS[family].tokenizer)
    with torch.no_grad():
        model.lm_head.weight /= 4
    if stop_share:
        extra = list(range(0, 380, round(1 / stop_share)))
        model.generation_config.eos_token_id = model.generation_config.eos_token_id + extra
    return model


def reference_inputs(prompt: Prompt) -> dict[str, torch.Tensor]:
    features = dict(prompt.features)
    features["mm_token_type_ids"] = features["mm_token_type_ids"][None]
    ids = prompt.input_ids[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **features}


def teacher_forced(model: Any, prompt: Prompt, tokens: torch.Tensor) -> torch.Tensor:
    """[L, V] logits of the positions that predict `tokens`, by a plain forward of prompt and completion."""
    inputs = reference_inputs(prompt)
    zeros = torch.zeros_like(tokens)
    added = {"input_ids": tokens, "attention_mask": zeros + 1, "mm_token_type_ids": zeros}
    for name, values in added.items():
        inputs[name] = torch.cat([inputs[name], values[None]], 1)
    with torch.no_grad():
        return model(**inputs).logits[0, len(prompt.input_ids) - 1 : -1].float()


def assert_same(first: Sequence[Sequence[Rollout]], second: Sequence[Sequence[Rollout]]) -> None:
    for group, other in zip(first, second, strict=True):
        for rollout, twin in zip(group, other, strict=True):
            assert rollout.token_ids.tolist() == twin.token_ids.tolist()
            torch.testing.assert_close(rollout.logprobs, twin.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str, n: int = 3) -> None:
    model, prompts = build_model(family, stop_share=0.02), build_prompts(family)
    engine = TransformersEngine(model, PROCESSORS[family])
    groups = engine.sample(prompts, SamplingSettings(n=n, temperature=0, max_tokens=24))
    for prompt, group in zip(prompts, groups, strict=True):
        output = model.generate(**reference_inputs(prompt), max_new_tokens=24, do_sample=False)
        expected = output[0, len(prompt.input_ids) :].tolist()
        assert [rollout.token_ids.tolist() for rollout in group] == [expected] * n


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_a_plain_forward(family: str, temperature: float = 0.6, top_p: float = 0.9) -> None:
    model, prompts = build_model(family, stop_share=0.02), build_prompts(family)
    engine = TransformersEngine(model, PROCESSORS[family])
    settings = SamplingSettings(n=4, temperature=temperature, top_p=top_p, max_tokens=16, seed=3)
    visual = {PROCESSORS[family].image_token_id, PROCESSORS[family].video_token_id}
    compared = 0
    for prompt, group in zip(prompts, engine.sample(prompts, settings), strict=True):
        for rollout in group:
            if visual & set(rollout.token_ids.tolist()):
                continue  # the plain forward would look for its pixels
            logits = teacher_forced(model, prompt, rollout.token_ids)
            logprobs = sampling_logprobs(logits, temperature, top_p)
            expected = logprobs.gather(1, rollout.token_ids[:, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, expected, atol=1e-5, rtol=0)
            assert rollout.logprobs.dtype == torch.float32
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_those_of_the_update(family: str) -> None:
    """Also for a clip so long that its time positions reach beyond the prompt's text."""
    model, prompts = build_model(family), build_prompts(family)
    (media,) = prompts[0].media
    long_clip = Media(media.frames, media.timestamps * 300, 1200.0, "video")
    prompts.append(PromptBuilder(PROCESSORS[family]).build(QUESTION, long_clip))
    engine = TransformersEngine(model, PROCESSORS[family])
    settings = SamplingSettings(n=3, max_tokens=12, seed=5)
    groups = engine.sample(prompts, settings)
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    with torch.no_grad():
        scored = group_logprobs(model, prompts, completions)
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group])
    torch.testing.assert_close(sampled, scored.logprobs, atol=1e-5, rtol=0)
    assert_same(groups, engine.sample(prompts, settings))  # the update leaves the model usable


def test_finished_completions_leave_the_batch() -> None:
    model, prompts = build_model("qwen2_5_vl", stop_share=0.1), build_prompts("qwen2_5_vl")
    engine = TransformersEngine(model, PROCESSORS["qwen2_5_vl"])
    sizes: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    groups = engine.sample(prompts, SamplingSettings(n=8, max_tokens=30, seed=1))
    hook.remove()
    lengths = [len(rollout.token_ids) for group in groups for rollout in group]
    assert len(set(lengths)) > 4
    assert sizes[0] == 3 and sizes[1:] == sorted(sizes[1:], reverse=True)
    for step, size in enumerate(sizes[1:], start=1):  # after `step` tokens
        running = sum(length > step for length in lengths)
        assert 0.875 * size < running <= size
    stop = set(model.generation_config.eos_token_id)
    for rollout in (rollout for group in groups for rollout in group):
        ids = rollout.token_ids.tolist()
        assert not stop & set(ids[:-1])
        assert rollout.finish_reason == ("stop" if ids[-1] in stop else "length")
        assert rollout.finish_reason == "stop" or len(ids) == 30


def test_completions_do_not_depend_on_the_batch() -> None:
    model, prompts = build_model("qwen3_vl", stop_share=0.05), build_prompts("qwen3_vl")
    settings = SamplingSettings(n=4, max_tokens=20, seed=11)
    together = TransformersEngine(model, PROCESSORS["qwen3_vl"]).sample(prompts, settings)
    for sequences, prefilled in ((4, 1), (256, 150)):
        narrow = TransformersEngine(model, PROCESSORS["qwen3_vl"], sequences)
        narrow.max_prefill_tokens = prefilled
        assert_same(together, narrow.sample(prompts, settings))


def test_counts_by_prompt() -> None:
    """Prompts may have counts of their own; equal ones give what `n` gives."""
    model, prompts = build_model("qwen2_5_vl", stop_share=0.05), build_prompts("qwen2_5_vl")
    engine = TransformersEngine(model, PROCESSORS["qwen2_5_vl"])
    settings = SamplingSettings(n=2, max_tokens=12, seed=4)
    assert_same(engine.sample(prompts, settings), engine.sample(prompts, settings, [2, 2, 2]))
    ragged = engine.sample(prompts, settings, [5, 0, 3])
    assert [len(group) for group in ragged] == [5, 0, 3]
    narrow = TransformersEngine(model, PROCESSORS["qwen2_5_vl"], max_sequences=4)
    assert_same(ragged, narrow.sample(prompts, settings, [5, 0, 3]))
    assert_same([ragged[0][:2]], engine.sample(prompts[:1], settings))
    with pytest.raises(ValueError, match="3 prompts but 1 counts"):
        engine.sample(prompts, settings, [2])


def test_seeds() -> None:
    model, prompts = build_model("qwen2_vl"), build_prompts("qwen2_vl")[:1]
    engine = TransformersEngine(model, PROCESSORS["qwen2_vl"])

    def tokens(seed: int | None) -> list[list[int]]:
        settings = SamplingSettings(n=4, max_tokens=12, seed=seed)
        return [rollout.token_ids.tolist() for rollout in engine.sample(prompts, settings)[0]]

    first = tokens(1)
    assert len({tuple(ids) for ids in first}) == 4
    assert first == tokens(1) and first != tokens(2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    unseeded = tokens(None)
    assert unseeded != tokens(None)
    torch.set_rng_state(state)
    assert unseeded == tokens(None)
    state = torch.get_rng_state()
    tokens(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("weights", "threads"), [(engine.WEIGHTS_PER_THREAD, 1), (1, 2)])
def test_small_models_decode_with_one_thread(
    weights: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would wait for each other after every small product."""
    model, seen = build_model("qwen2_5_vl"), set()
    model.lm_head.register_forward_hook(lambda *given: seen.add(torch.get_num_threads()))
    monkeypatch.setattr(engine, "WEIGHTS_PER_THREAD", weights)
    torch.set_num_threads(2)
    try:
        for kind in (TransformersEngine, GeneralEngine):
            sampler = kind(model, PROCESSORS["qwen2_5_vl"])
            sampler.sample(build_prompts("qwen2_5_vl")[1:2], SamplingSettings(n=2, max_tokens=3, seed=1))
            assert seen == {threads} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_model_is_left_as_it_was() -> None:
    model, prompts = build_model("qwen2_5_vl"), build_prompts("qwen2_5_vl")
    engine = TransformersEngine(model, PROCESSORS["qwen2_5_vl"])
    settings = SamplingSettings(n=2, max_tokens=8, seed=2)
    before = engine.sample(prompts, settings)
    model.gradient_checkpointing_enable()
    model.train()
    model.model.visual.eval()
    training = [module.training for module in model.modules()]
    attention = model.model.language_model.config._attn_implementation
    assert_same(before, engine.sample(prompts, settings))
    assert training == [module.training for module in model.modules()]
    assert model.model.language_model.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())


def test_merged_adapters_sample_the_same_and_leave_the_model_alone() -> None:
    """Also where there is no memory for merged copies; layers in 4 bits are no `nn.Linear` and stay."""
    torch.manual_seed(0)
    adapted: Any = get_peft_model(
        build_model("qwen2_5_vl"), LoraConfig(target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    engine = TransformersEngine(adapted, PROCESSORS["qwen2_5_vl"])
    prompts, settings = build_prompts("qwen2_5_vl"), SamplingSettings(n=2, max_tokens=8, seed=3)
    layers = {name: id(module) for name, module in adapted.named_modules()}
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with merged_adapters(engine.model):
        assert not any("lora" in name for name, _ in engine.model.named_parameters())
    merged = engine.sample(prompts, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "has_memory_for", lambda weights: False)
        assert_same(engine.sample(prompts, settings), merged)
    assert {name: id(module) for name, module in adapted.named_modules()} == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.parametrize("broken", ["fails", "differs"])
def test_recorded_steps_check_themselves(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, with a recording that fails, or gives other logits."""
    plain = shared_prefix.plain_step
    fast = shared_prefix._replayed if broken == "fails" else lambda *given: plain(*given) + 1
    checked = Checked("decoding by a CUDA graph", fast, plain)
    engine = TransformersEngine(build_model("qwen2_5_vl", stop_share=0.1), PROCESSORS["qwen2_5_vl"])
    prompts, settings = build_prompts("qwen2_5_vl"), SamplingSettings(n=3, max_tokens=8, seed=1)
    expected = engine.sample(prompts, settings)
    monkeypatch.setattr(shared_prefix, "RECORDED_ON", ("cpu",))
    monkeypatch.setattr(shared_prefix, "replayed_step", checked)
    assert_same(engine.sample(prompts, settings), expected)
    assert checked.agrees is False and caplog.text.count("the plain path is used") == 1


class FakeGraphs:
    """CUDA graphs on the CPU: a recording runs its step, a replay runs it again. `failing`: recordings that
    run out of memory, and leave their stream current as torch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: Sequence[int] = ()) -> None:
        self.failing, self.modes, self.free = failing, [], True
        self.stream = "main"
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace())
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(shared_prefix, "RECORDED_ON", ("cpu",))
        monkeypatch.setattr(shared_prefix, "_record", self.recorded(shared_prefix._record))

    @contextmanager
    def graph(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        self.modes.append(capture_error_mode)
        self.stream = "recording"
        yield
        if len(self.modes) in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.stream = "main"

    def recorded(self, record: Any) -> Any:
        def wrapped(tokens: Any, position: Any, cache: Any, step: Any) -> Any:
            self.free &= cache.recording is None
            found = record(tokens, position, cache, step)
            again = lambda: found.logits.copy_(step(found.tokens, found.position, cache))  # noqa: E731
            found.graph.replay = again
            return found

        return wrapped


@pytest.mark.parametrize(("family", "failing"), [("qwen2_5_vl", ()), ("qwen3_5", ()), ("qwen3_5", (2,))])
def test_recordings(
    family: str, failing: Sequence[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One for each shape, with room for 256 tokens at first; one that fails later ends no run."""
    engine = TransformersEngine(build_model(family, stop_share=0.1), PROCESSORS[family])
    prompts, settings = build_prompts(family), SamplingSettings(n=3, max_tokens=40, seed=1)
    expected = engine.sample(prompts, settings)
    graphs = FakeGraphs(monkeypatch, failing)
    assert_same(engine.sample(prompts, settings), expected)
    assert set(graphs.modes) == {"thread_local"} and graphs.stream == "main" and graphs.free
    assert len(graphs.modes) == 2 if failing else len(graphs.modes) > 2
    assert caplog.text.count("decoding by a CUDA graph fails with OutOfMemoryError") == len(failing)
    assert shared_prefix.first_capacity("cuda") == 256


@pytest.mark.usefixtures("process_group")
def test_fsdp_runs_no_hooks_while_it_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fork streams, and a decoding step with such a fork cannot be recorded as a CUDA graph."""
    prompts, settings = build_prompts("qwen2_5_vl"), SamplingSettings(n=2, max_tokens=6, seed=1)
    model = build_model("qwen2_5_vl")
    expected = TransformersEngine(model, PROCESSORS["qwen2_5_vl"]).sample(prompts, settings)
    calls: list[int] = []
    before = FSDPState._pre_forward
    monkeypatch.setattr(FSDPState, "_pre_forward", lambda *given: calls.append(1) or before(*given))
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model.model.language_model.layers, model):
        fully_shard(part, mesh=mesh)
    accelerator: Any = None  # FSDP2 needs none
    for _ in range(2):
        with whole_weights(model, accelerator):
            calls.clear()
            engine = TransformersEngine(model, PROCESSORS["qwen2_5_vl"])
            assert_same(engine.sample(prompts, settings), expected)
            assert calls == []
        model(**reference_inputs(prompts[0])).logits.sum().backward()
        assert len(calls) == 3


def test_keys_are_kept_in_the_number_format_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under mixed precision rotation gives them in float32, twice the memory of the values."""
    model, prompts = build_model("qwen2_5_vl"), build_prompts("qwen2_5_vl")
    kept: set[torch.dtype] = set()
    plain = shared_prefix.plain_step

    def looking(tokens: torch.Tensor, position: torch.Tensor, *rest: Any) -> torch.Tensor:
        pairs = [*rest[0].prefix.values(), *rest[0].room.values()]
        kept.update(part.dtype for pair in pairs for part in pair)
        return plain(tokens, position, *rest)

    monkeypatch.setattr(shared_prefix, "plain_step", looking)
    with torch.autocast("cpu", torch.bfloat16):
        TransformersEngine(model, PROCESSORS["qwen2_5_vl"]).sample(
            prompts, SamplingSettings(n=2, max_tokens=4, seed=4)
        )
    assert kept == {torch.bfloat16}


PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.5, 1.0, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),  # squared
        (1.0, 0.76, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (0.0, 0.5, [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_sampling_distribution(temperature: float, top_p: float, expected: list[float]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.tensor(PROBABILITIES).log()[order][None] + 5
    probabilities = sampling_logprobs(logits, temperature, top_p).exp()
    torch.testing.assert_close(probabilities, torch.tensor(expected)[order][None])


@pytest.mark.parametrize(
    ("probabilities", "number", "token"),
    [
        ([0.5, 0.25, 0.25], 0.0, 0),
        ([0.5, 0.25, 0.25], 0.5, 1),
        ([0.5, 0.25, 0.25], 1 - 2**-24, 2),
        ([0.0, 1.0, 0.0], 0.0, 1),
        ([0.0, 1.0, 0.0], 1 - 2**-24, 1),
        ([0.3, 0.3, 0.4 + 2e-7, 0.0], 1 - 2**-24, 2),
    ],
)
def test_draw_tokens(probabilities: list[float], number: float, token: int) -> None:
    assert draw_tokens(torch.tensor([probabilities]).log(), torch.tensor([number])).tolist() == [token]
