"""Two ranks on CPU (gloo) equal one process: DDP and FSDP2, T-GRPO and SFT, float32 and bf16."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_process import run_processes
from resume_runs import same_figures, same_weights
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, write_manifest
from torch import Tensor

from video_r1.errors import ConfigError
from video_r1.training.sharded import check_sharding_of

pytestmark = pytest.mark.dist
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny_checkpoint("qwen2_5_vl", folder / "model")
    write_manifest(folder)
    run_processes(1, "distributed_work:sft", folder, 1, "sft-1")
    return folder


def same_run(one: Path, two: Path) -> None:
    """Loss and every logged figure, every gradient and every weight, within 1e-5."""
    same_figures(one, two)
    gradients = [torch.load(run / "gradients.pt", weights_only=True) for run in (one, two)]
    for alone, together in zip(*gradients, strict=True):
        assert alone.keys() == together.keys() and len(alone) > 20
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=1e-5, msg=name)
    same_weights(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "environment"), [("ddp", {}), ("fsdp2", FSDP2)])
def test_rl_equals_one_process(folder: Path, kind: str, environment: dict[str, str]) -> None:
    if not (folder / "rl-1").exists():
        run_processes(1, "distributed_work:rl", folder, 1, "rl-1")
    run = folder / f"rl-{kind}"
    run_processes(2, "distributed_work:rl", folder, 2, run.name, environment=environment)
    same_run(folder / "rl-1", run)
    kinds = [set(json.loads((run / f"kinds-{rank}.json").read_text())) for rank in (0, 1)]
    assert kinds[0] != kinds[1]  # what the processes see differs: a collective of one kind alone would hang


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "environment"), [("ddp", {}), ("fsdp2", FSDP2)])
def test_episodes_equal_one_process(folder: Path, kind: str, environment: dict[str, str]) -> None:
    if not (folder / "looks-1").exists():
        run_processes(1, "distributed_work:looks", folder, 1, "looks-1")
    run = folder / f"looks-{kind}"
    run_processes(2, "distributed_work:looks", folder, 2, run.name, environment=environment)
    same_run(folder / "looks-1", run)
    turns = [json.loads((run / f"kinds-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(turns) == [["0", "0", "0", "0"], ["0", "0", "1", "2"]]


def text_questions(folder: Path) -> None:
    """Write a model with DeepStack, its teacher, and a question about a clip beside one of text alone."""
    tiny_checkpoint("qwen3_vl", folder / "model")
    tiny_checkpoint("qwen3_vl", folder / "teacher", seed=1)
    clip, *_, words = json.loads(write_manifest(folder, 1, 1).read_text())
    words = {**words, "problem_id": "words", "data_type": "text", "path": None}
    clip["process"] = words["process"] = "<think>It moves.</think>"
    (folder / "text.json").write_text(json.dumps([clip, words]))


def same_text_run(one: Path, two: Path) -> None:
    """A rank without visuals takes part in every collective of the towers."""
    same_run(one, two)
    assert all("teacher/kl" in line for line in read_lines(two / "metrics.jsonl") if "loss" in line)
    kinds = [json.loads((two / f"kinds-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(kinds) == [["text"], ["video"]]
    one, two = (run.with_name(f"{run.name}-sft") for run in (one, two))
    same_figures(one, two)
    same_weights(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "environment"), [("ddp", {}), ("fsdp2", FSDP2)])
def test_text_only_rows_and_a_teacher_equal_one_process(
    tmp_path: Path, kind: str, environment: dict[str, str]
) -> None:
    text_questions(tmp_path)
    run_processes(1, "distributed_work:text", tmp_path, 1, "text-1")
    run_processes(2, "distributed_work:text", tmp_path, 2, f"text-{kind}", environment=environment)
    same_text_run(tmp_path / "text-1", tmp_path / f"text-{kind}")


@pytest.mark.slow
def test_hybrid_rl_equals_one_process(tmp_path: Path) -> None:
    """Layers whose states are forked, within the hooks of FSDP2."""
    tiny_checkpoint("qwen3_5", tmp_path / "model")
    write_manifest(tmp_path)
    run_processes(1, "distributed_work:rl", tmp_path, 1, "rl-1")
    run_processes(2, "distributed_work:rl", tmp_path, 2, "rl-2", environment=FSDP2)
    same_run(tmp_path / "rl-1", tmp_path / "rl-2")


@pytest.mark.parametrize(
    ("kind", "environment", "changes"),
    [
        ("ddp", {}, {}),  # the canary of everything that needs two ranks
        # tokens are counted over all ranks, whether or not the Trainer is told to
        pytest.param("fsdp2", FSDP2, {"average_tokens_across_devices": False}, marks=pytest.mark.slow),
    ],
)
def test_sft_equals_one_process(
    folder: Path, kind: str, environment: dict[str, str], changes: dict[str, bool]
) -> None:
    run = folder / f"sft-{kind}"
    run_processes(2, "distributed_work:sft", folder, 2, run.name, False, changes, environment=environment)
    same_run(folder / "sft-1", run)


@pytest.mark.parametrize(
    ("version", "kind", "message"),
    [
        (1, "FULL_STATE_DICT", "trains and saves models here: set fsdp_version: 2 in"),
        (2, "SHARDED_STATE_DICT", "set fsdp_state_dict_type: FULL_STATE_DICT in"),
    ],
)
def test_fsdp_that_cannot_train_or_save_is_refused(version: int, kind: str, message: str) -> None:
    """These are accelerate's defaults."""
    plugin = SimpleNamespace(fsdp_version=version, state_dict_type=SimpleNamespace(name=kind))
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ConfigError, match=message):
        check_sharding_of(torch.nn.Linear(1, 1), accelerator)


