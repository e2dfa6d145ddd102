"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes on CPU (gloo), with the files that come with the recipes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils import DeepSpeedOptimizerWrapper
from distributed_process import run_processes
from resume_runs import comparable, same_figures
from safetensors.torch import load_file
from test_distributed import same_run, same_text_run, text_questions
from test_safety import Bomb
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, write_manifest
from transformers import TrainerControl, TrainerState, TrainingArguments

from video_r1.errors import VideoR1Error
from video_r1.training.guard import UpdateGuard
from video_r1.training.sharded import check_training_state

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
RECIPES = Path(str(resources.files("video_r1") / "recipes"))


def settings_file(stage: int) -> str:
    return str(RECIPES / "deepspeed" / f"zero{stage}.json")


def launched(stage: int) -> dict[str, str]:
    """What `accelerate launch` with the recipes' file adds to the environment of its processes."""
    words = ["--config_file", str(RECIPES / "accelerate" / f"zero{stage}.yaml"), "--num_processes", "2"]
    words += ["--deepspeed_config_file", settings_file(stage), "-m", "video_r1", "rl"]
    started: dict[str, str] = {}

    def launcher(args: Any) -> None:
        started.update(launch.prepare_deepspeed_cmd_env(args)[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "deepspeed_launcher", launcher)
        launch.launch_command(launch.launch_command_parser().parse_args(words))
    return {name: value for name, value in started.items() if os.environ.get(name) != value}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_checkpoint("qwen2_5_vl", folder / "model")
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def rl_alone(folder: Path) -> Path:
    run_processes(1, "distributed_work:rl", folder, 1, "rl-1")
    return folder / "rl-1"


def two_processes(work: str, folder: Path, name: str, stage: int, by: str, **changes: Any) -> Path:
    """Runs `deepspeed_work:WORK`, set up by `accelerate launch` or by the setting `deepspeed`."""
    zero = settings_file(stage) if by == "setting" else None
    environment = launched(stage) if by == "launch" else {}
    run_processes(2, f"deepspeed_work:{work}", folder, name, zero, changes, environment=environment)
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "by"), [(2, "setting"), (3, "launch")])
def test_rl_equals_one_process(folder: Path, rl_alone: Path, stage: int, by: str) -> None:
    """With a reference model, validation, and two micro-batches a step; as in the recipes, activations are
    computed again.
    """
    run = two_processes("rl", folder, f"rl-zero{stage}", stage, by, gradient_checkpointing=True)
    same_run(rl_alone, run)
    kinds = [set(json.loads((run / f"kinds-{rank}.json").read_text())) for rank in (0, 1)]
    assert kinds[0] != kinds[1]  # what the processes see differs: a collective of one kind alone would hang


@pytest.mark.slow
def test_text_only_rows_and_a_teacher_equal_one_process(tmp_path: Path) -> None:
    text_questions(tmp_path)
    run_processes(1, "distributed_work:text", tmp_path, 1, "text-1")
    run = two_processes("text", tmp_path, "text-zero3", 3, "launch", eval_strategy="no", max_steps=2)
    same_text_run(tmp_path / "text-1", run)


