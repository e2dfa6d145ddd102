"""A T-GRPO step on a real tiny Qwen2.5-VL and real files: its loss, its rollouts, its rewards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tgrpo_trainers import first_step, make_trainer, many_tokens, policy_of, weights
from torch import Tensor
from transformers import TrainerCallback

from video_r1.data.manifests.records import load_manifest
from video_r1.data.rollouts import Group
from video_r1.errors import ConfigError
from video_r1.models.loading import freeze_vision, load_model
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.objective import ClipRange, surrogate_loss
from video_r1.training.tgrpo import TGRPOConfig


def plain_logprobs(model: Any, group: Group, token_ids: Tensor, temperature: float) -> Tensor:
    """float64 log-probs [L] of `plain_logits` at the completion's tokens."""
    scores = (plain_logits(model, group, token_ids) / temperature).log_softmax(-1)
    return scores.gather(-1, token_ids[:, None])[:, 0]


def plain_logits(model: Any, group: Group, token_ids: Tensor) -> Tensor:
    """float64 [L, V] by the model's own forward on prompt and completion, nothing shared or packed."""
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
    return logits[len(prompt.input_ids) - 1 : -1]


def plain_loss(
    policy: Any, reference: Any, groups: Sequence[Group], args: TGRPOConfig, old: Any = None
) -> Tensor:
    """The objective of one optimizer step as it stands in the papers, one completion after the other."""
    total, tokens, responses = torch.zeros((), dtype=torch.float64), 0, 0
    for group in groups:
        rewards = group.rewards.total.double()
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
    divisor = {"grpo": responses, "dr_grpo": responses * args.max_completion_length}
    return total / divisor.get(args.loss_type, tokens)


def assert_same_gradients(policy: Any, expected: Any) -> None:
    """Compare a model's gradients with those of its float64 copy, within 1e-4 of each weight's largest."""
    for (name, weight), double in zip(policy.named_parameters(), expected.parameters(), strict=True):
        if double.grad is not None:
            scale = max(1e-3, double.grad.abs().max().item())
            assert (weight.grad.double() - double.grad).abs().max().item() / scale < 1e-4, name


def assert_same_step(
    trainer: Any, batches: Sequence[Any], normaliser: Any, policy: Any, expected: Tensor
) -> None:
    """A step's micro-batches have the loss and the gradients of `expected`, a loss of the copy `policy`."""
    expected.backward()
    losses = [
        trainer.compute_loss(policy_of(trainer), batch, num_items_in_batch=normaliser) for batch in batches
    ]
    loss = torch.stack(losses).sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    assert_same_gradients(policy_of(trainer), policy)


@pytest.mark.parametrize(("loss_type", "batch_size"), [("grpo", 1), ("dapo", 1), ("dr_grpo", 3)])
def test_loss_equals_plain_reference(
    checkpoint: Path, manifest: Path, tmp_path: Path, loss_type: str, batch_size: int
) -> None:
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, loss_type=loss_type, beta=0.1, temperature=0.7,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=3 // batch_size,
    )  # fmt: skip
    with torch.no_grad():  # away from the reference model, so that the KL term has a value
        for parameter in policy_of(trainer).parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batches, normaliser = first_step(trainer)
    groups = [group for batch in batches for group in batch["batch"].groups]
    assert {group.sample.data_type for group in groups} == {"video", "image"}

    policy, reference = (
        copy.deepcopy(policy_of(trainer)).double(),
        copy.deepcopy(cast(Any, trainer.reference).model).double(),
    )
    expected = plain_loss(policy, reference, groups, trainer.settings)
    assert_same_step(trainer, batches, normaliser, policy, expected)


