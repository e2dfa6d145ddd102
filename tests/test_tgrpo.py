"""T-GRPO on a real tiny Qwen2.5-VL and real files: what a step computes, what it leaves behind, what it survives."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import tiny_checkpoint
from tiny_questions import KINDS, read_lines, training_arguments, write_manifest
from torch import Tensor
from transformers import AutoModelForImageTextToText, TrainerCallback

from video_r1.data.records import load_manifest
from video_r1.errors import ConfigError, RewardError, VideoR1Error
from video_r1.rollout.engine import RolloutGroup
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.tgrpo import TGRPOConfig, TGRPOTrainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("data"))


def many_tokens(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that a random model earns in different amounts, so that there is something to learn."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def make_trainer(
    checkpoint: Path, manifest: Any, folder: Path, rewards: Any = many_tokens, peft: Any = None, engine: Any = None,
    callbacks: list[TrainerCallback] | None = None, evaluated: Any = None, **changes: Any,
) -> TGRPOTrainer:  # fmt: skip
    defaults = {
        "num_generations": 4,
        "max_completion_length": 10,
        "length_reward": 0.0,
        "preflight_questions": 0,
    }
    args = TGRPOConfig(**training_arguments(folder, **{**defaults, **changes}))
    return TGRPOTrainer(
        str(checkpoint),
        rewards,
        args,
        manifest,
        evaluated,
        peft_config=peft,
        callbacks=callbacks,
        engine=engine,
    )


def weights(trainer: TGRPOTrainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def first_step(trainer: TGRPOTrainer) -> tuple[list[dict[str, Any]], float]:
    """The micro-batches and the normaliser of the first optimizer step, without training."""
    batches = iter(trainer.get_train_dataloader())
    return trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, "cpu")


@pytest.fixture(scope="module")
def finished(checkpoint: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> TGRPOTrainer:
    """A short run over all problem types, images and videos mixed."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(checkpoint, str(manifest), folder, rewards=["accuracy", "format", many_tokens])
    trainer.train()
    return trainer


