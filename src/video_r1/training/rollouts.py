"""One-step-ahead rollouts: while an update runs, a server samples the next step's questions.

    step t:   collect the rollouts of t ─► hand over θ_t ─► start sampling t+1 ─► update to θ_t+1

So the rollouts of step t+1 come from θ_t, one update old. The first step of an epoch or of a continued run
has nothing to collect and is sampled by the present weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from video_r1.data.prompts import Prompt
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, RolloutGroup
from video_r1.models.group_forward import VisionFeatures
from video_r1.rollout.engine import RolloutEngine, SamplingSettings, sample_rollouts
from video_r1.training.questions import Ready


class Sampled(NamedTuple):
    """A step's completions, ordered [Q][G] and shuffled [Q][H or 0]; seconds that the engine took; updates
    since the weights that sampled them."""

    ordered: list[list[Rollout]]
    shuffled: list[list[Rollout]]
    seconds: float
    staleness: int = 0


def sample_step(
    engine: RolloutEngine, questions: Sequence[Question], sampling: SamplingSettings, shuffled_n: int
) -> Sampled:
    """A step's completions by what the engine has as weights."""
    started = time.perf_counter()
    ordered, shuffled = sample_rollouts(engine, questions, sampling, shuffled_n)
    return Sampled(ordered, shuffled, time.perf_counter() - started)


@dataclass(slots=True)
class RolloutsAhead:
    """The next step's batches and their rollouts, which are under way. At most one step at a time."""

    batches: list[Any] = field(default_factory=list)
    _future: Future[Sampled] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rollouts-ahead"))

    def start(
        self,
        pending: Sequence[Future[Ready[Question]]],
        engine: RolloutEngine,
        sampling: SamplingSettings,
        shuffled_n: int,
    ) -> None:
        """Samples questions that are being read, in the background. The engine has its weights already, and
        nobody else uses it until `wait` has returned.
        """

        def work() -> Sampled:
            questions = [question.result().content for question in pending]
            return sample_step(engine, questions, sampling, shuffled_n)

        self._future = self._thread.submit(work)

    def take_batches(self) -> list[Any]:
        batches, self.batches = self.batches, []
        return batches

    def collect(self) -> Sampled | None:
        """The rollouts that were started, when they are finished; None where none were. Raises what sampling
        and reading have raised.
        """
        future, self._future = self._future, None
        return None if future is None else future.result()._replace(staleness=1)

    def wait(self) -> None:
        """Returns when nothing is being sampled; its errors are raised by `collect`."""
        if self._future is not None:
            self._future.exception()


@dataclass(slots=True)
class PolicyBatch:
    """A micro-batch of groups, and what later updates on the same rollouts share.

    Only `trained` ones meet the model: Q questions with N completion tokens in all. They are all of the
    groups, save for those of equal rewards when there is no KL term: advantages of 0 add nothing to the loss
    or its gradient.
    """

    groups: list[RolloutGroup]
    trained: list[RolloutGroup]
    old_logprobs: Tensor | None = None  # [N], of the policy that sampled
    ref_logprobs: Tensor | None = None  # [N]
    sampler_weights: Tensor | None = None  # [N], where an engine with a model of its own has sampled
    vision: list[VisionFeatures | None] | None = None  # one a question, where the vision tower is frozen

    @property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self.trained]

    @property
    def completions(self) -> list[list[Tensor]]:
        return [[rollout.token_ids for rollout in group.ordered] for group in self.trained]

    @property
    def problem_ids(self) -> list[str | int]:
        return [group.sample.problem_id for group in self.trained]


def policy_batch(groups: list[RolloutGroup], with_kl: bool) -> PolicyBatch:
    """A micro-batch of scored groups. At least one meets the model, so that every process has a loss."""
    taught = [group for group in groups if with_kl or bool(group.advantages.any())]
    return PolicyBatch(groups, taught or groups[:1])
