"""The general path: models that are not in `models/families.py`, against their own forward and `generate`."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from general_models import GENERAL, GENERAL_ROWS, general_model, general_processor
from test_group_forward import assert_same_gradients, gradients
from test_rollout_transformers import assert_same
from tiny_models import moving_square
from torch import Tensor

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import TOKEN_FEATURES, Prompt, PromptBuilder
from video_r1.errors import ConfigError
from video_r1.models import general_forward
from video_r1.models.general_forward import placeholder_ids
from video_r1.models.group_forward import encode_vision, group_logprobs
from video_r1.models.loading import add_lora, freeze_vision
from video_r1.rollout.engine import SamplingSettings, draw_tokens, prompt_seeds, sampling_logprobs
from video_r1.rollout.engine_factory import in_process_engine
from video_r1.rollout.general import GeneralEngine

PROCESSORS = {family: general_processor(family) for family in GENERAL}
QUESTION = Sample(1, "Whither?", "video", "multiple choice", "<answer>B</answer>", "x", ("A. up", "B. left"))
SHORT = Sample(2, "How many?", "image", "numerical", "<answer>1</answer>", "x")


def build(family: str) -> Any:
    return general_model(family, PROCESSORS[family])


def build_prompts(family: str) -> list[Prompt]:
    """A clip, an image, a shorter clip in another order, and a question without visuals."""
    builder = PromptBuilder(PROCESSORS[family])
    frames = torch.from_numpy(moving_square(8, 56, 84)).permute(0, 3, 1, 2).contiguous()
    times = torch.arange(8, dtype=torch.float64) / 2
    clip = Media(frames, times, 4.0, "video")
    return [
        builder.build(QUESTION, clip),
        builder.build(SHORT, Media(frames[3:4], times[:1], 0.0, "image")),
        builder.build(QUESTION, Media(frames[:4], times[:4], 3.3, "video"), torch.tensor([2, 0, 3, 1])),
        builder.build(QUESTION, clip, torch.empty(0, dtype=torch.long), "blind"),
    ]


def completions_of(*lengths: int) -> list[Tensor]:
    return [torch.randint(0, 300, (length,)) for length in lengths]


def plain_logits(model: Any, prompt: Prompt, tokens: Tensor) -> Tensor:
    """[L, V] logits that predict `tokens`, by the model's forward on this one row with its pixels."""
    ids = torch.cat([prompt.input_ids, tokens])[None]
    features = dict(prompt.features)
    if "mm_token_type_ids" in features:
        kinds = torch.cat([features["mm_token_type_ids"], torch.zeros_like(tokens)])
        features["mm_token_type_ids"] = kinds[None]
    if "num_frames_per_video" in features:  # transformers 5.19 does not hand it on to its own function
        count, encode = features["num_frames_per_video"], model.model.get_video_features
        model.model.get_video_features = functools.partial(encode, num_frames_per_video=count)
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits
    finally:
        model.model.__dict__.pop("get_video_features", None)
    logits = logits[0, len(prompt.input_ids) - 1 : -1].float()
    return logits.index_fill(-1, torch.tensor(placeholder_ids(model.config)), -torch.inf)


