"""A teacher: credits by token, the gradient of distillation, its clips, refusals and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from resume_runs import same_weights
from tgrpo_trainers import first_step, make_trainer, policy_of, weights
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, write_manifest

from video_r1.errors import ConfigError
from video_r1.models.loading import load_model
from video_r1.report.page import build_report, page_data
from video_r1.training.objective import surrogate_loss
from video_r1.training.teacher import TeacherScores, teacher_credits
from video_r1.training.tgrpo import TGRPOConfig

ALONE: dict[str, Any] = {"reward_funcs": "none", "temporal_rule": "off", "beta": 0.0}


def test_credits_are_bounded_gaps() -> None:
    scores = TeacherScores(torch.tensor([-1.0, -9.0, -0.1]), torch.tensor([True, False, True]))
    credits = teacher_credits(scores, torch.tensor([-2.0, -0.5, -7.1]), weight=0.5)
    torch.testing.assert_close(credits, torch.tensor([0.5, -2.5, 2.5]))


def test_credits_join_the_advantages() -> None:
    """Two responses of 2 and 1 tokens, advantages 1 and -1; worked out by hand for the loss type grpo."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    result = surrogate_loss(
        logprobs, None, torch.tensor([1.0, -1.0]), torch.tensor([2, 1]), normaliser=2.0,
        token_credits=torch.tensor([0.5, -2.0, 0.25]),
    )  # fmt: skip
    result.loss.backward()
    by_hand = -torch.tensor([1.5 / 2, -1.0 / 2, -0.75]) / 2
    torch.testing.assert_close(logprobs.grad, by_hand)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("teacher") / "model", seed=7)


def test_distillation_follows_the_reverse_kl(
    checkpoint: Path, manifest: Path, teacher: Path, tmp_path: Path
) -> None:
    """The gradient equals that of Σ log π_S · (log π_S − log π_T), the second factor fixed, in float64; the
    teacher sees its own number of frames; all is logged, recorded and in the report.
    """
    trainer: Any = make_trainer(
        checkpoint, str(manifest), tmp_path / "run", rewards=None, teacher_model_name_or_path=str(teacher),
        teacher_frames=8, max_frames=4, teacher_weight=0.5, num_generations=2, max_steps=2, fps=4.0, **ALONE,
    )  # fmt: skip
    batches, normaliser = first_step(trainer)
    groups = batches[0]["batch"].groups
    frames = {
        (g.prompt.frames, g.rollouts.question.teacher.frames) for g in groups if g.sample.data_type == "video"
    }
    assert frames == {(4, 8)}
    loss = trainer.compute_loss(policy_of(trainer), batches[0], num_items_in_batch=normaliser)
    loss.backward()
    found = {name: p.grad.double() for name, p in policy_of(trainer).named_parameters() if p.grad is not None}
    student, judge = (load_model(path, "float64") for path in (checkpoint, teacher))
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        assert not group.rewards.total.any() and not group.advantages.any()
        for rollout in group.ordered:
            own = alone(student, group.prompt, rollout.token_ids)
            with torch.no_grad():
                taught = alone(judge, group.rollouts.question.teacher, rollout.token_ids)
            gaps = (own.detach() - taught).clamp(-5, 5)
            total = total + 0.5 * (own * gaps).sum() / len(own) / (2 * len(groups))
    total.backward()
    exact = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == exact.keys() and len(exact) > 20
    norm = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    for name, gradient in exact.items():
        assert float((found[name] - gradient).norm() / norm) < 1e-5, name
    trainer.train()
    line = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["teacher/kl"] > 0 and 0 <= line["teacher/agreement"] < 1 and 0 < line["teacher/clipped"] < 0.5
    assert "groups/no_variance" not in line  # no rewards
    recorded = read_lines(tmp_path / "run" / "rollouts.jsonl")[0]["ordered"][0]
    assert "".join(word for word, *_ in recorded["word_logprobs"]) == recorded["text"]
    assert "advantage_without_temporal" not in recorded  # no contrast clip was sampled
    assert '"scored"' in build_report(tmp_path / "run").read_text()
    assert page_data(tmp_path / "run")["figures"][0]["caption"] == "KL to the teacher"
    assert not (tmp_path / "run" / "left_out.jsonl").exists()  # the teacher teaches them all
    assert trainer.progress_series["KL to the teacher"] == "teacher/kl"
    assert "reward" not in trainer.progress_series


