"""kill -9 at any moment, and the same command again: nothing of the run is lost or changed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from resume_runs import comparable, finish, kill_often, start, wait_for_phase, write_recipe
from tiny_questions import read_lines

from video_r1.files import is_finished
from video_r1.training.checkpoints import last_whole_checkpoint, publish_files, publish_folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("resume"), max_steps=6)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> tuple[Path, float]:
    """A run that nothing disturbed, and the seconds from its first step to its last."""
    run = recipe.with_name("whole")
    finish(recipe, run)
    return run, read_lines(run / "metrics.jsonl")[-1]["time"]


def same_run(one: Path, other: Path) -> None:
    """Metrics, recorded rollouts and every weight, bit for bit."""
    assert comparable(one) == comparable(other)
    lines = read_lines(one / "metrics.jsonl")
    last = lines[-1]["step"]
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert last >= 6 and lines[-1]["policy/kl"] > 1e-5  # it has learned something
    assert read_lines(one / "rollouts.jsonl") == read_lines(other / "rollouts.jsonl")
    for name in (
        "model.safetensors",
        f"checkpoint-{last}/model.safetensors",
        f"checkpoint-{last}/optimizer.pt",
    ):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not (one / "unfinished").exists()


def test_one_kill(recipe: Path, whole: tuple[Path, float]) -> None:
    """Killed in the rollout of a later step, then continued: bit for bit the undisturbed run."""
    run = recipe.with_name("killed")
    process = start(recipe, run)
    while process.is_alive() and not (run / "checkpoint-4").exists():
        time.sleep(0.01)
    wait_for_phase("rollout", process)
    process.kill()
    process.join()
    assert not is_finished(run) and (run / "checkpoint-4").exists()
    finish(recipe, run)
    same_run(run, whole[0])


@pytest.mark.slow
def test_six_kills(recipe: Path, whole: tuple[Path, float]) -> None:
    """At random moments, every other one while a checkpoint is written."""
    seen = kill_often(recipe, recipe.with_name("killed-often"), 6, whole[1], seed=2)
    for finished in seen.finished:
        same_run(finished, whole[0])
    assert seen.moments["writing a checkpoint"] > 0


@pytest.mark.slow
def test_killed_while_the_model_is_saved(recipe: Path, whole: tuple[Path, float]) -> None:
    """All steps are done: the model comes from the last checkpoint, without another step."""
    run = recipe.with_name("late")
    process = start(recipe, run)
    wait_for_phase("writing the model", process)
    process.kill()
    process.join()
    assert not is_finished(run)
    finish(recipe, run)
    assert is_finished(run)
    same_run(run, whole[0])
    before = (run / "metrics.jsonl").read_bytes()
    finish(recipe, run)  # a finished run is left as it is
    assert (run / "metrics.jsonl").read_bytes() == before


def fill(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(text)
    return folder


def test_a_checkpoint_replaces_another_as_a_whole(tmp_path: Path) -> None:
    target = fill(tmp_path / "checkpoint-2", "old")
    (target / "of the old one alone").write_text("x")
    publish_folder(fill(tmp_path / "unfinished" / "checkpoint-2", "new"), target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert (target / "model.safetensors").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_model_is_there_when_its_config_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (moved.append(a.name), replace(a, b))[1])
    publish_files(fill(tmp_path / "unfinished" / "model", "new"), tmp_path)
    assert moved == ["model.safetensors", "config.json"]
    assert (tmp_path / "config.json").read_text() == "new"


def test_half_written_checkpoints_are_not_found(tmp_path: Path) -> None:
    """Neither this package nor transformers takes an unfinished folder for a checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

    for step in (2, 4):
        fill(tmp_path / f"checkpoint-{step}", "x")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    fill(tmp_path / "unfinished" / "checkpoint-6", "x")
    (tmp_path / "unfinished" / "checkpoint-6" / "trainer_state.json").write_text(
        json.dumps({"global_step": 6})
    )
    newest = tmp_path / "checkpoint-4"
    assert last_whole_checkpoint(tmp_path) == newest
    assert get_last_checkpoint(str(tmp_path)) == str(newest)
    assert sort_checkpoints(str(tmp_path))[-1] == str(newest)
    (newest / "trainer_state.json").write_text('{"global_st')  # of a version that wrote in place
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
