"""`video-r1 plan` against the peaks of real passes on the CPU.

Measured: every allocation and release of tensor memory that torch's profiler reports during one update
(policy with gradients, reference without, loss, backward) and during one rollout, added up to the most that
lived at once; and the bytes of weights, gradients and AdamW's states. The plan is for the same sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_process import run_processes
from measured_memory import (
    COMPLETIONS,
    NO_END,
    TEXT,
    model_of,
    most_at_once,
    question,
    tensor_bytes,
)
from test_distributed import FSDP2
from tgrpo_trainers import make_trainer, policy_of
from tiny_models import FAMILY_ROWS, tiny_checkpoint, tiny_model, tiny_tokenizer
from tiny_questions import write_manifest
from torch._subclasses.fake_tensor import FakeTensorMode

from video_r1.cli import main
from video_r1.errors import ConfigError
from video_r1.models.group_forward import attending_in_rows, group_logprobs
from video_r1.models.loading import add_lora, load_model
from video_r1.models.lora import is_four_bit
from video_r1.plan.fake_trace import LiveBytes, gated_delta_rule
from video_r1.plan.memory import MemoryPlan, memory_plan, sharding_of
from video_r1.recipe import Recipe, load_recipe
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.objective import surrogate_loss
from video_r1.training.reference import frozen_adapters, frozen_copy, starting_adapters

TOLERANCE = 0.05  # 15 % is what the plan promises


OF_ANY_STAGE: dict[str, Any] = {
    "model_name_or_path": "x", "train_manifest": "x", "output_dir": "x", "dtype": "float32", "bf16": False,
    "max_frames": 8, "frame_pixels": (4 * 28) ** 2, "image_pixels": 28**2,
}  # fmt: skip


def recipe_of(**overrides: Any) -> Recipe:
    """8 frames of 4 × 4 visual tokens, 8 completions of 48 tokens, 4 of them more with shuffled frames."""
    settings = {"max_completion_length": 48, "length_reward": 0.0, "temporal_rule": "margin"}
    return load_recipe("rl", None, {**OF_ANY_STAGE, **settings, **overrides})


def planned(model: Any, recipe: Recipe) -> MemoryPlan:
    return memory_plan(model.config, recipe, text_tokens=TEXT, device_type="cpu")


def test_a_reference_is_rounded_in_mixed_precision() -> None:
    """Save for embeddings and norms."""
    model = model_of(128, 4, 2048)
    exact = sum(weight.nbytes for weight in model.parameters())
    assert planned(model, recipe_of(bf16=True)).parts["reference"] < 0.8 * exact


def test_a_plan_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny_model("qwen2_vl", tiny_tokenizer()).config.save_pretrained(tmp_path)
    words = ["plan", "lab-tgrpo", "--model_config", str(tmp_path), "--gpu_memory"]
    assert main([*words, "80GB"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"shape of {tmp_path}; on one GPU\nrl of runs/lab-sft: 0.00 billion weights")
    assert "8 completions of up to 64" in text and "\nfits: " in text
    server = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", "http://127.0.0.1:1"]
    assert main([*words, "80GB", *server]) == 0
    text = capsys.readouterr().out
    assert "\n  weight sync  " in text
    assert main([*words, "1MB", "--max_completion_length", "32"]) == 1
    text = capsys.readouterr().out
    assert "\ndoes not fit: " in text
    assert text.endswith(
        "it does not fit 1 GPU of 0.001 GB; it fits with (peak, GiB):\n  none of the changes tried\n"
        "see video-r1 recipes for recipes by machine\n"
    )


def test_an_unknown_shape_is_refused_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "lab-tgrpo", "--model_config", str(tmp_path)]) == 2
    assert (
        "folder with the config.json of a model of the same shape in --model_config"
        in capsys.readouterr().err
    )


def test_frames_that_no_prompt_can_hold_are_refused() -> None:
    model = tiny_model("qwen2_5_vl", tiny_tokenizer())
    with pytest.raises(ConfigError, match="frames of a clip are 64 tokens, which max_prompt_length \\(64\\)"):
        memory_plan(model.config, recipe_of(max_prompt_length=64), device_type="cpu")


@pytest.mark.parametrize(
    ("training", "gpus", "kind", "shared"),
    [
        ({}, 1, None, (1, False, False, False)),
        ({}, 4, "fsdp2", (4, True, True, True)),
        ({"fsdp": "shard_grad_op"}, 2, None, (2, True, True, True)),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 8, None, (8, True, True, True)),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 8, "zero2", (8, False, True, True)),
    ],
)
def test_sharding_is_what_settings_and_options_say(
    training: dict[str, Any], gpus: int, kind: Any, shared: tuple[Any, ...]
) -> None:
    sharding = sharding_of(training, gpus, kind)
    assert (sharding.processes, sharding.weights, sharding.gradients, sharding.optimizer) == shared


@pytest.mark.parametrize("family", FAMILY_ROWS)
def test_every_family_has_a_plan(family: str) -> None:
    model = tiny_model(family, tiny_tokenizer())
    recipe = recipe_of(frame_pixels=(4 * 32) ** 2, image_pixels=(4 * 32) ** 2, gradient_checkpointing=True)
    plan = planned(model, recipe)
    assert plan.traced.parameters == sum(weight.numel() for weight in model.parameters())
    assert plan.parts["weights"] == tensor_bytes([*model.parameters(), *model.buffers()])
    assert set(plan.phases) == {"update", "optimizer step", "rollout"}
    assert plan.peak > plan.parts["weights"] + plan.parts["optimizer"] + plan.parts["activations"]


def test_a_layer_with_a_state_needs_what_its_kernel_needs() -> None:
    tokens, heads, keys, values = 130, 2, 8, 16  # three chunks of up to 64 tokens
    with FakeTensorMode() as mode:
        shapes = [(1, tokens, heads, size) for size in (keys, keys, values)] + [(1, tokens, heads)] * 2
        query, key, value, g, beta = (
            mode.from_tensor(torch.rand(shape)).requires_grad_() for shape in shapes
        )
        live = LiveBytes(1.0)
        with live:
            result, state = gated_delta_rule(query, key, value, g=g, beta=beta)
        assert state.shape == (1, heads, keys, values) and result.shape == value.shape
        kept = tokens * heads * (2 * keys + 64) * 4  # normalised queries and keys, products within chunks
        assert live.live == kept + 4 * (result.numel() + state.numel())
        states = 3 * heads * keys * values * 4
        assert live.peak == kept + states + tokens * heads * (keys + 2 * values) * 4


@pytest.mark.parametrize("lora", [False, True])
def test_the_plan_agrees_with_a_measured_rollout(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("video_r1.models.onednn.MOST_ARRANGED_BYTES", 0)  # copies that only a CPU makes
    model = model_of(128, 4, 2048)
    plan = planned(model, recipe_of(use_peft=lora, lora_r=16))
    policy: Any = add_lora(model, rank=16) if lora else model  # sampled with copies of weights, merged
    engine = TransformersEngine(policy, NO_END)
    sampling = SamplingSettings(n=8, max_tokens=48, seed=0)
    prompts = [question(), question()]  # ordered and shuffled

    def sample() -> None:
        engine.sample(prompts, sampling, [8, 4])

    sample()
    beyond = plan.phases["rollout"] - plan.phases["optimizer step"] + plan.parts["gradients"]
    assert beyond == pytest.approx(most_at_once(sample), rel=0.15)


@pytest.mark.parametrize(("completion", "room"), [(64, 64), (65, 128)])
def test_room_for_completions_is_doubled_when_it_is_used_up(completion: int, room: int) -> None:
    """A token has 4 layers × 2 (key, value) × 2 heads × 32 × 4 bytes; 2 prompts of 104, 12 completions."""
    plan = planned(model_of(128, 4, 2048), recipe_of(max_completion_length=completion))
    assert plan.row.prompt == 104
    assert plan.parts["KV cache"] == 2048 * (2 * 104 + 12 * room)


def test_bf16_weights_that_train_under_fsdp2_are_float32() -> None:
    """accelerate makes them so in mixed precision, not those below adapters."""
    model = tiny_model("qwen2_5_vl", tiny_tokenizer())
    sharding = sharding_of({"fsdp": "full_shard"}, 4)
    for lora in (False, True):
        plans = []
        for dtype in ("bfloat16", "float32"):
            recipe = recipe_of(bf16=True, use_peft=lora, dtype=dtype)
            plan = memory_plan(model.config, recipe, text_tokens=TEXT, device_type="cuda", sharding=sharding)
            plans.append([plan.parts[part] for part in ("weights", "gradients", "optimizer")])
        assert (plans[0] == plans[1]) == (not lora)


def test_a_server_is_handed_whole_weights() -> None:
    """All weights of the policy, gathered."""
    model = tiny_model("qwen2_5_vl", tiny_tokenizer())
    sharding = sharding_of({"fsdp": "full_shard"}, 4)
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:1"}
    recipe = recipe_of(**server)
    plan = memory_plan(model.config, recipe, text_tokens=TEXT, device_type="cpu", sharding=sharding)
    assert set(plan.phases) == {"update", "optimizer step", "weight sync"}
    always = sum(plan.parts[part] for part in ("weights", "optimizer", "reference"))
    assert plan.phases["weight sync"] - always >= tensor_bytes(model.parameters())


ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("training", "kind", "size"),
    [
        ({}, "zero3", 4),
        ({"deepspeed": ZERO3}, None, 2),
        ({"deepspeed": {**ZERO3, "data_types": {"grad_accum_dtype": "fp32"}}}, None, 4),
    ],
)
def test_gradients_of_bf16_weights_are_counted_as_they_are_added_up(
    training: dict[str, Any], kind: Any, size: int
) -> None:
    model = tiny_model("qwen2_5_vl", tiny_tokenizer())
    sharding = sharding_of(training, 4, kind)
    recipe = recipe_of(bf16=True)
    plan = memory_plan(model.config, recipe, text_tokens=TEXT, device_type="cpu", sharding=sharding)
    assert plan.parts["gradients"] == size * plan.traced.trainable // 4


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers; and for 4-bit weights their scales, one byte for 64 weights and one float32 for
    256 of these, whether or not they are buffers.
    """
    quantised: list[Any] = [layer.weight for layer in model.modules() if is_four_bit(layer)]
    states = [weight.quant_state for weight in quantised]
    scales = [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]
    return list({t.data_ptr(): t for t in [*model.parameters(), *model.buffers(), *scales]}.values())


