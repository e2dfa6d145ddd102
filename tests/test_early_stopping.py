"""Validation that ends a run and finds its best model, also when the run is killed and started again.

The accuracies are scripted, so that it is known beforehand where a run has to stop; all else is the real run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed_process import SERVER, write_into
from resume_runs import any_format, comparable, write_recipe
from tiny_questions import read_lines
from transformers import EarlyStoppingCallback, TrainerState

from video_r1.cli import main
from video_r1.rewards import scoring
from video_r1.studio.folders import Found
from video_r1.studio.overview import overview
from video_r1.training.run_trainer import RunTrainer
from video_r1.training.tgrpo import TGRPOTrainer

#             step 0    1    2    3    4    5    6    7    8
ACCURACIES = [0.0, 0.1, 0.2, 0.6, 0.5, 0.6, 0.4, 0.9, 0.9]
BEST, STOP = 3, 6  # 4, 5 and 6 are not better than 3: a patience of three ends there


def scripted(trainer: TGRPOTrainer, samples: Any) -> dict[str, float]:
    """Replace the answers to held-out questions by scripted accuracies."""
    return {"accuracy": ACCURACIES[trainer.state.global_step]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run ends without a checkpoint of its last step. Its checkpoints also have moments of the tasks."""
    folder = tmp_path_factory.mktemp("early")
    return write_recipe(
        folder, eval_manifest=str(folder / "manifest.json"), eval_strategy="steps", eval_steps=1,
        eval_on_start=True, metric_for_best_model="eval_accuracy", load_best_model_at_end=True,
        early_stopping_patience=3, save_steps=4, save_total_limit=2, num_generations=2,
        max_completion_length=4, scale_rewards="task",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """A run that nothing disturbed."""
    run = recipe.with_name("whole")
    train(recipe, run)
    return run


def train(recipe: Path, run: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TGRPOTrainer, "validate", scripted)
        patch.setattr(scoring, "format_scores", any_format)
        assert main(["rl", str(recipe), "--output_dir", str(run)]) == 0


def killed(recipe: Path, run: Path, method: str, step: int) -> None:
    """Starts the run, which kills itself with signal 9 when the trainer calls `method` at that step."""
    output = recipe.with_suffix(".log")
    process: Any = SERVER.Process(target=suicide, args=(str(recipe), str(run), str(output), method, step))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL, output.read_text()[-3000:]


def suicide(recipe: str, run: str, output: str, method: str, step: int) -> None:
    write_into(output)
    setattr(TGRPOTrainer, "validate", scripted)  # noqa: B010 - not its declared form
    scoring.format_scores = any_format
    unharmed = getattr(TGRPOTrainer, method)

    def last_act(trainer: TGRPOTrainer, *args: Any, **options: Any) -> Any:
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return unharmed(trainer, *args, **options)

    setattr(TGRPOTrainer, method, last_act)
    main(["rl", recipe, "--output_dir", run])


def weights_file(folder: Path) -> bytes:
    (file,) = (path for path in folder.iterdir() if path.suffix == ".safetensors")
    return file.read_bytes()


def saved_state(run: Path) -> dict[str, Any]:
    """Read patience and task moments from the best checkpoint."""
    state = json.loads((run / f"checkpoint-{BEST}" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]
    return {name: kept[name] for name in ("EarlyStoppingCallback", "TaskMoments") if name in kept}


def ended_at_the_best(run: Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    validated = [(line["step"], line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
    assert validated == list(enumerate(ACCURACIES))[: STOP + 1]
    assert max(line["step"] for line in lines) == STOP
    assert lines[-1]["stopped_early"] == STOP - BEST
    row = overview(Found(run.name, run, run.parent))
    why = f"early, after step {STOP}: {STOP - BEST} validations in a row brought no better model"
    assert (row["state"], row["why"]) == ("finished", why)
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{BEST}", "checkpoint-4"}
    assert weights_file(run) == weights_file(run / f"checkpoint-{BEST}")
    assert weights_file(run) != weights_file(run / "checkpoint-4")


@pytest.mark.slow
def test_patience_ends_the_run_at_its_best_model(whole: Path, recipe: Path) -> None:
    """The best model, between two save_steps, has its checkpoint, which outlives later ones."""
    ended_at_the_best(whole)
    before = (whole / "metrics.jsonl").read_bytes()
    train(recipe, whole)  # a finished run is left as it is
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_kills_neither_lengthen_patience_nor_lose_the_best_model(whole: Path, recipe: Path) -> None:
    """Killed before the first checkpoint is written; when two of three bad validations are behind it; moved;
    killed when the model is about to be saved, after the third one.
    """
    first, run = recipe.with_name("first"), recipe.with_name("moved")
    killed(recipe, first, "_save_checkpoint", 1)
    assert not list(first.glob("checkpoint-*"))
    killed(recipe, first, "validate", STOP)
    first.rename(run)
    killed(recipe, run, "publish_model", STOP)
    assert not list(run.glob("*.safetensors"))
    train(recipe, run)
    ended_at_the_best(run)
    assert comparable(run) == comparable(whole)
    assert weights_file(run) == weights_file(whole)
    assert saved_state(run) == saved_state(whole)
    assert "TaskMoments" in saved_state(run)
    shutil.rmtree(run)


def test_a_best_checkpoint_between_updates_on_the_same_rollouts_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rl", str(recipe), "--output_dir", str(tmp_path / "run"), "--num_iterations", "2"]
    assert main(words) == 2
    assert "eval_steps" in (said := capsys.readouterr().err) and "no multiple of num_iterations (2)" in said


@pytest.mark.parametrize(
    ("best", "shown"), [(0.0, "accuracy 0 of step 3"), (0.25, "accuracy 0.25 of step 3")]
)
def test_the_best_figure_is_named_also_if_it_is_zero(
    best: float, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    logged: list[dict[str, float]] = []
    stop = EarlyStoppingCallback(2)
    stop.early_stopping_patience_counter = 2
    trainer: Any = SimpleNamespace(
        callback_of=lambda kind: stop, folder="runs/x", log=logged.append,
        args=SimpleNamespace(metric_for_best_model="accuracy"),
        state=TrainerState(global_step=9, max_steps=20, best_metric=best, best_global_step=3),
    )  # fmt: skip
    RunTrainer.report_early_stop(trainer)
    assert logged == [{"stopped_early": 2.0}] and shown in caplog.text