def plain_logprobs(
    model: Any, prompts: list[Prompt], completions: list[list[Tensor]], temperature: float = 1.0
) -> Tensor:
    return torch.cat(
        [
            (plain_logits(model, prompt, tokens) / temperature)
            .log_softmax(-1)
            .gather(1, tokens[:, None])[:, 0]
            for prompt, group in zip(prompts, completions, strict=True)
            for tokens in group
        ]
    )


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_equals_a_plain_forward_of_each_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients, entropies; groups of unequal lengths, cut into micro-batches, videos and images."""
    torch.manual_seed(0)
    model, prompts = build(family), build_prompts(family)
    completions = [completions_of(4, 1, 9, 3), completions_of(7, 2), completions_of(5), completions_of(2, 6)]
    monkeypatch.setattr(general_forward, "MICRO_BATCH_TOKENS", 3 * (len(prompts[0].input_ids) + 4))
    expected = plain_logprobs(model, prompts, completions, 0.7)
    weights = torch.randn(len(expected))
    expected_gradients = gradients(model, expected, weights)
    result = group_logprobs(model, prompts, completions, temperature=0.7, with_entropy=True)
    assert result.lengths.tolist() == [len(tokens) for group in completions for tokens in group]
    torch.testing.assert_close(result.logprobs, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, result.logprobs, weights), expected_gradients)
    assert result.entropy is not None and bool(result.entropy.isfinite().all())
    towers = [name for name in expected_gradients if "vision" in name or "visual" in name]
    assert any(float(expected_gradients[name].abs().max()) > 0 for name in towers)


def text_name(model: Any) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_decoder())


def text_rows(model: Any) -> list[int]:
    """A list to which each forward of the text model adds its rows."""
    seen: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_towers_run_once_a_question_and_the_head_where_it_predicts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = build(family), build_prompts(family)[:2]
    freeze_vision(model)
    towers, head = [], []
    model.get_encoder("image").register_forward_hook(lambda *given: towers.append(1))
    model.lm_head.register_forward_hook(lambda module, inputs, out: head.append(tuple(out.shape[:2])))
    rows = text_rows(model)
    limit = 3 * (len(prompts[0].input_ids) + 9)
    monkeypatch.setattr(general_forward, "MICRO_BATCH_TOKENS", limit)
    completions = [completions_of(4, 1, 9, 3), completions_of(7)]
    shared = encode_vision(model, prompts)
    assert len(towers) == 2
    expected = group_logprobs(model, prompts, completions, vision_features=shared).logprobs
    assert len(towers) == 2
    assert rows == [3, 1, 1] and head == [(3, 9), (1, 1), (1, 7)]  # the longest first
    result = group_logprobs(model, prompts, completions).logprobs
    assert len(towers) == 4
    torch.testing.assert_close(result, expected, atol=0, rtol=0)
    trained = gradients(model, result, torch.ones(len(result)))
    text = {name for name, _ in model.get_decoder().named_parameters(prefix=text_name(model))}
    assert trained.keys() == text | ({"lm_head.weight"} & dict(model.named_parameters()).keys())


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_pixels_where_a_forward_takes_no_features(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models with a Q-Former, or without `mm_encoder_outputs` and `logits_to_keep`."""
    model, prompts = build(family), build_prompts(family)
    if family == "gemma4":  # whose forward takes no pixels of a clip in transformers 5.19
        prompts = [prompts[1], prompts[3]] * 2
    completions = [completions_of(4, 6), completions_of(7, 2), completions_of(5), completions_of(2, 6)]
    expected = group_logprobs(model, prompts, completions).logprobs
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **inputs: forward(input_ids, **inputs))
    assert encode_vision(model, prompts) == [None] * 4
    result = group_logprobs(model, prompts, completions).logprobs
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_lora(family: str) -> None:
    """Every linear layer of the text model has adapters, and no other has."""
    model = add_lora(build(family), rank=2)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    text = model.get_base_model().get_decoder()
    linear = [name for name, module in text.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == len(linear) and {name.rpartition(".")[2] for name in linear} >= {
        "q_proj",
        "down_proj",
    }
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts, completions = build_prompts(family)[:2], [completions_of(4, 6), completions_of(7, 2)]
    inner, weights = model.get_base_model(), torch.randn(19)
    expected = plain_logprobs(inner, prompts, completions)
    result = group_logprobs(model, prompts, completions).logprobs
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, result, weights), gradients(model, expected, weights))
    engine = in_process_engine(model, PROCESSORS[family])
    (sampled,) = engine.sample(prompts[:1], SamplingSettings(n=3, max_tokens=6, seed=1))
    with torch.no_grad():
        scored = group_logprobs(model, prompts[:1], [[rollout.token_ids for rollout in sampled]]).logprobs
    found = torch.cat([rollout.logprobs for rollout in sampled])
    torch.testing.assert_close(found, scored, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="lora_vision_tower: the layers to adapt in the tower of"):
        add_lora(build(family), vision_tower=True)


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_greedy_equals_generate(family: str) -> None:
    model, prompts = build(family), build_prompts(family)
    engine = in_process_engine(model, PROCESSORS[family])
    assert isinstance(engine, GeneralEngine)
    heard: list[tuple[int, int, int]] = []
    groups = engine.sample(
        prompts,
        SamplingSettings(n=2, temperature=0, max_tokens=12),
        on_token=lambda *said: heard.append(said),
    )
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        features = {name: value[None] if name in TOKEN_FEATURES else value
                    for name, value in prompt.features.items()}  # fmt: skip
        ids = prompt.input_ids[None]
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **features, max_new_tokens=12,
            do_sample=False, suppress_tokens=placeholder_ids(model.config),
        )  # fmt: skip
        expected = output[0, len(prompt.input_ids) :].tolist()
        assert [rollout.token_ids.tolist() for rollout in group] == [expected] * 2
        for row in range(2):
            assert [token for *place, token in heard if place == [number, row]] == expected
    assert model.generation_config.eos_token_id == PROCESSORS[family].tokenizer.eos_token_id  # its own again