@pytest.mark.parametrize(
    ("hidden", "layers", "checkpointing", "trained"),
    [
        (128, 4, False, "full"),
        (128, 4, True, "lora"),
        pytest.param(256, 6, True, "full", marks=pytest.mark.slow),
        pytest.param(128, 4, False, "qlora", marks=pytest.mark.slow),
    ],
)
def test_the_plan_agrees_with_a_measured_update(
    hidden: int, layers: int, checkpointing: bool, trained: str, tmp_path: Path
) -> None:
    lora, model = trained != "full", model_of(hidden, layers, 2048)
    recipe = recipe_of(
        gradient_checkpointing=checkpointing, use_peft=lora, lora_r=16, load_in_4bit=trained == "qlora"
    )
    plan = planned(model, recipe)
    if trained == "qlora":
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(tmp_path)
        model = load_model(tmp_path, load_in_4bit=True)
    policy: Any = add_lora(model, rank=16) if lora else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    alone: Any = SimpleNamespace(mixed_precision="no", is_fsdp2=False, state=None)
    reference = policy if lora else frozen_copy(model, alone)
    adapters = frozen_adapters(policy, torch.device("cpu")) if lora else {}
    policy.train()
    prompt = question()
    assert len(prompt.input_ids) == plan.row.prompt

    @attending_in_rows(policy)
    def update() -> None:
        result = group_logprobs(policy, [prompt], COMPLETIONS, with_entropy=True)
        with torch.no_grad(), starting_adapters(policy, adapters):
            judged = group_logprobs(reference, [prompt], COMPLETIONS).logprobs
        loss = surrogate_loss(
            result.logprobs, result.logprobs.detach(), torch.linspace(-1, 1, 8), result.lengths,
            normaliser=1.0, loss_type="grpo", beta=0.04, ref_logprobs=judged,
        ).loss  # fmt: skip
        loss.backward()

    update()  # what is made once only, such as tables of rotary angles
    policy.zero_grad(set_to_none=True)
    passes = most_at_once(update)
    learning = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning)
    optimizer.step()
    weights = tensor_bytes(weights_of(policy))
    states = sum(tensor_bytes(state.values()) for state in optimizer.state.values())
    frozen = adapters.values() if lora else [reference]
    copied = sum(tensor_bytes([*module.parameters(), *module.buffers()]) for module in frozen)

    assert plan.parts["weights"] == weights
    assert plan.parts["gradients"] == tensor_bytes([weight.grad for weight in learning])
    assert plan.parts["optimizer"] == pytest.approx(states, rel=1e-3)  # a step number a weight
    assert plan.parts["reference"] == copied
    beyond = plan.phases["update"] - plan.parts["weights"] - plan.parts["optimizer"] - plan.parts["reference"]
    assert beyond == pytest.approx(passes, rel=TOLERANCE)
    assert plan.phases["update"] == pytest.approx(weights + states + copied + passes, rel=TOLERANCE)


