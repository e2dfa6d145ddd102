"""T-GRPO runs on a real tiny Qwen2.5-VL: what they write, what they survive, how they continue."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_runs import comparable
from tgrpo_trainers import make_trainer, many_tokens, weights
from tiny_questions import KINDS, read_lines, write_manifest
from torch import Tensor
from transformers import TrainerCallback

from video_r1.errors import VideoR1Error
from video_r1.training.tgrpo import TGRPOTrainer


@pytest.fixture(scope="module")
def finished(checkpoint: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> TGRPOTrainer:
    """A short run over all problem types, images and videos mixed."""
    folder = tmp_path_factory.mktemp("run")
    rewards = ["accuracy", "format", "temporal", many_tokens]
    trainer = make_trainer(checkpoint, str(manifest), folder, rewards=rewards)
    trainer.train()
    return trainer


def test_logged_series(finished: TGRPOTrainer) -> None:
    lines = read_lines(finished.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    together = {name for line in lines for name in line}
    kinds = {f"reward/accuracy/{kind}" for kind in (*KINDS, "video", "image")}
    expected = {
        *("epoch", "time", "loss", "learning_rate", "grad_norm"),
        *("reward/accuracy", "reward/format", "reward/temporal", "reward/many_tokens", "reward/total"),
        *("temporal/p", "temporal/p_contrast", "temporal/gap", "temporal/share_ordered_better"),
        *(f"credit/{name}" for name in ("accuracy", "format", "temporal", "many_tokens")),
        *("completion/length", "completion/truncated", "completion/self_reflection"),
        *("policy/clip_ratio", "policy/kl", "policy/entropy", "groups/no_variance"),
        *("media/skipped", "updates/skipped", "speed/rollouts_per_second", "speed/tokens_per_second"),
        *("seconds/decode", "seconds/rollout", "seconds/reward", "seconds/update", "memory/peak_gib"),
    }
    expected |= {f"reward_std/{name}" for name in ("accuracy", "format", "temporal", "many_tokens", "total")}
    assert expected | kinds <= together
    assert set(finished.progress_series.values()) <= together
    assert list(finished.progress_series) == ["reward", "format", "gap", "many_tokens", "accuracy", "loss"]
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
        alone = line["data_type"] == "image"
        assert all((line[name] is None) == alone for name in ("p_contrast", "permutation", "contrast"))
        assert (line["frames"]["count"] == 1) == alone


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


def test_preflight_stops_a_model_without_the_format(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, rewards=None, preflight_questions=2)
    with pytest.raises(VideoR1Error, match=r"none of 8 completions.*cut off at max_completion_length"):
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
    folder = tmp_path / "in a row"
    trainer = make_trainer(
        checkpoint, str(manifest), folder, callbacks=[Poison([1, 2])], max_skipped_updates=2
    )
    with pytest.raises(VideoR1Error, match=r"2 updates in a row.*problem_id"):
        trainer.train()


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
    low, high = lines[0]["eval_temporal_gap_low"], lines[0]["eval_temporal_gap_high"]
    assert low <= lines[0]["eval_temporal_gap"] <= high
    assert trainer.state.best_model_checkpoint is not None


def test_answers_are_counted(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ordered completions of multiple-choice questions, so that one constant answer shows."""
    monkeypatch.setattr("video_r1.training.metrics.extract_answer", lambda text: "A")
    settings = {"shuffle_options": True, "log_rollouts": 9, "per_device_train_batch_size": 4}
    make_trainer(checkpoint, str(manifest), tmp_path, **settings).train()
    chosen = [r for r in read_lines(tmp_path / "rollouts.jsonl") if r["problem_type"] == "multiple choice"]
    counts = [line.get("answers/A", 0) for line in read_lines(tmp_path / "metrics.jsonl")]
    assert sum(counts) == 4 * len(chosen) > 0
    assert all(line["options"]["AB".index(line["answer"])][3:] == "right" for line in chosen)


@pytest.mark.parametrize(
    ("iterations", "credit"),
    [
        (2, {"temporal_rule": "likelihood_gate", "temporal_contrast": "reversed", "shuffle_options": True}),
        (1, {"scale_rewards": "task", "temporal_rule": "likelihood_gate", "beta": 0.5}),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(
    checkpoint: Path, manifest: Path, tmp_path: Path, iterations: int, credit: dict[str, Any]
) -> None:
    """Bit for bit, over the end of an epoch; what a killed run left behind its checkpoint is replaced."""
    settings = {
        "max_steps": 6, "save_steps": 2, "num_iterations": iterations, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", **credit,
    }  # fmt: skip
    whole = make_trainer(checkpoint, str(manifest), tmp_path / "whole", **settings)
    whole.train()
    half = tmp_path / "parted"
    shutil.copytree(tmp_path / "whole", half)
    metrics = (half / "metrics.jsonl").read_text().splitlines()
    (half / "metrics.jsonl").write_text("\n".join([*metrics[:5], metrics[5][:20]]))  # killed while writing
    resumed = make_trainer(checkpoint, str(manifest), half, **settings)
    resumed.train(resume_from_checkpoint=str(half / "checkpoint-2"))
    assert comparable(half) == comparable(tmp_path / "whole")
    rollouts = [read_lines(folder / "rollouts.jsonl") for folder in (half, tmp_path / "whole")]
    assert rollouts[0] == rollouts[1]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert json.loads((half / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
