"""Run folders: locks, the same rules for library and command line, readable files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_runs import finish, start, wait_for_phase, write_recipe
from tgrpo_trainers import make_trainer, weights
from tiny_questions import read_lines

from video_r1.cli import main
from video_r1.errors import ConfigError, RequestError
from video_r1.files import claimed
from video_r1.lab.demo import FOLDERS, MARK, empty_folders
from video_r1.models.loading import load_model, load_processor


def test_train_leaves_a_usable_folder(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """`train()` followed by nothing: run folder and checkpoint load as models with their processors, and
    others may read them as the umask has it.
    """
    before = os.umask(0o022)
    try:
        trainer = make_trainer(checkpoint, str(manifest), tmp_path / "run", max_steps=1)
        trainer.train()
    finally:
        os.umask(before)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        load_processor(folder)
        loaded = load_model(folder).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in weights(trainer).items())
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_library_runs_go_on_as_on_the_command_line(checkpoint: Path, manifest: Path, tmp_path: Path) -> None:
    """A second `train()` in the folder of a run: left alone, lengthened, or refused; no record is lost."""

    def trainer_of(**changes: Any) -> Any:
        settings = {"save_steps": 2, "max_steps": 2, "beta": 0.0, **changes}
        return make_trainer(checkpoint, str(manifest), tmp_path / "run", **settings)

    def steps() -> list[int]:
        return [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]

    trained = trainer_of()
    trained.train()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    again = trainer_of()
    assert again.train().global_step == 2  # finished: the model is taken up, no step is done
    assert all(torch.equal(value, weights(trained)[name]) for name, value in weights(again).items())
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == lines
    with pytest.raises(ConfigError, match=r"run with other settings: learning_rate \(0\.001 → 0\.1\)"):
        trainer_of(learning_rate=0.1).train()
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == lines
    longer = trainer_of(max_steps=3)
    longer.train()
    assert steps() == [1, 2, 3] and read_lines(tmp_path / "run" / "metrics.jsonl")[:2] == lines
    with claimed(tmp_path / "run"):
        pass  # released


@pytest.mark.slow
def test_two_commands_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one is refused with the first one's process; after a kill -9 the next one goes on."""
    recipe = write_recipe(tmp_path, max_steps=3)
    first = start(recipe, tmp_path / "run")
    wait_for_phase("rollout", first)
    os.kill(first.pid, signal.SIGSTOP)  # it is at work for as long as the other one takes to begin
    code = main(["rl", str(recipe), "--output_dir", str(tmp_path / "run")])
    first.kill()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, said
    assert said.startswith("video-r1: ")
    assert f"is being written by another command (process {first.pid} on" in said
    first.join()
    finish(recipe, tmp_path / "run")
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_demo_replaces_only_its_own_folders(tmp_path: Path) -> None:
    """A folder of somebody else, and a link, are refused before anything is removed."""
    empty_folders(tmp_path)
    (tmp_path / "eval-base").mkdir()  # of an earlier version, which had other stages
    (tmp_path / "eval-base" / MARK).touch()
    (tmp_path / "sft" / "weights").touch()
    empty_folders(tmp_path)
    assert [path.name for path in (tmp_path / "sft").iterdir()] == [MARK]
    (tmp_path / "sft" / "weights").touch()
    (tmp_path / "grpo" / MARK).unlink()
    (tmp_path / "grpo" / "mine").touch()
    with pytest.raises(RequestError, match=r"grpo would be replaced but was not written by a demo"):
        empty_folders(tmp_path)
    assert (tmp_path / "sft" / "weights").exists() and (tmp_path / "grpo" / "mine").exists()
    (tmp_path / "grpo" / "mine").unlink()
    (tmp_path / "grpo").rmdir()
    (tmp_path / "grpo").symlink_to(tmp_path / "lab")
    with pytest.raises(RequestError, match=r"grpo would be replaced"):
        empty_folders(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FOLDERS)
