"""Rewards and scores by which some groups of a random model have no variance, and some questions are hard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import Rollout


def mostly_equal(completion_ids: list[list[int]], problem_id: list[Any], **columns: Any) -> list[float]:
    """The same for all completions to two questions of three."""
    return [
        sum(ids) % 97 / 97 if n % 3 == 0 else 0.5 for ids, n in zip(completion_ids, problem_id, strict=True)
    ]


def odd_sums(sample: Sample, rollouts: Sequence[Rollout]) -> Tensor:
    """Replace the scores of answers: an odd sum of token ids is right, and question 0 always is."""
    scores = [float(rollout.token_ids.sum() % 2) for rollout in rollouts]
    return torch.tensor([1.0] * len(scores) if sample.problem_id == 0 else scores)