def two_are_flat(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The second and the third of a step's groups of four have one reward."""
    earned = many_tokens(completions, completion_ids)
    return [0.5 if place // 4 in (1, 2) else reward for place, reward in enumerate(earned)]


def test_groups_of_equal_rewards_count_in_the_mean_of_a_micro_batch(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    """`bnpo` without a KL term: their tokens are among those of the mean, by which micro-batches count."""
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, rewards=two_are_flat, loss_type="bnpo", beta=0.0,
        temporal_rule="off", per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    batches, normaliser = first_step(trainer)
    groups = [group for batch in batches for group in batch["batch"].groups]
    assert [bool(group.advantages.any()) for group in groups] == [True, False, False, True]

    def shortened(group: Group) -> Group:
        ordered = [replace(r, token_ids=r.token_ids[:3], logprobs=r.logprobs[:3]) for r in group.ordered]
        return replace(group, rollouts=replace(group.rollouts, ordered=ordered))

    for batch in batches:  # flat groups have other lengths than the rest
        parts = [one if one.advantages.any() else shortened(one) for one in batch["batch"].groups]
        batch["batch"] = replace(batch["batch"], groups=parts, trained=parts)
    parts = [batch["batch"].groups for batch in batches]
    policy = copy.deepcopy(policy_of(trainer)).double()
    expected = torch.stack([plain_loss(policy, None, part, trainer.settings) for part in parts]).mean()
    assert_same_step(trainer, batches, normaliser, policy, expected)


def test_second_update_on_the_same_rollouts(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """num_iterations 2: sampled once, the second loss has the first weights as the old policy, ratios that
    are clipped, and a policy that has left the reference."""
    lines: list[dict[str, float]] = []
    states: list[Any] = []
    groups: list[list[Group]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            states.append(copy.deepcopy(policy_of(trainer)).double())
            groups.append([group for batch in trainer.step.batches for group in batch.groups])

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            lines.extend([logs] if "loss" in logs else [])

    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, callbacks=[Watch()], num_iterations=2, max_steps=4, beta=0.5,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no", optim="sgd",
        learning_rate=0.02, max_grad_norm=0.0,
    )  # fmt: skip
    reference = copy.deepcopy(policy_of(trainer)).double()
    engine = CountingEngine(policy_of(trainer), trainer.processing_class)
    trainer.engine = engine
    trainer.train()
    assert engine.calls == 2
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[1] != groups[2]
    for step, old in ((0, 0), (1, 0), (2, 2), (3, 2)):
        expected = plain_loss(states[step], reference, groups[step], trainer.settings, old=states[old])
        assert lines[step]["loss"] == pytest.approx(expected.item(), abs=5e-6)
        assert (lines[step]["policy/clip_ratio"] > 0.05) == (step != old)
        assert (lines[step]["policy/kl"] > 0.001) == (step > 0)
    unclipped = copy.copy(trainer.settings)
    unclipped.epsilon = 1e9
    without = plain_loss(states[1], reference, groups[1], unclipped, old=states[0])
    assert abs(lines[1]["loss"] - without.item()) > 1e-3


class CountingEngine(TransformersEngine):
    calls = 0

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().sample(*args, **kwargs)


# ---- Ordered and shuffled


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
    core = policy_of(trainer).model
    core.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    core.visual.register_forward_pre_hook(lambda module, args: pixels.append(args[0]))
    batches, normaliser = first_step(trainer)
    prefill = seen[0]
    group = batches[0]["batch"].groups[0]
    assert group.rollouts.question.contrast is not None

    assert torch.equal(group.prompt.input_ids, group.rollouts.question.contrast.input_ids)
    text = [row[group.prompt.features["mm_token_type_ids"] == 0] for row in prefill["inputs_embeds"]]
    torch.testing.assert_close(text[0], text[1], rtol=0, atol=0)
    torch.testing.assert_close(prefill["position_ids"][:, 0], prefill["position_ids"][:, 1], rtol=0, atol=0)
    (grid,) = group.prompt.features["video_grid_thw"]
    frames = [frames_of(part, grid) for part in pixels[0].split(len(pixels[0]) // 2)]
    permutation = group.rollouts.question.contrast.permutation
    assert permutation is not None and permutation.tolist() != sorted(permutation.tolist())
    torch.testing.assert_close(frames[1], frames[0][permutation], rtol=0, atol=0)
    assert all(not torch.equal(a, b) for a, b in pairwise(frames[0]))  # or the order would not show

    pixels.clear()
    trainer.compute_loss(policy_of(trainer), batches[0], num_items_in_batch=normaliser)
    (update,) = pixels
    torch.testing.assert_close(frames_of(update, grid), frames[0], rtol=0, atol=0)


# ---- Rewards


def test_a_step_with_a_users_reward_function(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def mine(
        prompts: list[str], completions: list[str], solution: list[str], **columns: Any
    ) -> list[float | None]:
        calls.append({"prompts": prompts, "completions": completions, "solution": solution, **columns})
        return [None if index == 0 else float(index) for index in range(len(completions))]

    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, rewards=["accuracy", "temporal", mine],
        reward_weights={"mine": 0.5}, temperature=0.6, num_contrast_generations=3,
    )  # fmt: skip
    batches, _ = first_step(trainer)
    batch = batches[0]["batch"]
    groups = batch.groups
    # only ordered completions are trained on, and the scored policy is the sampled one
    assert [len(group.rollouts.contrast) for group in groups] == [
        3 * (g.sample.data_type == "video") for g in groups
    ]
    sampled = torch.cat([rollout.logprobs for group in groups for rollout in group.ordered])
    with torch.no_grad():
        scored = trainer.logprobs(policy_of(trainer), batch).logprobs
    torch.testing.assert_close(scored, sampled, rtol=0, atol=2e-5)
    (call,) = calls
    assert len(call["completions"]) == 12 and call["problem_id"][::4] == [g.sample.problem_id for g in groups]
    assert call["prompts"][0].startswith(groups[0].sample.problem)
    assert groups[0].rewards.terms["mine"].isnan().tolist() == [True, False, False, False]
    others = groups[0].rewards.terms["accuracy"] + groups[0].rewards.terms["temporal"]
    torch.testing.assert_close(groups[0].rewards.total, torch.tensor([0.0, 0.5, 1.0, 1.5]) + others)


def test_settings_of_the_objective_reach_it(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def heard(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return surrogate_loss(*args, **options)

    monkeypatch.setattr("video_r1.training.step.surrogate_loss", heard)
    changes = {"loss_type": "cispo", "epsilon_high": 4.0, "delta": 6.0, "sapo_temperature_neg": 1.5}
    changes |= {"importance_sampling_level": "sequence", "mask_truncated_completions": True}
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, max_steps=1, max_completion_length=60,
        top_entropy_quantile=0.25, beta=0.0, **changes,
    )  # fmt: skip
    trainer.train()
    options = asked[0]
    assert options["loss_type"] == "cispo" and options["importance_sampling_level"] == "sequence"
    assert options["clip"] == ClipRange(0.2, 4.0, 6.0, (1.0, 1.5))
    rollouts = [r for batch in trainer.step.batches for group in batch.groups for r in group.ordered]
    finished = [rollout.finish_reason == "stop" for rollout in rollouts]
    assert options["counted"].tolist() == finished
    tokens = sum(len(r.token_ids) for r, whole in zip(rollouts, finished, strict=True) if whole)
    assert options["normaliser"] == max(1, tokens)
    assert (options["token_weights"] == 0).any()  # tokens of low entropy have no policy term


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"repetition_penalty": 1.1},
            "repetition_penalty is 1.1; the sampled policy must be the one that is trained",
        ),
        # a weight of a reward that the settings turn off would be ignored
        (
            {"rewards": None, "reward_weights": {"length": 0.5}},
            "'length'.*temporal; set length_reward",
        ),
        ({"rewards": []}, "reward_funcs is empty"),
        ({"num_iterations": 3, "save_steps": 4}, "save_steps"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode is server; name its address"),
    ],
)
def test_contradicting_settings(
    checkpoint: Path, manifest: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(checkpoint, str(manifest), tmp_path, **changes)


# ---- Model families, a frozen vision tower


def test_frozen_vision_tower_is_encoded_once(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """Its output is shared by policy and reference over two updates; weights end up as without sharing."""
    results = []
    for shared in (True, False):
        trainer = make_trainer(
            freeze(checkpoint), str(manifest), tmp_path / str(shared), num_iterations=2, max_steps=2, beta=0.1
        )
        assert trainer.vision_is_frozen
        trainer.vision_is_frozen = shared
        runs: list[int] = []
        for model in (policy_of(trainer), cast(Any, trainer.reference).model):
            model.model.visual.register_forward_pre_hook(lambda module, args, seen=runs: seen.append(1))
        trainer.train()
        results.append((weights(trainer), len(runs)))
    (with_sharing, few), (without, many) = results
    assert few < many
    for name, value in with_sharing.items():
        torch.testing.assert_close(value, without[name], rtol=0, atol=1e-6)


def freeze(checkpoint: Path) -> Any:
    model = load_model(checkpoint)
    freeze_vision(model)
    return model