@pytest.mark.slow
def test_adapters_and_their_reference_equal_one_process(folder: Path) -> None:
    """FSDP2 shards the adapters that train; those that the KL term is taken to are whole in each process."""
    run_processes(1, "distributed_work:adapters", folder, 1, "lora-1")
    run_processes(2, "distributed_work:adapters", folder, 2, "lora-fsdp2", environment=FSDP2)
    same_figures(folder / "lora-1", folder / "lora-fsdp2")
    kl = [line["policy/kl"] for line in read_lines(folder / "lora-fsdp2" / "metrics.jsonl") if "loss" in line]
    assert abs(kl[0]) < 1e-6 < 1e-5 < kl[-1]


@pytest.mark.slow
def test_bf16_logprobs_stay_near_float32(folder: Path) -> None:
    """T-GRPO under bf16 mixed precision: policy and reference, whose difference is the KL term."""
    run = folder / "mixed"
    run_processes(2, "distributed_work:mixed", folder, 2, run.name, environment=FSDP2)
    for rank in (0, 1):
        found = torch.load(run / f"logprobs-{rank}.pt", weights_only=True)
        for side in ("policy", "reference"):
            difference = (found[side] - found["exact"]).abs()
            assert found[side].dtype == torch.float32 and not bool(on_bf16_grid(found[side]).all())
            assert 1e-4 < float(difference.mean()) < 0.05 and float(difference.max()) < 0.25
        assert torch.equal(found["policy"], found["reference"])  # nothing has been learnt yet


def on_bf16_grid(values: Tensor) -> Tensor:
    return values == values.bfloat16().float()


@pytest.mark.slow
def test_bf16_gradients_stay_near_float32(folder: Path) -> None:
    """SFT under bf16 mixed precision, first step: loss within 0.2 %, gradients within 10 % of their norm and
    added up in float32.
    """
    run = folder / "sft-bf16"
    unclipped = {"max_grad_norm": 0.0}
    run_processes(2, "distributed_work:sft", folder, 2, run.name, True, unclipped, environment=FSDP2)
    logs = [read_lines(path / "metrics.jsonl") for path in (folder / "sft-1", run)]
    assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=2e-3)
    gradients = [torch.load(path / "gradients.pt", weights_only=True) for path in (folder / "sft-1", run)]
    one, two = (torch.cat([g.flatten() for g in steps[0].values()]) for steps in gradients)
    assert two.dtype == torch.float32 and float(on_bf16_grid(two).float().mean()) < 0.6
    one, two = one / one.norm(), two / two.norm()  # those of one process are clipped
    assert 1e-4 < float((two - one).norm()) < 0.1


@pytest.mark.slow
def test_questions_that_do_not_divide(tmp_path: Path, folder: Path) -> None:
    """Five questions, two processes, two questions each: the second step is filled up from the epoch's start,
    as one process with four questions a step does it. Validation answers each of the five once.
    """
    (tmp_path / "model").symlink_to(folder / "model")
    write_manifest(tmp_path, videos=3, images=2)
    run_processes(1, "distributed_work:uneven", tmp_path, 1, "one")
    run_processes(2, "distributed_work:uneven", tmp_path, 2, "two", environment=FSDP2)
    alone = json.loads((tmp_path / "one" / "seen-0.json").read_text())
    order = [question for step in alone for question in step][:5]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert alone == [order[:4], [order[4], *order[:3]]]
    together = [json.loads((tmp_path / "two" / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert together == [[order[:2], [order[4], order[0]]], [order[2:4], order[1:3]]]
    before = [read_lines(tmp_path / run / "metrics.jsonl")[0] for run in ("one", "two")]
    assert before[0]["step"] == 0 and before[0].keys() == before[1].keys()
    for name, value in before[0].items():
        if name.startswith("eval_"):
            assert before[1][name] == pytest.approx(value, abs=1e-5), name
    assert before[1]["eval_questions"] == 5
