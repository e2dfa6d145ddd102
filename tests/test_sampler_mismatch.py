"""What is logged and corrected when the sampler's probabilities differ from the trainer's."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tgrpo_trainers import many_tokens
from tiny_models import tiny_model, tiny_processor
from tiny_questions import read_lines, training_arguments, write_manifest

from video_r1.data.rollouts import Rollout
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.vllm import VLLMSettings
from video_r1.training.metrics import Meter
from video_r1.training.tgrpo import TGRPOConfig, TGRPOTrainer, sampler_weights

SAMPLED = [[-1.5, -1.0], [-2.0]]
TRAINER = torch.tensor([-1.0, -2.0, -2.0])


def rollouts(*completions: list[float]) -> list[Rollout]:
    ids = [torch.ones(len(logprobs), dtype=torch.long) for logprobs in completions]
    pairs = zip(ids, completions, strict=True)
    return [Rollout(i, torch.tensor(values), "", "stop") for i, values in pairs]


def test_weights_and_series() -> None:
    meter = Meter()
    weights = sampler_weights(
        TRAINER, rollouts(*SAMPLED), VLLMSettings(importance_sampling_clip_max=1.2), meter
    )
    assert weights is not None
    # exp(0.5) = 1.649 is capped, exp(-1) = 0.368 and exp(0) = 1 are not
    torch.testing.assert_close(weights, torch.tensor([1.2, math.exp(-1), 1.0]))
    series = meter.drain()
    assert series["sampler/logprob_difference"] == pytest.approx(0.5)  # (0.5 + 1 + 0) ÷ 3
    assert series["sampler/logprob_difference_max"] == pytest.approx(1.0)
    assert series["sampler/share_capped"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        # ratios by token: e^0.5, e^-1 | 1; of the responses: e^-0.5 | 1
        ("token_truncate", (0.5, 1.2), [1.2, 0.5, 1.0]),
        ("token_mask", (0.5, 1.2), [0.0, 0.0, 1.0]),
        ("token_mask", (None, None), [math.exp(0.5), math.exp(-1), 1.0]),
        ("sequence_truncate", (0.7, None), [0.7, 0.7, 1.0]),
        ("sequence_mask", (None, 0.9), [math.exp(-0.5), math.exp(-0.5), 0.0]),
    ],
)
def test_modes_by_hand(mode: Any, bounds: tuple[float | None, float | None], expected: list[float]) -> None:
    low, high = bounds
    settings = VLLMSettings(
        importance_sampling_mode=mode, importance_sampling_clip_min=low,
        importance_sampling_clip_max=high,
    )  # fmt: skip
    weights = sampler_weights(TRAINER, rollouts(*SAMPLED), settings, Meter())
    torch.testing.assert_close(weights, torch.tensor(expected))


class StaleEngine(TransformersEngine):
    """Keeps the weights that it was made with."""

    def update_weights(self, model: Any) -> None:
        if not hasattr(self, "model"):
            super().update_weights(model)


@pytest.mark.parametrize("stale", [False, True])
def test_weights_that_do_not_arrive_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stale: bool
) -> None:
    """Before the first step, and once only."""
    processor = tiny_processor("qwen2_5_vl")
    sampler, policy = (tiny_model("qwen2_5_vl", processor.tokenizer, seed) for seed in (stale, 0))
    engine = StaleEngine(sampler, processor) if stale else None
    settings = {"num_generations": 2, "max_completion_length": 6, "length_reward": 0.0, "max_steps": 2}
    arguments = training_arguments(tmp_path, **settings, preflight_questions=0, save_strategy="no")
    trainer = TGRPOTrainer(
        policy, many_tokens, TGRPOConfig(**arguments, engine="vllm"), str(write_manifest(tmp_path)),
        processing_class=processor, engine=engine or TransformersEngine(policy, processor),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [record for record in caplog.records if "log-probs differ" in record.message]
    assert len(said) == stale
    lines = read_lines(tmp_path / "metrics.jsonl")
    differences = [line["sampler/logprob_difference"] for line in lines if "loss" in line]
    assert len(differences) == 2 and all((value > 0.1) == stale for value in differences)
    assert all((line["sampler/share_capped"] > 0) == stale for line in lines if "loss" in line)
