"""T-GRPO with vLLM in the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_questions import read_lines

from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout import engine_factory
from video_r1.rollout.vllm.engine import VLLMEngine
from video_r1.training.tgrpo import TGRPOConfig, TGRPOTrainer

pytestmark = pytest.mark.vllm
STEPS = 4
SIZES: dict[str, Any] = {"frame_pixels": 56 * 56, "image_pixels": 56 * 56, "max_frames": 8}


@pytest.fixture
def shared_engine(vllm_engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Whoever builds a VLLMEngine gets the tests' one with its weights; returns what it was built with."""
    built: list[dict[str, Any]] = []

    def engine(model: Any, processor: Any, **settings: Any) -> VLLMEngine:
        built.append({"model": model, **settings})
        given = load_model(model, "float32") if isinstance(model, (str, Path)) else model
        vllm_engine.update_weights(given)
        return vllm_engine

    monkeypatch.setattr(engine_factory, "VLLMEngine", engine)
    monkeypatch.setattr(VLLMEngine, "close", lambda self: None)
    return built


def brevity(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that a few steps teach: half for every twelve tokens."""
    return [2.0 ** (-len(ids) / 12) for ids in completion_ids]


def trained(lab: Path, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of some T-GRPO steps on the lab's base."""
    args = TGRPOConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, num_generations=6, beta=0.0,
        learning_rate=1e-3, lr_scheduler_type="constant", max_completion_length=32, max_prompt_length=900,
        length_reward=0.0, preflight_questions=0, save_strategy="no", use_cpu=True, disable_tqdm=True,
        **SIZES, **changes,
    )  # fmt: skip
    model, processor = load_model(base_folder(), "float32"), load_processor(base_folder())
    TGRPOTrainer(model, brevity, args, str(lab / "rl.json"), processing_class=processor).train()
    return [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
def test_weights_arrive_after_each_step(
    lab: Path, tmp_path: Path, shared_engine: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    lines = trained(lab, tmp_path, use_vllm=True)
    (built,) = shared_engine
    assert built["max_model_len"] == 932 and built["dtype"] == "auto"
    assert "log-probs differ" not in caplog.text
    for line in lines:
        assert line["sampler/logprob_difference"] < 1e-3 and line["sampler/logprob_difference_max"] < 0.02
        assert line["sampler/share_capped"] == 0
    assert lines[-1]["reward/brevity"] > lines[0]["reward/brevity"] + 0.05
