"""Which questions a step keeps: groups without variance are replaced."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from resume_runs import comparable
from selected_questions import mostly_equal, odd_sums
from tgrpo_trainers import make_trainer, weights
from tiny_questions import read_lines
from torch import equal

from video_r1.training.questions import Slot
from video_r1.training.selection import Answered
from video_r1.training.tgrpo import TGRPOTrainer


def step_groups(trainer: TGRPOTrainer) -> list[Any]:
    return [group for batch in trainer.step.batches for group in batch.groups]


@pytest.mark.parametrize(("rounds", "calls"), [(1, 2), (20, 0)])
def test_groups_without_variance_are_replaced(
    checkpoint: Path, manifest: Path, tmp_path: Path, rounds: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the step is full or the rounds are used up; the share is a series."""
    asked: list[list[Slot]] = []
    answer = TGRPOTrainer.answer

    def counted(self: TGRPOTrainer, ready: Any) -> Any:
        asked.append([entry.slot for entry in ready])
        return answer(self, ready)

    monkeypatch.setattr(TGRPOTrainer, "answer", counted)
    trainer = make_trainer(
        checkpoint, str(manifest), tmp_path, rewards=mostly_equal, dynamic_sampling=rounds, max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    flat = [
        Answered(Slot(0, 0), group.rollouts, group.rewards).teaches_nothing for group in step_groups(trainer)
    ]
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["groups/no_variance"] == sum(flat) / 8
    if rounds == 20:
        assert not any(flat) and 3 <= len(asked) <= 21
        assert line["groups/replaced"] == 5 / 8  # questions 1, 2, 4, 5 and 7 of the eight
        assert [len(slots) for slots in asked] == sorted((len(slots) for slots in asked), reverse=True)
    else:
        assert any(flat) and len(asked) == calls
        assert line.get("groups/replaced", 0.0) == (5 - sum(flat)) / 8
    left_out = read_lines(tmp_path / "left_out.jsonl")
    groups = [(group.sample.problem_id, bare) for group, bare in zip(step_groups(trainer), flat, strict=True)]
    kept = [line for line in left_out if line["reason"] == "no variance"]
    assert [line["problem_id"] for line in kept] == [name for name, bare in groups if bare]
    replaced = [line for line in left_out if line["reason"] == "replaced"]
    assert len(replaced) + len(kept) == 5
    assert {line["replaced_by"] for line in replaced} <= {name for name, bare in groups if not bare}
    tried = [line for line in left_out if line["reason"] == "tried"]
    assert len(left_out) == 5 + len(tried) and len(tried) == sum(map(len, asked[1:])) - len(replaced)
    assert all(line["step"] == 1 and line["reward"] == 0.5 and "accuracy" in line for line in left_out)
    assert all(line["round"] == 0 for line in kept + replaced) and all(line["round"] > 0 for line in tried)
    assert all(slot.round == number for number, slots in enumerate(asked) for slot in slots)
    assert len({(slot.index, slot.round) for slots in asked for slot in slots}) == sum(map(len, asked))


def test_groups_are_written_down_once_for_all_updates_on_them(
    checkpoint: Path, manifest: Path, tmp_path: Path
) -> None:
    make_trainer(
        checkpoint, str(manifest), tmp_path, log_rollouts=1, rewards=mostly_equal, num_iterations=2,
        max_steps=4, per_device_train_batch_size=4,
    ).train()  # fmt: skip
    left_out = read_lines(tmp_path / "left_out.jsonl")
    assert [line["step"] for line in left_out] == sorted(line["step"] for line in left_out)
    assert {line["step"] for line in left_out} == {1, 3}
    assert {line["reason"] for line in left_out} == {"no variance"}
    assert [line["step"] for line in read_lines(tmp_path / "rollouts.jsonl")] == [1, 3]
    sampled = ["reward/total" in line for line in read_lines(tmp_path / "metrics.jsonl")]
    assert sampled == [True, False, True, False]


@pytest.mark.slow
def test_a_run_resumes_exactly(
    checkpoint: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, over the end of an epoch (two steps); also where the Trainer puts callbacks with the state
    of the checkpoint in place of others, as early stopping wants it.
    """
    monkeypatch.setattr("video_r1.rewards.scoring.answer_scores", odd_sums)
    settings: dict[str, Any] = {
        "rewards": mostly_equal, "dynamic_sampling": 2, "max_steps": 5,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1,
        "log_rollouts": 9,
    }  # fmt: skip
    whole = make_trainer(checkpoint, str(manifest), tmp_path / "whole", **settings)
    whole.train()
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert any(line["groups/replaced"] > 0 for line in lines)
    rollouts, left_out = (read_lines(tmp_path / "whole" / f"{n}.jsonl") for n in ("rollouts", "left_out"))
    assert {line["reason"] for line in left_out} == {"replaced", "tried", "no variance"}
    for step, restored in ((1, False), (3, True)):
        half = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", half)
        settings["restore_callback_states_from_checkpoint"] = restored
        resumed = make_trainer(checkpoint, str(manifest), half, **settings)
        resumed.train(resume_from_checkpoint=str(half / f"checkpoint-{step}"))
        assert comparable(half) == comparable(tmp_path / "whole")
        assert read_lines(half / "rollouts.jsonl") == rollouts
        assert read_lines(half / "left_out.jsonl") == left_out
        for name, value in weights(whole).items():
            assert equal(value, weights(resumed)[name]), name
