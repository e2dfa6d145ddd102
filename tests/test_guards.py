"""Bad numbers, full disks, read-only folders and lost trackers: a clear error or a degraded run."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_process import SERVER, write_into
from resume_runs import write_recipe
from safetensors.torch import load_file
from tgrpo_trainers import make_trainer, weights
from tiny_questions import read_lines
from transformers import TrainerCallback, TrainerState

from video_r1.errors import ConfigError, VideoR1Error
from video_r1.files import tolerated, warn_once
from video_r1.training.checkpoints import last_whole_checkpoint
from video_r1.training.guard import UpdateGuard


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    warn_once.cache_clear()


# ---- Numbers


def test_loss_that_is_not_finite_names_its_questions(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the first of two micro-batches: only its questions are recorded, no weight changes."""
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    before, poisoned = weights(trainer), []
    logprobs = trainer.logprobs

    def with_nan(model: Any, batch: Any, **options: Any) -> Any:
        result = logprobs(model, batch, **options)
        if trainer.state.global_step == 0 and not poisoned:
            poisoned.extend(batch.problem_ids)
            result.logprobs = result.logprobs * torch.nan
        return result

    monkeypatch.setattr(trainer, "logprobs", with_nan)
    changed_after_one = []

    class AfterOne(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = weights(trainer)
            changed_after_one.append(any(not torch.equal(now[name], before[name]) for name in now))

    trainer.add_callback(AfterOne())
    trainer.train()
    assert changed_after_one == [False, True]
    (line,) = read_lines(tmp_path / "skipped_updates.jsonl")
    assert line == {"step": 1, "not_finite": "loss", "problem_ids": poisoned} and len(poisoned) == 2


def test_skipped_updates_are_counted_on(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """A resumed run knows how many updates it skipped, and how many in a row; later records go."""
    guard = UpdateGuard(tmp_path, limit=3)
    lines = [{"step": step, "not_finite": "loss", "problem_ids": [1]} for step in (2, 5, 6, 7)]
    (tmp_path / "skipped_updates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = TrainerState(global_step=6, is_world_process_zero=True)
    guard.on_train_begin(None, state, None)  # pyright: ignore[reportArgumentType]
    assert (guard.skipped, guard.in_a_row) == (3, 2)
    assert len(read_lines(tmp_path / "skipped_updates.jsonl")) == 3


def test_a_step_of_cut_completions_is_warned_of(
    checkpoint: Path, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 2}
    make_trainer(checkpoint, str(manifest), tmp_path, **changes).train()
    said = [record.message for record in caplog.records if "mask_truncated" in record.message]
    assert len(said) == 1 and "max_completion_length (1 tokens), so it learns nothing" in said[0]


# ---- Disks


def limited(recipe: str, run: str, log: str, bytes_of_a_file: int) -> None:
    """A run whose files may not grow beyond a size: writing more fails, as on a disk that is full."""
    write_into(log)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, bytes_of_a_file))
    from video_r1.cli import main

    os._exit(main(["rl", recipe, "--output_dir", run]))


@pytest.mark.slow
def test_full_disk_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """The first checkpoint does not fit: one line says so; the same command succeeds with more room."""
    recipe = write_recipe(tmp_path, optim="adamw_torch", save_total_limit=None, max_steps=4)
    model = (tmp_path / "model" / "model.safetensors").stat().st_size
    log, run = tmp_path / "log", tmp_path / "run"
    # room for the weights, none for the optimizer's two moments
    process = SERVER.Process(target=limited, args=(str(recipe), str(run), str(log), model + 200_000))
    process.start()
    process.join(200)
    assert process.exitcode == 1, log.read_text()[-3000:]
    last = log.read_text().splitlines()[-1]
    assert "checkpoint-2 cannot be written" in last and "there is no earlier checkpoint" in last
    assert not list(run.glob("checkpoint-*")) and not (run / "unfinished").exists()
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    from video_r1.cli import main

    assert main(["rl", str(recipe), "--output_dir", str(run)]) == 0
    assert last_whole_checkpoint(run) == run / "checkpoint-4"
    assert load_file(run / "model.safetensors")


def test_a_record_that_cannot_be_written_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with tolerated("metrics.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
    (record,) = caplog.records
    assert "metrics.jsonl cannot be written (No space left on device)" in record.message


def test_folder_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error is a single line, before the model is loaded."""
    from video_r1.cli import main

    recipe = write_recipe(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["rl", str(recipe), "--output_dir", str(tmp_path / "file" / "run")]) == 1
    said = capfd.readouterr().err.splitlines()
    assert "cannot be written: Not a directory; choose another one" in said[-1]


# ---- Trackers


class Disconnected(ConnectionError):
    pass


def test_lost_tracker_does_not_end_the_run(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """TensorBoard writes what the Trainer logs; when it fails, metrics.jsonl has the series all the same."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    calls: list[int] = []

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise Disconnected("no route to host")

    trainer = make_trainer(checkpoint, str(manifest), tmp_path / "run", report_to="tensorboard", max_steps=2)
    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", fail)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert len(calls) >= 2
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    said = [record.message for record in caplog.records if "no route to host" in record.message]
    assert said == ["TensorBoardCallback: Disconnected: no route to host; training continues without it"]


def test_tracker_that_cannot_start_is_named(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise Disconnected("no route to host")

    monkeypatch.setattr(tensorboard.SummaryWriter, "__init__", fail)
    trainer = make_trainer(checkpoint, str(manifest), tmp_path, report_to="tensorboard")
    with pytest.raises(VideoR1Error, match=r"report_to: TensorBoardCallback.*set it to none"):
        trainer.train()


def test_tracker_that_is_not_there(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_to: .*wandbb"):
        make_trainer(checkpoint, str(manifest), tmp_path, report_to="wandbb")