def test_logged_series(finished: TGRPOTrainer) -> None:
    lines = read_lines(finished.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    together = {name for line in lines for name in line}
    kinds = {f"reward/accuracy/{kind}" for kind in (*KINDS, "video", "image")}
    expected = (
        "epoch time loss learning_rate grad_norm reward/accuracy reward/format reward/temporal reward/total "
        "reward/many_tokens temporal/p temporal/p_shuffled temporal/gap temporal/share_ordered_better "
        "completion/length completion/truncated completion/self_reflection policy/clip_ratio policy/kl "
        "policy/entropy groups/no_variance media/skipped updates/skipped speed/rollouts_per_second "
        "speed/tokens_per_second seconds/decode seconds/rollout seconds/reward seconds/update"
    ).split()
    assert {*expected, *kinds} <= together
    logged = [line for line in finished.state.log_history if "loss" in line]  # what trackers get
    assert logged[0]["reward/many_tokens"] == lines[0]["reward/many_tokens"]


def test_run_folder(finished: TGRPOTrainer) -> None:
    assert {"config.yaml", "metrics.jsonl", "rollouts.jsonl", "checkpoint-3"} <= set(
        path.name for path in finished.folder.iterdir()
    )
    rollouts = read_lines(finished.folder / "rollouts.jsonl")
    assert [line["step"] for line in rollouts] == [1, 1, 2, 2, 3, 3]
    for line in rollouts:
        assert len(line["ordered"]) == 4
        assert len(line["shuffled"]) == (2 if line["data_type"] == "video" else 0)
        assert (line["p_shuffled"] is None) == (line["permutation"] is None) == (line["data_type"] == "image")


def test_checkpoint_is_plain(finished: TGRPOTrainer) -> None:
    folder = finished.folder / "checkpoint-3"
    assert (folder / "chat_template.jinja").exists() and (folder / "processor_config.json").exists()
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    trained = finished.model.eval()
    prompt = finished.step_batches[0].groups[0].prompt
    features = {name: value[None] if value.ndim == 1 and name == "mm_token_type_ids" else value
                for name, value in prompt.features.items()}  # fmt: skip
    with torch.no_grad():
        logits = [model(input_ids=prompt.input_ids[None], **features).logits for model in (loaded, trained)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


# ---- The loss, from the completions alone ----------------------------------------------------------------


def plain_logprobs(model: Any, group: RolloutGroup, token_ids: Tensor, temperature: float) -> Tensor:
    """float64 log-probs [L] by the model's own forward on prompt and completion, nothing shared or packed."""
    prompt = group.prompt
    ids = torch.cat([prompt.input_ids, token_ids])[None]
    grids = {name: value for name, value in prompt.features.items() if not name.startswith("pixel_values")}
    kinds = torch.cat([grids.pop("mm_token_type_ids"), torch.zeros_like(token_ids)])[None]
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
    grids.pop("second_per_grid_ts", None)
    if "pixel_values" in prompt.features:
        visual = model.model.get_image_features(prompt.features["pixel_values"].double(), **grids)
    else:
        visual = model.model.get_video_features(prompt.features["pixel_values_videos"].double(), **grids)
    embeddings = model.get_input_embeddings()(ids)
    # Random models sample placeholder tokens too; in a completion these have no pixels.
    embeddings = embeddings.masked_scatter((kinds > 0)[..., None], torch.cat(list(visual.pooler_output)))
    logits = model(inputs_embeds=embeddings, position_ids=positions).logits[0]
    start = len(prompt.input_ids)
    scores = (logits[start - 1 : -1] / temperature).log_softmax(-1)
    return scores.gather(-1, token_ids[:, None])[:, 0]


def plain_loss(
    policy: Any, reference: Any, groups: Sequence[RolloutGroup], args: TGRPOConfig, old: Any = None
) -> Tensor:
    """The objective of one optimizer step as it stands in the papers, one completion after the other."""
    total, tokens, responses = torch.zeros((), dtype=torch.float64), 0, 0
    for group in groups:
        rewards = group.total_reward.double()
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for rollout, advantage in zip(group.ordered, advantages, strict=True):
            new = plain_logprobs(policy, group, rollout.token_ids, args.temperature)
            before = (
                new.detach()
                if old is None
                else plain_logprobs(old, group, rollout.token_ids, args.temperature)
            )
            ratio = torch.exp(new - before)
            clipped = torch.clamp(ratio, 1 - args.epsilon, 1 + args.epsilon)
            loss = -torch.minimum(ratio * advantage, clipped * advantage)
            if args.beta:
                d = plain_logprobs(reference, group, rollout.token_ids, args.temperature) - new
                loss = loss + args.beta * (torch.exp(d) - d - 1)
            total = total + (loss.mean() if args.loss_type == "grpo" else loss.sum())
            tokens += len(loss)
            responses += 1
    divisor = {"grpo": responses, "dapo": tokens, "dr_grpo": responses * args.max_completion_length}
    return total / divisor[args.loss_type]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("batch_size", [3, 1])
def test_loss_equals_plain_reference(
    checkpoint: Path, manifest: Path, tmp_path: Path, loss_type: str, batch_size: int
) -> None:
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, loss_type=loss_type, beta=0.1, temperature=0.7,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=3 // batch_size,
    )  # fmt: skip
    with torch.no_grad():  # away from the reference model, so that the KL term has a value
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batches, normaliser = first_step(trainer)
    groups = [group for batch in batches for group in batch["batch"].groups]
    assert {group.sample.data_type for group in groups} == {"video", "image"}

    policy, reference = copy.deepcopy(trainer.model).double(), copy.deepcopy(trainer.reference).double()
    expected = plain_loss(policy, reference, groups, trainer.settings)
    expected.backward()
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=normaliser) for batch in batches]
    sum(losses).backward()

    assert sum(losses).item() == pytest.approx(expected.item(), abs=2e-6)
    for (name, parameter), double in zip(trainer.model.named_parameters(), policy.parameters(), strict=True):
        if double.grad is not None:
            scale = max(1e-3, double.grad.abs().max().item())
            error = (parameter.grad.double() - double.grad).abs().max().item()
            assert error / scale < 1e-4, name


