"""Teachers: whatever writes K rationales for each of many questions.

A teacher's `answers(questions)` gives lists of Answered as they are finished, in any order, each question
once. It runs ahead of its caller only by what it is working on, and holds the decoded frames of a bounded
number of questions.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from video_r1.data.frame_cache import FrameCache, read_cached
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.records import Sample
from video_r1.errors import MediaError, PromptError
from video_r1.rollout.chat import Completion
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.settings.frames import FrameBudget


class Question(NamedTuple):
    """place: in the manifest, from 0. done: it is answered, but shares a batch with one that is not."""

    place: int
    sample: Sample
    done: bool = False


class Failed(NamedTuple):
    """Why a question has no rationales. kind: media, prompt or endpoint."""

    kind: str
    reason: str


class Answered(NamedTuple):
    """outcome: the K completions of a question, or why there are none."""

    sample: Sample
    outcome: list[Completion] | Failed


class Teacher(Protocol):
    batch_size: int  # questions that are asked again together

    def answers(self, questions: Iterable[Question]) -> Generator[list[Answered]]: ...

    def close(self) -> None: ...


def sample_seed(seed: int, problem_id: str | int, draw: int = 0) -> int:
    """A seed in [0, 2^31) for one question, the same in every run and on every machine."""
    digest = hashlib.blake2b(f"{seed}/{problem_id}/{draw}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def failed(error: MediaError | PromptError) -> Failed:
    """Why a question could not be asked."""
    return Failed("media" if isinstance(error, MediaError) else "prompt", str(error))


@dataclass(slots=True)
class EngineTeacher:
    """A checkpoint behind one of the rollout engines, `batch_size` questions at a time.

    Batches are runs of the manifest's own order, and one that is done again is done whole: it then gives what
    it would have given before, bit for bit (unless none of its open questions can be read even now). The next
    batch is decoded by `workers` threads meanwhile.
    """

    engine: RolloutEngine
    builder: PromptBuilder
    budget: FrameBudget
    sampling: SamplingSettings
    seed: int
    batch_size: int = 8
    workers: int = 4
    frame_cache: FrameCache | None = None

    def answers(self, questions: Iterable[Question]) -> Generator[list[Answered]]:
        for batch, loaded in self._load_ahead(questions):
            asked = [index for index, prompt in enumerate(loaded) if isinstance(prompt, Prompt)]
            outcomes: list[Any] = list(loaded)
            if any(not batch[index].done for index in asked):
                seeds = tuple(sample_seed(self.seed, batch[index].sample.problem_id) for index in asked)
                prompts: Any = [loaded[index] for index in asked]
                groups = self.engine.generate(prompts, replace(self.sampling, seed=seeds))
                for index, group in zip(asked, groups, strict=True):
                    outcomes[index] = [Completion(rollout.text, rollout.finish_reason) for rollout in group]
            yield [
                Answered(question.sample, outcome)
                for question, outcome in zip(batch, outcomes, strict=True)
                if not question.done
            ]

    def close(self) -> None:
        self.engine.close()

    def _load_ahead(self, questions: Iterable[Question]) -> Iterator[tuple[Sequence[Question], list[Any]]]:
        """Batches with a Prompt or a Failed for each question; one more batch is in the making."""
        building = threading.Lock()  # fast tokenizers refuse to be used by two threads at once

        def load(sample: Sample) -> Prompt | Failed:
            try:
                media = read_cached(sample, self.budget, self.frame_cache)
                with building:
                    return self.builder.build(sample, media)
            except (MediaError, PromptError) as error:
                return failed(error)

        waiting: deque[tuple[list[Question], list[Future[Prompt | Failed]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="annotation")
        try:
            for _, group in groupby(questions, key=lambda question: question.place // self.batch_size):
                batch = list(group)
                waiting.append((batch, [pool.submit(load, question.sample) for question in batch]))
                if len(waiting) > 1:
                    ready, futures = waiting.popleft()
                    yield ready, [future.result() for future in futures]
            while waiting:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
