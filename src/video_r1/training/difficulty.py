"""A running record of how often each question is answered right, and the questions that it leaves.

    a ← (a + p) ÷ 2,   p the share of correct ordered completions whenever the question is asked; first a = p

What is asked in an epoch follows from the epochs before it: media are read some steps ahead, and a run that
is continued has to read the same ones. So the record has two values of a question: now, and before its last
epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from video_r1.data.manifests.records import Sample
from video_r1.data.rollouts import RolloutGroup
from video_r1.errors import VideoR1Error
from video_r1.processes import gather_lists

Accuracy = tuple[float | None, int, float]
"""Of a question: before the epoch in which it was last asked (None: never), that epoch, and now."""


class Difficulty(TrainerCallback, ExportableState):
    """Keeps the questions whose accuracy is unknown or in [low, high] (`difficulty_range`).

    The record is the same in every process and lies in a checkpoint's trainer_state.json.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.record: dict[str, Accuracy] = {}
        self.kept: dict[int, Sequence[int]] = {}  # by epoch

    def state(self) -> dict[str, Any]:
        return {"args": {"low": self.low, "high": self.high}, "attributes": {"record": self.record}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **rest: Any) -> None:
        callbacks: Any = state.stateful_callbacks  # of a new run or of the checkpoint
        saved = callbacks[type(self).__name__]["attributes"]["record"]
        self.record = {name: (before, epoch, now) for name, (before, epoch, now) in saved.items()}
        self.kept = {}

    def add(self, groups: Sequence[RolloutGroup], epochs: Sequence[int]) -> None:
        """Takes in some groups, asked in these epochs. Every process calls it with its own."""
        own = [(str(g.sample.problem_id), epoch, g.p) for g, epoch in zip(groups, epochs, strict=True)]
        everyone, _ = gather_lists(own)
        for name, epoch in sorted({(name, epoch) for name, epoch, _ in everyone}):
            shares = [p for other, _, p in everyone if other == name]
            self.record[name] = updated(self.record.get(name), epoch, math.fsum(shares) / len(shares))

    def choices(self, samples: Sequence[Sample], epoch: int) -> Sequence[int]:
        """The questions to ask in an epoch, by number, ascending. Raises VideoR1Error where none is left."""
        if epoch not in self.kept:
            known = [accuracy_before(self.record.get(str(sample.problem_id)), epoch) for sample in samples]
            kept = [n for n, a in enumerate(known) if a is None or self.low <= a <= self.high]
            if not kept:
                easy = sum(a is not None and a > self.high for a in known)
                raise VideoR1Error(
                    f"difficulty_range [{self.low:g}, {self.high:g}] leaves none of {len(samples):,} "
                    f"questions for epoch {epoch + 1}: {easy:,} are answered right more often, "
                    f"{len(samples) - easy:,} less often. Widen it, or train for fewer epochs"
                )
            self.kept = {epoch: range(len(samples)) if len(kept) == len(samples) else kept}
        return self.kept[epoch]


def updated(accuracy: Accuracy | None, epoch: int, share: float) -> Accuracy:
    """A question's entry after it was answered right in this share of its completions."""
    if accuracy is None:
        return None, epoch, share
    before, last, now = accuracy
    return before if last == epoch else now, epoch, (now + share) / 2


def accuracy_before(accuracy: Accuracy | None, epoch: int) -> float | None:
    """What was known of a question when the epoch began."""
    if accuracy is None:
        return None
    before, last, now = accuracy
    return now if last < epoch else before