def alone(model: Any, prompt: Any, tokens: torch.Tensor) -> torch.Tensor:
    """log π [L] of tokens behind a prompt, by transformers' own forward."""
    ids, length = torch.cat([prompt.input_ids, tokens])[None], len(prompt.input_ids)
    given = {name: value for name, value in prompt.features.items() if "token_type" not in name}
    given = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in given.items()}
    kinds = torch.cat([prompt.features["mm_token_type_ids"], torch.zeros_like(tokens)])[None]
    logits = model(input_ids=ids, mm_token_type_ids=kinds, **given).logits[0, length - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def test_a_teacher_beside_rewards(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """The policy with more frames as its own teacher; two updates on each batch; exact resume."""

    def run(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
        trainer = make_trainer(
            checkpoint, str(manifest), folder, teacher_model_name_or_path="self", teacher_frames=8,
            max_frames=4, fps=4.0, num_iterations=2, save_steps=2, **changes,
        )  # fmt: skip
        trainer.train()
        return weights(trainer)

    run(tmp_path / "whole", max_steps=4)
    run(tmp_path / "parts", max_steps=2)
    run(tmp_path / "parts", max_steps=4)
    same_weights(tmp_path / "whole", tmp_path / "parts", within=0.0)
    series = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert all("teacher/kl" in line for line in series[::2])
    plain = make_trainer(checkpoint, str(manifest), tmp_path / "plain", max_frames=4, fps=4.0, max_steps=4)
    plain.train()
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "whole", tmp_path / "plain")


def test_a_teacher_of_other_tokens_is_refused(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint("qwen2_5_vl", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="its tokens are not those of the policy"):
        make_trainer(checkpoint, str(manifest), tmp_path / "r", teacher_model_name_or_path=str(other))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"teacher_frames": 8}, "teacher_frames is set while teacher_model_name_or_path is not"),
        ({"reward_funcs": "none", "temporal_rule": "off"}, "reward_funcs is none, so nothing is learnt"),
        ({"teacher_model_name_or_path": "self"}, "is self, which sees no more than the policy"),
        (
            {"teacher_model_name_or_path": "self", "teacher_frames": 8, "max_frames": 8},
            "is self, which sees no more than the policy",
        ),
        (
            {
                "teacher_model_name_or_path": "http://a:8000/",
                "use_vllm": True,
                "vllm_mode": "server",
                "vllm_server_base_url": "http://a:8000",
            },
            "samples for the policy, whose weights it gets",
        ),
        (
            {"teacher_model_name_or_path": "http://a:8000", "temperature": 0.7},
            "log-probs of temperature 1",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        TGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_a_teacher_has_no_dropout_and_computes_in_bf16(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    """The policy with its adapters as its own teacher, and a loaded one under mixed precision."""
    adapters = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    trainer: Any = make_trainer(
        checkpoint, str(manifest), tmp_path / "self", peft=adapters, teacher_model_name_or_path="self",
        teacher_frames=8, max_frames=4, fps=4.0,
    )  # fmt: skip
    batches, _ = first_step(trainer)
    policy = policy_of(trainer).train()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    one, two = (trainer.teacher.scores(policy, batches[0]["batch"].groups).logprobs for _ in range(2))
    torch.testing.assert_close(one, two, atol=0, rtol=0)
    assert policy.training
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path / "bf16", teacher_model_name_or_path=str(checkpoint), bf16=True
    )
    assert {weight.dtype for weight in trainer.teacher.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_a_teacher_of_text_and_clips(family: str, tmp_path: Path) -> None:
    student, teacher = (tiny_checkpoint(family, tmp_path / f"{n}", seed=n) for n in (0, 1))
    clip, *_, words = json.loads(write_manifest(tmp_path, 1, 1).read_text())
    words = {**words, "problem_id": "words", "data_type": "text", "path": None}
    (tmp_path / "both.json").write_text(json.dumps([clip, words]))
    trainer = make_trainer(
        student, str(tmp_path / "both.json"), tmp_path / "run", rewards=None, max_steps=2,
        teacher_model_name_or_path=str(teacher), per_device_train_batch_size=2, **ALONE,
    )  # fmt: skip
    trainer.train()
    taught = trainer.references[0].teacher_logprobs
    assert taught is not None and bool(taught.isfinite().all())
    assert len(taught) == sum(len(rollout.token_ids) for rollout in trainer.step.batches[0].rollouts)
