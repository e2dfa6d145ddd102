"""Media of the next step are read while the current step samples and learns."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tgrpo_trainers import make_trainer
from tiny_questions import read_lines, training_arguments, write_manifest
from transformers import TrainerCallback

from video_r1.data.manifests.records import Sample
from video_r1.training.sft import SFTConfig, SFTTrainer

BATCH, STEPS, SLOW = 3, 3, 0.3  # questions a step; steps; seconds that each read takes longer


class Watch(TrainerCallback):
    """Reads questions slowly and holds each step until all questions of the next step are read."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.readers: list[threading.Thread] = []  # one entry a question that has been read
        self.steps = 0

    def slow(self, load: Any) -> Any:
        def slow_load(sample: Sample) -> Any:
            time.sleep(SLOW)
            loaded = load(sample)
            with self.changed:
                self.readers.append(threading.current_thread())
                self.changed.notify_all()
            return loaded

        return slow_load

    def wait_for_next_step(self) -> None:
        count = BATCH * min(self.steps + 2, STEPS)
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.readers) >= count, timeout=10):
                pytest.fail(f"step {self.steps} waits, and {len(self.readers)} of {count} questions are read")

    def reward(self, completions: list[str], **columns: Any) -> list[float]:
        """In the middle of a T-GRPO step, between sampling and the update."""
        self.wait_for_next_step()
        return [float(len(text) % 7) for text in completions]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.wait_for_next_step()
        self.steps += 1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "micro_batches"), [("sft", 1), ("rl", 3)])
def test_the_next_steps_media_are_read_during_the_step(
    checkpoint: Path, tmp_path: Path, stage: str, micro_batches: int
) -> None:
    manifest = write_manifest(tmp_path, videos=6, images=3)
    watch, folder = Watch(), tmp_path / "run"
    changes = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "logging_steps": 1,
    }
    if stage == "rl":
        trainer: Any = make_trainer(
            checkpoint, str(manifest), folder, watch.reward, callbacks=[watch], **changes
        )
    else:
        arguments = SFTConfig(**training_arguments(folder, **changes))
        trainer = SFTTrainer(str(checkpoint), arguments, str(manifest), callbacks=[watch])
    trainer.load = watch.slow(trainer.load)
    trainer.train()
    assert len(watch.readers) == BATCH * STEPS and watch.steps == STEPS
    assert threading.main_thread() not in watch.readers
    # Two threads read three questions: who has to wait for them waits for two reads in turn.
    waits = [line["seconds/decode"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert waits[0] > 1.5 * SLOW and max(waits[1:]) < SLOW
