"""Rollouts one step ahead of the update: the weights that sample each step, and the overlap in time."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
from tgrpo_trainers import make_trainer, policy_of
from tiny_questions import read_lines
from torch import Tensor
from transformers import TrainerCallback

from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.tgrpo import TGRPOTrainer

SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:9"}
QUESTIONS, BATCH = 8, 2  # four steps an epoch


class Copying(RolloutEngine):
    """Fake server that samples with a copy of the weights and records which weights it copied."""

    has_own_weights = True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.model: Any = None
        self.sampled: list[float] = []  # of each call for a step's rollouts: the weights that sampled it
        self.updating = threading.Event()
        self.waited_for: list[bool] = []

    def update_weights(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval()

    def sample(
        self, prompts: Any, sampling: SamplingSettings, counts: Any = None, on_token: Any = None
    ) -> Any:
        if counts is not None:
            ahead = threading.current_thread() is not threading.main_thread()
            self.waited_for.append(self.updating.wait(60) if ahead else False)
            self.sampled.append(mark(self.model))
        return TransformersEngine(self.model, self.tokenizer).sample(prompts, sampling, counts)


class Marks(TrainerCallback):
    """The weights after each update."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.seen.append(mark(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.seen.append(mark(model))


def mark(model: Any) -> float:
    return float(model.lm_head.weight.detach().double().sum())


def run(
    checkpoint: Path, manifest: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[Copying, Marks, list[dict[str, Any]]]:
    marks = Marks()
    engine_of: list[Copying] = []

    def engine(model: Any, processor: Any, *given: Any, **named: Any) -> Copying:
        engine_of.append(Copying(processor))
        return engine_of[0]

    compute_loss = TGRPOTrainer.compute_loss

    def watched(self: TGRPOTrainer, *given: Any, **named: Any) -> Any:
        engine_of[0].updating.set()
        try:
            return compute_loss(self, *given, **named)
        finally:
            engine_of[0].updating.clear()

    monkeypatch.setattr("video_r1.training.tgrpo.training_engine", engine)
    monkeypatch.setattr(TGRPOTrainer, "compute_loss", watched)
    trainer = make_trainer(
        checkpoint, manifest, folder, callbacks=[marks], per_device_train_batch_size=BATCH, max_steps=6,
        save_strategy="no", **SERVER, **changes,
    )  # fmt: skip
    trainer.train()
    assert policy_of(trainer) is not engine_of[0].model
    return engine_of[0], marks, [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def test_each_step_is_sampled_by_the_weights_before_the_last_update(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, marks, lines = run(checkpoint, manifest, tmp_path, monkeypatch, async_rollouts=1)
    assert len(set(marks.seen)) == 7  # every update changes the weights
    # Steps 1 and 5 begin an epoch of four steps.
    assert engine.sampled == [marks.seen[before] for before in (0, 0, 1, 2, 4, 4)]
    assert engine.waited_for == [False, True, True, True, False, True]  # sampled while the update ran
    assert [line["sampler/staleness"] for line in lines] == [0, 1, 1, 1, 0, 1]
    old, new = (lines[step]["sampler/logprob_difference"] for step in (2, 4))
    assert new < 1e-4 < old


@pytest.mark.slow
def test_the_same_questions_in_the_same_order(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches, an uneven end of the epoch and two updates on the same rollouts come out alike."""
    seen: list[list[list[Any]]] = []
    for ahead in (0, 1):
        folder = tmp_path / str(ahead)
        with monkeypatch.context() as patch:
            asked: list[list[Any]] = []
            new_step = TGRPOTrainer.new_step

            def noted(self: TGRPOTrainer, reading: Any, asked: Any = asked, new_step: Any = new_step) -> Any:
                step = new_step(self, reading)
                asked.append([batch.problem_ids for batch in step.batches])
                return step

            patch.setattr(TGRPOTrainer, "new_step", noted)
            run(
                checkpoint, manifest, folder, patch, async_rollouts=ahead, gradient_accumulation_steps=3,
                num_iterations=2, beta=0.04,
            )  # fmt: skip
        seen.append(asked)
    assert seen[0] == seen[1] and len(seen[0]) == 3


def test_errors_of_the_background_are_raised(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Copying.sample

    def fails(self: Copying, prompts: Any, sampling: Any, counts: Any = None) -> Tensor:
        if len(self.sampled) == 2:
            raise RuntimeError("the server is gone")
        return sample(self, prompts, sampling, counts)

    monkeypatch.setattr(Copying, "sample", fails)
    with pytest.raises(RuntimeError, match="the server is gone"):
        run(checkpoint, manifest, tmp_path, monkeypatch, async_rollouts=1)
