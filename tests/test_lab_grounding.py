"""Questions of when and where, trained with the lab's small model: from clips to advantages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_questions import read_lines

from video_r1.cli import main
from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import Rollout
from video_r1.lab.questions import NAMED_FAMILIES
from video_r1.rewards.group import answer_scores, correct_mask, format_scores
from video_r1.training.advantages import group_advantages


def test_overlaps_become_advantages() -> None:
    """tIoU 1, 1/2 and 0 of a span of two seconds, and an answer without the form."""
    question = next(
        found
        for seed in range(99)
        if '"time": [0, 2]' in (found := NAMED_FAMILIES["when"](np.random.default_rng(seed))).answer
    )
    sample = Sample(
        1, question.problem, "video", "temporal grounding", f"<answer>{question.answer}</answer>", "x"
    )
    answers = ['{"time": [0, 2]}', '{"time": [1, 2]}', '{"time": [2, 4]}', "from 0 to 2"]
    rollouts = [
        Rollout(
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3),
            f"<think>x</think><answer>{answer}</answer>",
            "stop",
        )
        for answer in answers
    ]
    scores, formatted = answer_scores(sample, rollouts), format_scores(sample, rollouts)
    assert scores.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert formatted.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert correct_mask(sample, scores, 0.4).tolist() == [True, True, False, False]
    [advantages] = group_advantages((scores + formatted)[None])
    # rewards 2, 1.5, 1 and 0: mean 1.125, sample deviation √(35/48)
    assert advantages.tolist() == pytest.approx(
        ((scores + formatted - 1.125) / (35 / 48) ** 0.5).tolist(), abs=1e-3
    )


@pytest.mark.slow
def test_a_model_learns_to_say_when_and_is_paid_for_overlaps(tmp_path: Path) -> None:
    lab, sft, rl = tmp_path / "lab", tmp_path / "sft", tmp_path / "rl"
    assert (
        main(["lab", "make", str(lab), "--train", "96", "--test", "8", "--families", "when,box_at_end"]) == 0
    )
    trained = [
        "sft",
        "lab-sft",
        "--train_manifest",
        str(lab / "sft.json"),
        "--output_dir",
        str(sft),
        "--max_steps",
        "120",
    ]
    assert main([*trained, "--use_cpu", "true"]) == 0
    asked = ["rl", "lab-tgrpo", "--model_name_or_path", str(sft), "--train_manifest", str(lab / "rl.json")]
    asked += [
        "--output_dir",
        str(rl),
        "--max_steps",
        "3",
        "--max_completion_length",
        "96",
        "--use_cpu",
        "true",
    ]
    assert main(asked) == 0
    groups = read_lines(rl / "rollouts.jsonl")
    scores = [item["rewards"]["accuracy"] for group in groups for item in group["ordered"]]
    assert all(0 <= score <= 1 for score in scores)
    assert any(0 < score < 1 for score in scores), scores  # an overlap, neither right nor wrong
    assert any(item["rewards"]["format"] for group in groups for item in group["ordered"])
    credited = [
        [item["advantage"] for item in group["ordered"]]
        for group in groups
        if len({item["rewards"]["accuracy"] for item in group["ordered"]}) > 1
    ]
    assert credited and all(any(advantages) for advantages in credited)
    [first, *_] = read_lines(rl / "metrics.jsonl")
    kinds = {name.rpartition("/")[2] for name in first if name.startswith("reward/accuracy/")}
    assert kinds & {"temporal grounding", "spatial grounding"}
