"""Ctrl-C and SIGTERM in a run: a checkpoint after the step, the exit code, and how to resume."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from distributed_process import SERVER
from distributed_runs import Run
from resume_runs import command, comparable, finish, wait_for_phase, write_recipe
from test_resume import same_run
from tiny_questions import read_lines
from transformers import TrainerControl, TrainerState

from video_r1.files import is_finished
from video_r1.processes import Interrupted, ended_by_signals, told_of_signals
from video_r1.training.stopping import StopWhenAsked


def stoppable(words: list[str], output: str, phase: Any) -> None:
    """`resume_runs.command` that handles Ctrl-C, which background jobs of a shell ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command(words, output, phase)


def begin(recipe: Path, run: Path) -> Any:
    phase = SERVER.Value("i", 0)
    words = ["rl", str(recipe), "--output_dir", str(run)]
    process: Any = SERVER.Process(target=stoppable, args=(words, str(run.with_suffix(".log")), phase))
    process.start()
    process.phase = phase
    return process


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its only regular checkpoint is the last one."""
    return write_recipe(tmp_path_factory.mktemp("stopped"), save_steps=8)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    run = recipe.with_name("whole")
    finish(recipe, run)
    return run


@pytest.mark.slow
def test_a_stopped_run_resumes_exactly(recipe: Path, whole: Path) -> None:
    number, code = signal.SIGINT, 130
    run = recipe.with_name(f"stopped-{code}")
    process = begin(recipe, run)
    for _ in range(3):
        wait_for_phase("rollout", process)
        wait_for_phase("update", process)
    os.kill(process.pid, number)
    process.join(120)
    said = run.with_suffix(".log").read_text()
    assert process.exitcode == code, said[-3000:]
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert 3 <= step < 8
    assert f"video-r1: {number.name}: finishing this step" in said
    words = f"video-r1 rl {recipe} --output_dir {run}"
    last = f"interrupted; {checkpoint} is the last checkpoint; the same command resumes: {words}\n"
    assert said.endswith(f"video-r1: {last}") and "Traceback" not in said
    assert not is_finished(run) and not (run / "unfinished").exists()
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, step + 1))
    finish(recipe, run)
    same_run(run, whole)


@pytest.mark.slow
@pytest.mark.dist
def test_all_processes_stop_where_one_of_them_is_told(tmp_path: Path) -> None:
    settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 1, "max_steps": 6, "save_steps": 6}
    recipe = write_recipe(tmp_path, **settings)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Run(recipe, whole, {}).finish()
    run = Run(recipe, stopped, {})
    wait_for_phase("update", run.processes[0])
    os.kill(run.processes[1].pid, signal.SIGTERM)
    for process in run.processes:
        process.join(120)
    assert [process.exitcode for process in run.processes] == [143, 143], run.logs[0].read_text()[-2000:]
    (checkpoint,) = stopped.glob("checkpoint-*")
    said = run.logs[0].read_text()
    assert (
        f"{checkpoint} is the last checkpoint; the same command, with the same launcher on every machine,"
        in said
    )
    Run(recipe, stopped, {}).finish()
    assert comparable(whole) == comparable(stopped)
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()


def stopped_at(every: int, folder: Path, **environment: str) -> tuple[StopWhenAsked, int]:
    """The callback, and the step of ten at which it stops when the signal comes in the fourth."""
    stop, state, control = StopWhenAsked(folder, every), TrainerState(), TrainerControl()
    for state.global_step in range(1, 11):
        stop.on_step_begin(None, state, control)  # type: ignore[arg-type]
        if state.global_step == 4:
            stop.ask(signal.SIGTERM)
        stop.on_step_end(None, state, control)
        if control.should_training_stop:
            break
    return stop, state.global_step


@pytest.mark.parametrize(("every", "step"), [(1, 4), (3, 6), (4, 4)])
def test_it_stops_where_a_checkpoint_can_be_continued(every: int, step: int, tmp_path: Path) -> None:
    stop, stopped = stopped_at(every, tmp_path)
    assert stopped == step
    with pytest.raises(Interrupted, match="there is no checkpoint yet") as caught:
        stop.on_save(None, TrainerState(), None)
    assert caught.value.number == signal.SIGTERM


def test_a_signal_that_a_launcher_passes_on_is_no_second_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    stop = StopWhenAsked(tmp_path)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        stop.ask(number)
    stop.asked_at -= 2
    with pytest.raises(Interrupted):
        stop.ask(signal.SIGINT)
    monkeypatch.delenv("LOCAL_RANK")
    alone = StopWhenAsked(tmp_path)
    alone.ask(signal.SIGTERM)
    with pytest.raises(Interrupted):
        alone.ask(signal.SIGINT)


def test_a_library_keeps_its_handlers() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with told_of_signals(lambda number: None):
        assert {number: signal.getsignal(number) for number in before} == before
    heard: list[int] = []
    with ended_by_signals():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        with told_of_signals(heard.append):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before
    thread = threading.Thread(target=lambda: ended_by_signals().__enter__())
    thread.start()  # where Python allows no handlers
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