@pytest.mark.parametrize("family", GENERAL_ROWS)
def test_logprobs_equal_those_of_the_update(family: str) -> None:
    """Sampled ones, and completions that end at different places; the same with other neighbours."""
    model, prompts = build(family), build_prompts(family)
    model.generation_config.eos_token_id = list(range(0, 380, 10))
    engine = GeneralEngine(model, PROCESSORS[family], max_sequences=3)
    settings = SamplingSettings(n=4, temperature=0.8, max_tokens=16, seed=5)
    groups = engine.sample(prompts, settings)
    lengths = {len(rollout.token_ids) for group in groups for rollout in group}
    assert len(lengths) > 3 and {r.finish_reason for group in groups for r in group} == {"stop", "length"}
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    assert not {token for group in completions for ids in group for token in ids.tolist()} & set(
        placeholder_ids(model.config)
    )
    with torch.no_grad():
        scored = group_logprobs(model, prompts, completions, temperature=0.8)
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group])
    # Beyond 1e-5 only the rounding of float32, larger for unlikely tokens (Gemma: 1.5e-5 at -5.3).
    torch.testing.assert_close(sampled, scored.logprobs, atol=1e-5, rtol=2e-6)
    seeds = tuple(prompt_seeds(5, 4))
    numbers = torch.rand(4, 16, generator=torch.Generator().manual_seed(seeds[0]))  # as the fast engine's
    for row, rollout in zip(numbers, groups[0], strict=True):
        with torch.no_grad():
            chances = sampling_logprobs(plain_logits(model, prompts[0], rollout.token_ids), 0.8)
        assert torch.equal(draw_tokens(chances, row[: len(chances)]), rollout.token_ids)
    alone = GeneralEngine(model, PROCESSORS[family]).sample(
        prompts[2:3], SamplingSettings(n=4, temperature=0.8, max_tokens=16, seed=seeds[2:3])
    )
    assert_same(alone, groups[2:3])


def test_a_placeholder_is_never_sampled() -> None:
    """However likely it is; the update gives the same log-probabilities."""
    model, prompts = build("internvl"), build_prompts("internvl")[:1]
    (image,) = placeholder_ids(model.config)
    with torch.no_grad():
        model.lm_head.weight[image] = 100 * model.lm_head.weight[5]
    engine = in_process_engine(model, PROCESSORS["internvl"])
    (group,) = engine.sample(prompts, SamplingSettings(n=8, max_tokens=12, seed=1))
    assert all(image not in rollout.token_ids for rollout in group)
    scored = group_logprobs(model, prompts, [[rollout.token_ids for rollout in group]]).logprobs
    sampled = torch.cat([rollout.logprobs for rollout in group])
    torch.testing.assert_close(sampled, scored.detach(), atol=1e-5, rtol=0)