def test_the_plan_agrees_with_a_measured_teacher(tmp_path: Path) -> None:
    """A larger model that sees as many frames: weights, a scoring pass, and the plan's peak with it."""
    student, teacher = model_of(128, 4, 2048), model_of(256, 6, 2048)
    teacher.config.save_pretrained(tmp_path)
    plain = planned(student, recipe_of())
    plan = planned(student, recipe_of(teacher_model_name_or_path=str(tmp_path)))
    assert plan.teacher is not None
    assert plan.parts["teacher"] == tensor_bytes(teacher.parameters())
    prompt = question()

    @torch.no_grad()
    def score() -> None:
        group_logprobs(teacher, [prompt], COMPLETIONS, with_likeliest=True)

    score()
    assert plan.teacher.peak == pytest.approx(most_at_once(score), rel=2 * TOLERANCE)
    assert plan.phases["rollout"] == plain.phases["rollout"] + plan.parts["teacher"]
    more = planned(student, recipe_of(teacher_model_name_or_path="self", teacher_frames=16))
    assert more.teacher is not None and more.teacher.row.visual == 2 * more.row.visual
    assert more.parts["teacher"] == 0 and more.phases["update"] >= plain.phases["update"]


def test_the_plan_agrees_with_a_measured_update_of_sft() -> None:
    """Two questions with a response each, in one row."""
    model = model_of(128, 4, 2048)
    settings = {"max_response_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    plan = planned(model, load_recipe("sft", None, {**OF_ANY_STAGE, **settings}))
    prompts, responses = [question(), question()], [[COMPLETIONS[0][0].repeat(2)[:64]]] * 2
    assert len(responses[0][0]) == 64 and plan.row.tokens == 2 * (plan.row.prompt + 63)

    def update() -> None:
        result = group_logprobs(model.train(), prompts, responses, with_likeliest=True)
        (-result.logprobs.sum() / len(result.logprobs)).backward()

    update()
    model.zero_grad(set_to_none=True)
    beyond = plan.phases["update"] - plan.parts["weights"] - plan.parts["optimizer"]
    assert beyond == pytest.approx(most_at_once(update), rel=TOLERANCE)


def test_the_plan_agrees_with_the_trainers_optimizer(tmp_path: Path) -> None:
    """8 bits for most tensors; small ones and, by the Trainer's choice, the embeddings stay in float32."""
    pytest.importorskip("bitsandbytes")
    manifest = write_manifest(tmp_path)
    trainer = make_trainer(
        tiny_checkpoint("qwen2_5_vl", tmp_path / "model"), str(manifest), tmp_path / "run",
        optim="adamw_8bit", max_steps=1, save_strategy="no", per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    optimizer: Any = trainer.optimizer
    states = {
        tensor.data_ptr(): tensor.nbytes  # tables of what the codes mean are shared
        for state in optimizer.state.values()
        for part, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not part.startswith(("qmap", "step"))
    }
    assert len(optimizer.state) == len(list(policy_of(trainer).parameters()))
    plan = planned(trainer.model, recipe_of(optim="adamw_8bit"))
    assert plan.parts["optimizer"] == sum(states.values())


@pytest.mark.slow
@pytest.mark.dist
def test_the_plan_agrees_with_a_measured_fsdp2(tmp_path: Path) -> None:
    """Two processes under bf16 mixed precision: shares, the update, and all weights gathered for rollouts."""
    run_processes(
        2, "distributed_memory:measure", tmp_path, 256, 6,
        environment={**FSDP2, "ACCELERATE_MIXED_PRECISION": "bf16"},
    )  # fmt: skip
    sharding = sharding_of({"fsdp": "full_shard"}, 2)
    recipe = recipe_of(bf16=True, gradient_checkpointing=True)
    config = model_of(256, 6, 2048).config
    plan = memory_plan(config, recipe, text_tokens=TEXT, device_type="cpu", sharding=sharding)
    shares = plan.parts["weights"] + plan.parts["reference"]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"measured-{rank}.json").read_text())
        for part in ("weights", "reference", "gradients"):
            assert plan.parts[part] == pytest.approx(found[part], rel=0.05), part
        for phase in ("rollout", "update"):
            planned = plan.phases[phase] - plan.parts["optimizer"]
            assert 0.95 <= planned / found[phase] <= 1.2, phase
            assert 0.9 <= (planned - shares) / (found[phase] - shares) <= 1.35, phase