@pytest.mark.slow
def test_episodes_equal_one_process(folder: Path) -> None:
    run_processes(1, "distributed_work:looks", folder, 1, "looks-1")
    run = two_processes("looks", folder, "looks-zero3", 3, "launch", eval_strategy="no", max_steps=3)
    same_run(folder / "looks-1", run)
    turns = [json.loads((run / f"kinds-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(turns) == [["0", "0", "0", "0"], ["0", "0", "1", "2"]]


@pytest.mark.slow
def test_a_run_resumes_exactly(folder: Path) -> None:
    """Weights, metrics and the optimizer's state, as if it had been killed in its second step."""
    settings = {"optim": "adamw_torch", "eval_strategy": "no", "per_device_train_batch_size": 1}
    whole = two_processes("part", folder, "whole", 3, "launch", **settings)
    killed = shutil.copytree(whole, folder / "killed")
    shutil.rmtree(killed / "checkpoint-2")
    (killed / "config.json").unlink()
    two_processes("part", folder, "killed", 3, "launch", **settings)
    assert comparable(whole) == comparable(killed)
    assert [line["step"] for line in read_lines(killed / "metrics.jsonl")] == [1, 2]
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert same_tensors(training_state(whole, 2), training_state(killed, 2))


@pytest.mark.slow
def test_updates_that_are_not_finite_are_left_out(folder: Path) -> None:
    """A nan loss in one process, then infinite gradients in the other: weights and moments stay."""
    run = two_processes("bad_numbers", folder, "bad-zero3", 3, "launch")
    first, second = read_lines(run / "skipped_updates.jsonl")
    culprits = json.loads((run / "culprits.json").read_text())
    assert first == {"step": 2, "not_finite": "loss", "problem_ids": culprits} and len(culprits) == 2
    assert (second["step"], second["not_finite"]) == (3, "gradient") and len(second["problem_ids"]) == 4
    assert [line["updates/skipped"] for line in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 2]
    weights = [(run / f"checkpoint-{step}" / "model.safetensors").read_bytes() for step in range(1, 5)]
    assert weights[0] == weights[1] == weights[2] != weights[3]
    states = [training_state(run, step) for step in (1, 3, 4)]
    assert same_tensors(states[0], states[1]) and not same_tensors(states[1], states[2])


def training_state(run: Path, step: int) -> list[Any]:
    """The optimizer's part of a checkpoint, of every process."""
    files = sorted((run / f"checkpoint-{step}" / f"global_step{step}").glob("*optim_states.pt"))
    assert len(files) == 2
    return [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in files]


def same_tensors(one: Any, other: Any) -> bool:
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
    assert len(pairs) > 4
    return all(torch.equal(a, b) for a, b in pairs)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested lists and dictionaries, in their order; DeepSpeed's counters are not compared."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)


@pytest.mark.slow
def test_adapters(folder: Path) -> None:
    """Their reference is the adapters as they were at first."""
    alone = folder / "lora-1"
    run_processes(1, "deepspeed_work:adapters", folder, alone.name, None, {})
    run = two_processes("adapters", folder, "lora-zero3", 3, "launch")
    same_figures(alone, run)
    assert read_lines(run / "metrics.jsonl")[1]["policy/kl"] > 1e-5
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (alone, run))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.vllm
@pytest.mark.slow
def test_zero3_with_vllm_in_the_processes(folder: Path) -> None:
    """vLLM has the trainer's weights before the first step and after each one."""
    run = two_processes("with_vllm", folder, "vllm", 3, "launch")
    steps = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["sampler/logprob_difference"] < 1e-3 for line in steps)
    assert "log-probs differ" not in (folder / "process-0.log").read_text()


@pytest.mark.parametrize(
    ("content", "tag", "message"),
    [
        ({"step": 1}, "global_step1", None),
        ("bomb", "global_step1", "would run .*pathlib"),
        ("text", "global_step1", "cannot be read as a training state"),
        ({"step": 1}, "../elsewhere", "no folder of this checkpoint"),
    ],
)
def test_a_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, content: Any, tag: str, message: str | None
) -> None:
    """DeepSpeed itself would unpickle it (the states of real runs pass: see the run that is continued)."""
    state, proof = tmp_path / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", tmp_path / "proof"
    state.parent.mkdir()
    (tmp_path / "latest").write_text(tag)
    if content == "text":
        state.write_text("no training state")
    else:
        torch.save({"state": Bomb(proof)} if content == "bomb" else content, state)
    with nullcontext() if message is None else pytest.raises(VideoR1Error, match=message):
        check_training_state(tmp_path)
    assert not proof.exists()


class Stepped(DeepSpeedOptimizerWrapper):
    """What is left of DeepSpeed's optimizer when a callback looks at it."""

    def __init__(self, skipped: bool) -> None:
        self.skipped = skipped

    @property
    def step_was_skipped(self) -> bool:
        return self.skipped


@pytest.mark.parametrize("skipped", [True, False])
def test_a_step_that_deepspeed_has_taken_ends_the_run(tmp_path: Path, skipped: bool) -> None:
    """Weights that a nan has spoiled are not trained any further."""
    guard = UpdateGuard(tmp_path, limit=3)
    guard.watch(torch.tensor(torch.nan), [7])
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(is_world_process_zero=True)
    with nullcontext() if skipped else pytest.raises(VideoR1Error, match="weights are spoiled"):
        guard.on_pre_optimizer_step(
            args, state, TrainerControl(), model=torch.nn.Linear(1, 1), optimizer=Stepped(skipped)
        )
    assert read_lines(tmp_path / "skipped_updates.jsonl")[0]["problem_ids"] == [7]