def test_second_update_on_the_same_rollouts(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """num_iterations 2: sampled once, the second loss has the first weights as the old policy."""
    losses: list[float] = []
    states: list[Any] = []
    groups: list[list[RolloutGroup]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            states.append(copy.deepcopy(trainer.model).double())
            groups.append([group for batch in trainer.step_batches for group in batch.groups])

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, callbacks=[Watch()], num_iterations=2, max_steps=4, beta=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no", optim="sgd",
        learning_rate=0.05, max_grad_norm=0.0,
    )  # fmt: skip
    engine = CountingEngine(trainer.model, trainer.processing_class)
    trainer.engine = engine
    trainer.train()
    assert engine.calls == 2
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[1] != groups[2]
    for step, old in ((0, 0), (1, 0), (2, 2), (3, 2)):
        expected = plain_loss(states[step], None, groups[step], trainer.settings, old=states[old])
        assert losses[step] == pytest.approx(expected.item(), abs=5e-6)
    assert abs(losses[1] - losses[0]) > 1e-4


class CountingEngine(TransformersEngine):
    calls = 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_accumulation_equals_one_large_batch(
    checkpoint: Path, manifest: Path, tmp_path: Path, loss_type: str
) -> None:
    """Three questions as 3, 2 + 1 and 1 + 1 + 1 give the same weights after two steps."""
    samples = load_manifest(manifest)[2:5] + load_manifest(manifest)[5:6]
    results = []
    for size, accumulation in ((4, 1), (2, 2), (3, 2), (1, 4)):
        trainer = make_trainer(
            checkpoint, samples, tmp_path / str(size), loss_type=loss_type, optim="sgd", max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, save_strategy="no",
            learning_rate=0.01,
        )  # fmt: skip
        before = weights(trainer)
        trainer.train()
        results.append(weights(trainer))
        assert any((before[name] - results[-1][name]).abs().max() > 1e-4 for name in before)
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-6)


# ---- Ordered and shuffled --------------------------------------------------------------------------------


