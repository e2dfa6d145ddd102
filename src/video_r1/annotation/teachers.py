"""Teachers: whatever writes K rationales for each of many questions.

A teacher's `answers(questions)` gives lists of Answered as they are finished, in any order, each question
once. It runs ahead of its caller only by what it is working on, and holds the frames of a bounded number of
questions.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.reading import Batch, Reader, Unusable
from video_r1.rollout.chat import Completion
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.seeds import derived_seed
from video_r1.settings.annotation import AnnotateSettings


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
    @property
    def batch_size(self) -> int: ...  # questions that are asked again together

    def answers(self, questions: Iterable[Question]) -> Generator[list[Answered]]: ...

    def close(self) -> None: ...


def sample_seed(seed: int, problem_id: str | int, draw: int = 0) -> int:
    """A seed in [0, 2^31) for one question, the same in every run and on every machine."""
    return derived_seed(seed, problem_id, draw, bits=31)


@dataclass(slots=True)
class EngineTeacher:
    """A checkpoint behind one of the rollout engines, `batch_size` questions at a time.

    Batches are runs of the manifest's own order, and one that is done again is done whole: it then gives what
    it would have given before, bit for bit (unless none of its open questions can be read even now).
    """

    engine: RolloutEngine
    builder: TextPrompts
    reader: Reader
    settings: AnnotateSettings

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    def answers(self, questions: Iterable[Question]) -> Generator[list[Answered]]:
        batches = [list(batch) for _, batch in groupby(questions, lambda one: one.place // self.batch_size)]
        read = self.reader.batches(
            [Batch([question.sample for question in batch]) for batch in batches], self.builder.build
        )
        for batch, loaded in zip(batches, read, strict=True):
            asked = [i for i, prompt in enumerate(loaded) if isinstance(prompt, Prompt)]
            outcomes: list[Any] = [Failed(x.kind, str(x)) if isinstance(x, Unusable) else x for x in loaded]
            if any(not batch[i].done for i in asked):
                seeds = tuple(sample_seed(self.settings.seed, batch[i].sample.problem_id) for i in asked)
                prompts: Any = [loaded[i] for i in asked]
                sampling = SamplingSettings.of(self.settings, self.settings.samples)
                groups = self.engine.generate(prompts, replace(sampling, seed=seeds))
                for i, group in zip(asked, groups, strict=True):
                    outcomes[i] = [Completion(rollout.text, rollout.finish_reason) for rollout in group]
            yield [
                Answered(question.sample, outcome)
                for question, outcome in zip(batch, outcomes, strict=True)
                if not question.done
            ]

    def close(self) -> None:
        self.reader.close()
        self.engine.close()
