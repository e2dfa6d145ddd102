"""What a run on GPUs meets that CPU runs do not: DDP's `device_ids`, many GPUs in one process, another number
of processes than before.
"""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from distributed_process import run_processes
from resume_runs import same_weights
from test_distributed import FSDP2
from tgrpo_trainers import make_trainer
from tiny_models import tiny_checkpoint
from tiny_questions import training_arguments, write_manifest
from torch import nn

from video_r1.errors import ConfigError
from video_r1.files import replace_json
from video_r1.training.runs import check_processes
from video_r1.training.sft import SFTConfig
from video_r1.training.sharded import check_kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny_checkpoint("qwen2_5_vl", folder / "model")
    write_manifest(folder, videos=4, images=2)
    return folder


@pytest.mark.slow
@pytest.mark.dist
def test_ddp_with_device_ids(folder: Path) -> None:
    """As accelerate wraps a model for a GPU: DDP moves the forward's first argument there."""
    run_processes(1, "distributed_work:as_on_a_gpu", folder)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch for GPUs looks for the eight")
def test_one_gpu_of_eight(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with caplog.at_level(logging.WARNING):
        args = SFTConfig(**training_arguments(tmp_path, use_cpu=False, per_device_train_batch_size=3))
    assert args._n_gpu == 8
    assert (args.n_gpu, args.train_batch_size) == (1, 3)
    assert "accelerate launch --num_processes 8 -m video_r1" in caplog.text
    trainer = make_trainer(
        folder / "model", str(folder / "manifest.json"), tmp_path / "run", max_steps=1, use_cpu=False
    )
    assert trainer.args._n_gpu == 8
    trainer.train()
    assert not isinstance(trainer.model_wrapped, nn.DataParallel)


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would end with "duplicate GPU"; on the CPU, as the demo trains, they are one run."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started on this machine, which has 1 GPU"):
        SFTConfig(**training_arguments(tmp_path, use_cpu=False))
    assert SFTConfig(**training_arguments(tmp_path, use_cpu=True)).use_cpu
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    SFTConfig(**training_arguments(tmp_path, use_cpu=False))


def test_settings_decide_the_number_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not accelerate's file, whose mixed_precision its launcher puts into the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = SFTConfig(**training_arguments(tmp_path, bf16=False))
    assert (args.bf16, args.mixed_precision) == (False, "no")


def test_a_setting_that_would_compile_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch_compile is not supported"):
        SFTConfig(**training_arguments(tmp_path, torch_compile=True))


def read_steps(path: Path) -> list[list[int]]:
    """Of each step the questions that one process has trained on."""
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.dist
def test_half_as_many_processes_go_on_exactly(folder: Path) -> None:
    """Six questions, four a step: four processes up to step 3, in the second epoch, then two to step 5."""
    work, alone, shared = "distributed_work:part_of_a_run", "alone", "shared"
    run_processes(1, work, folder, 1, alone, 5, 4)
    run_processes(4, work, folder, 4, shared, 3, 1, environment=FSDP2)
    run_processes(2, work, folder, 2, shared, 5, 2, environment=FSDP2)
    steps = [
        [sorted(itertools.chain(*parts)) for parts in zip(*map(read_steps, sorted(files)), strict=True)]
        for files in ((folder / shared).glob(f"seen-*-{last}.json") for last in (3, 5))
    ]
    expected = [sorted(step) for step in read_steps(folder / alone / "seen-0-5.json")]
    assert steps[0] + steps[1] == expected and [len(step) for step in expected] == [4] * 5
    same_weights(folder / alone, folder / shared, 2e-5)


@pytest.mark.slow
@pytest.mark.dist
def test_weights_for_vllm_are_gathered_once(folder: Path) -> None:
    """FSDP2 has gathered them for the hand-over; asking the shards again would send all of them twice."""
    run_processes(2, "distributed_work:handed_over", folder, environment=FSDP2)


def test_another_number_of_questions_a_step_is_refused(tmp_path: Path) -> None:
    replace_json(tmp_path / "video_r1.json", {"processes": 8, "questions_per_step": 16})
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    check_processes(tmp_path, settings)
    with pytest.raises(
        ConfigError, match=r"16 questions a step \(8 processes\).*× gradient_accumulation_steps 16"
    ):
        check_processes(tmp_path, settings | {"gradient_accumulation_steps": 2})


@pytest.mark.parametrize(
    ("file", "kind", "said"),
    [
        (
            "optimizer.bin",
            "",
            "written by a run under FSDP, and this one is without sharding",
        ),
        ("optimizer.pt", "FSDP", "without sharding, and this one is under FSDP"),
        ("latest", "FSDP", "under DeepSpeed, and this one is under FSDP"),
    ],
)
def test_another_kind_of_run_is_refused(tmp_path: Path, file: str, kind: str, said: str) -> None:
    """Else the Trainer would go on with an empty optimizer, without a word."""
    (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=said):
        check_kind(tmp_path, kind)
    (tmp_path / file).unlink()
    check_kind(tmp_path, kind)  # a run that saves no optimizer


def test_deepspeed_goes_on_with_as_many_processes_only(tmp_path: Path) -> None:
    replace_json(tmp_path / "video_r1.json", {"processes": 8, "questions_per_step": 16})
    (tmp_path / "latest").write_text("global_step2")
    with pytest.raises(ConfigError, match="shards the optimizer's state over 8 processes"):
        check_processes(tmp_path, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8})