def frames_of(patches: Tensor, grid: Tensor) -> Tensor:
    """Undoes the patch layout of Qwen2.5-VL: [patches, dim] to frames [T, 3, H, W]."""
    t, h, w = grid.tolist()
    blocks = patches.view(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    return blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(2 * t, 3, h * 14, w * 14)


def test_shuffled_prompts_differ_in_frame_order_alone(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    """On the tensors that reach the model: same tokens and positions, same frames, another order; the update
    sees the ordered ones alone."""
    video = [sample for sample in load_manifest(manifest) if sample.data_type == "video"][:1]
    trainer = make_trainer(checkpoint, video, tmp_path, per_device_train_batch_size=1)
    seen: list[dict[str, Any]] = []
    pixels: list[Tensor] = []
    core = trainer.model.model
    core.register_forward_pre_hook(lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    core.visual.register_forward_pre_hook(lambda module, args: pixels.append(args[0]))
    batches, normaliser = first_step(trainer)
    prefill = seen[0]
    group = batches[0]["batch"].groups[0]
    assert group.shuffled_prompt is not None

    torch.testing.assert_close(prefill["input_ids"][0], prefill["input_ids"][1], rtol=0, atol=0)
    torch.testing.assert_close(prefill["position_ids"][:, 0], prefill["position_ids"][:, 1], rtol=0, atol=0)
    assert prefill["video_grid_thw"][0].tolist() == prefill["video_grid_thw"][1].tolist()
    half = len(prefill["pixel_values_videos"]) // 2
    frames = [
        frames_of(part, grid)
        for part, grid in zip(
            prefill["pixel_values_videos"].split(half), prefill["video_grid_thw"], strict=True
        )
    ]
    permutation = group.shuffled_prompt.permutation
    assert permutation is not None and permutation.tolist() != sorted(permutation.tolist())
    torch.testing.assert_close(frames[1], frames[0][permutation], rtol=0, atol=0)
    assert all(not torch.equal(a, b) for a, b in pairwise(frames[0]))  # or the order would not show

    pixels.clear()
    trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=normaliser)
    (update,) = pixels
    torch.testing.assert_close(frames_of(update, prefill["video_grid_thw"][0]), frames[0], rtol=0, atol=0)


def test_shuffled_completions_are_never_trained_on(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, per_device_train_batch_size=8, num_shuffled_generations=3
    )
    batches, _ = first_step(trainer)
    batch = batches[0]["batch"]
    scored = trainer.logprobs(trainer.model, batch)
    assert scored.lengths.tolist() == [
        len(rollout.token_ids) for group in batch.groups for rollout in group.ordered
    ]
    for group in batch.groups:
        assert len(group.shuffled) == (3 if group.sample.data_type == "video" else 0)
        assert len(group.advantages) == len(group.ordered) == 4


def test_scored_policy_is_the_sampled_one(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, temperature=0.6)
    batches, _ = first_step(trainer)
    batch = batches[0]["batch"]
    sampled = torch.cat([rollout.logprobs for group in batch.groups for rollout in group.ordered])
    with torch.no_grad():
        scored = trainer.logprobs(trainer.model, batch).logprobs
    torch.testing.assert_close(scored, sampled, rtol=0, atol=2e-5)


def test_without_temporal_rule_nothing_is_shuffled(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, rewards=None, temporal_rule="off")
    batches, _ = first_step(trainer)
    for group in batches[0]["batch"].groups:
        assert group.shuffled_prompt is None and group.p_shuffled is None
        assert set(group.rewards) == {"accuracy", "format"}


# ---- Rewards ---------------------------------------------------------------------------------------------


def test_user_reward_function(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def mine(
        prompts: list[str], completions: list[str], solution: list[str], **columns: Any
    ) -> list[float | None]:
        calls.append({"prompts": prompts, "completions": completions, "solution": solution, **columns})
        return [None if index == 0 else float(index) for index in range(len(completions))]

    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, rewards=["accuracy", mine], reward_weights={"mine": 0.5}
    )
    batches, _ = first_step(trainer)
    groups = batches[0]["batch"].groups
    (call,) = calls
    assert len(call["completions"]) == 12 and call["problem_id"][::4] == [g.sample.problem_id for g in groups]
    assert call["prompts"][0].startswith(groups[0].sample.problem)
    assert groups[0].rewards["mine"].isnan().tolist() == [True, False, False, False]
    others = groups[0].rewards["accuracy"] + groups[0].rewards["temporal"]
    torch.testing.assert_close(groups[0].total_reward, torch.tensor([0.0, 0.5, 1.0, 1.5]) + others)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **columns: [1.0], "returned 1 rewards for 12 completions"),
        (lambda completions, **columns: 1 / 0, "raised ZeroDivisionError.*problem_id"),
    ],
)
def test_failing_reward_function_is_named(
    checkpoint: Path, manifest: Path, tmp_path: Path, function: Any, message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        first_step(make_trainer(checkpoint, str(manifest), tmp_path, rewards=[function]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"reward_weights": {"acuracy": 1.0}}, "acuracy"),
        ({"rewards": ["accurate"]}, "accurate"),
        ({"rewards": ["temporal"], "temporal_rule": "off"}, "temporal_rule"),
        ({"num_iterations": 3, "save_steps": 4}, "save_steps"),
        ({"use_vllm": True}, "use_vllm"),
    ],
)
def test_contradicting_settings(
    checkpoint: Path, manifest: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(checkpoint, str(manifest), tmp_path, **changes)


# ---- Bad media, bad numbers, no reward -------------------------------------------------------------------


def test_bad_media_give_their_place_to_other_questions(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    manifest = write_manifest(data, videos=6, images=2, bad=(1, 4))
    (data / "3.mp4").unlink()
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path / "run", max_steps=4, per_device_train_batch_size=4
    )
    trainer.train()
    quarantined = read_lines(trainer.folder / "quarantine.jsonl")
    assert sorted(line["problem_id"] for line in quarantined) == [1, 3, 4]
    assert all(line["reason"] and line["path"].endswith(f"{line['problem_id']}.mp4") for line in quarantined)
    metrics = read_lines(trainer.folder / "metrics.jsonl")
    assert sum(line["media/skipped"] for line in metrics) >= 6  # two epochs of eight questions
    rolled_out = {line["problem_id"] for line in read_lines(trainer.folder / "rollouts.jsonl")}
    assert rolled_out <= {0, 2, 5, 6, 7}


def test_missing_media_stop_the_run(checkpoint: Path, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, videos=3, images=0, bad=(0, 1, 2))
    with pytest.raises(VideoR1Error, match="3 in the manifest.*quarantine.jsonl"):
        make_trainer(checkpoint, str(manifest), tmp_path / "run").train()


def test_preflight_stops_a_model_without_the_format(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, rewards=None, preflight_questions=2)
    with pytest.raises(VideoR1Error, match="none of 8 completions.*cut off at max_completion_length"):
        trainer.train()
    assert trainer.state.global_step == 0


class Poison(TrainerCallback):
    """Makes a gradient infinite before the given optimizer steps (counted from 1)."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps
        self.weights: dict[int, Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        parameter = next(model.parameters())
        self.weights[state.global_step + 1] = parameter.detach().clone()
        if state.global_step + 1 in self.steps:
            parameter.grad[0] = torch.inf

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        changed = not torch.equal(self.weights[state.global_step], next(model.parameters()))
        assert changed == (state.global_step not in self.steps)


def test_infinite_gradient_skips_the_update(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, callbacks=[Poison([2])])
    trainer.train()
    (line,) = read_lines(tmp_path / "skipped_updates.jsonl")
    assert line["step"] == 2 and len(line["problem_ids"]) == 3 and line["not_finite"] == "gradient"
    assert [entry["updates/skipped"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 1]
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_infinite_gradients_in_a_row_stop_the_run(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, callbacks=[Poison([1, 2, 3])], max_skipped_updates=2
    )
    with pytest.raises(VideoR1Error, match="2 updates in a row.*problem_id"):
        trainer.train()


# ---- LoRA, validation, continuing ------------------------------------------------------------------------


def test_lora_trains_adapters_against_the_model_without_them(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    peft = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, peft=peft, learning_rate=0.02, beta=0.04)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert trainer.reference is None
    kl = [line["policy/kl"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[-1] > 1e-5
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()


def test_validation_finds_the_best_checkpoint(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, evaluated=str(manifest), eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_accuracy", max_steps=2,
    )  # fmt: skip
    trainer.train()
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "eval_accuracy" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["eval_questions"] == 8 and lines[0]["eval_skipped"] == 0
    assert (
        lines[0]["eval_temporal_gap"] == lines[0]["eval_accuracy_video"] - lines[0]["eval_accuracy_shuffled"]
    )
    assert trainer.state.best_model_checkpoint is not None


def comparable(path: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    timed = ("time", "seconds/", "speed/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_lines(path)]


@pytest.mark.parametrize("iterations", [1, 2])
def test_resumed_run_equals_an_uninterrupted_one(
    checkpoint: Path, manifest: Path, tmp_path: Path, iterations: int
) -> None:
    """Bit for bit, over the end of an epoch; lines that a killed run left after its checkpoint are replaced."""
    settings = {
        "max_steps": 6, "save_steps": 2, "num_iterations": iterations, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    whole = make_trainer(checkpoint, str(manifest), tmp_path / "whole", **settings)
    whole.train()
    half = tmp_path / "parted"
    shutil.copytree(tmp_path / "whole", half)
    metrics = (half / "metrics.jsonl").read_text().splitlines()
    (half / "metrics.jsonl").write_text("\n".join([*metrics[:5], metrics[5][:20]]))  # killed while writing
    resumed = make_trainer(checkpoint, str(manifest), half, **settings)
    resumed.train(resume_from_checkpoint=str(half / "checkpoint-2"))
    assert comparable(half / "metrics.jsonl") == comparable(tmp_path / "whole" / "metrics.jsonl")
    rollouts = [read_lines(folder / "rollouts.jsonl") for folder in (half, tmp_path / "whole")]
    assert rollouts[0] == rollouts[1]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert json.loads((half / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
