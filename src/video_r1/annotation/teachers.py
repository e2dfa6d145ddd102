"""Teachers: engines and endpoints that write K rationales for each of many questions.

A teacher's `answers(requests)` yields lists of `TeacherAnswer` as they are finished, in any order, one for
each request. It reads ahead by a bounded number of requests and holds no more frames than those need.
"""

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from video_r1.chat_client import (
    ATTEMPTS,
    REFUSED_QUESTION,
    ChatClient,
    Completion,
    Endpoint,
    FramesAs,
    ServerFailure,
    ServerRefusal,
    completions_of,
)
from video_r1.data.decoding.frame_cache import open_frame_cache, read_cached
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, TextPrompts
from video_r1.data.reading import Batch, Reader, Unusable
from video_r1.errors import MediaError, PromptError, VideoR1Error
from video_r1.rollout.endpoint_engine import chat_request
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.seeds import derived_seed
from video_r1.settings.annotation import AnnotateSettings
from video_r1.settings.frames import FrameBudget


class TeacherRequest(NamedTuple):
    """place: in the manifest, from 0. done: it is answered, but shares a batch with one that is not."""

    place: int
    sample: Sample
    done: bool = False


class Failed(NamedTuple):
    """Why a question has no rationales. kind: media, prompt or endpoint."""

    kind: str
    reason: str


class TeacherAnswer(NamedTuple):
    """outcome: the K completions of a question, or why there are none."""

    sample: Sample
    outcome: list[Completion] | Failed


class Teacher(Protocol):
    @property
    def batch_size(self) -> int: ...  # questions that are asked again together

    def answers(self, questions: Iterable[TeacherRequest]) -> Generator[list[TeacherAnswer]]: ...

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

    def answers(self, questions: Iterable[TeacherRequest]) -> Generator[list[TeacherAnswer]]:
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
                TeacherAnswer(question.sample, outcome)
                for question, outcome in zip(batch, outcomes, strict=True)
                if not question.done
            ]

    def close(self) -> None:
        self.reader.close()
        self.engine.close()


FAILED_IN_A_ROW = 50  # questions without an answer, after which it is not the questions' fault


class EndpointTeacher:
    """Asks `model` at the endpoint for `samples` rationales of each question, as ChatClient does.

    frames_as: see `chat_request`.

    A question whose request fails eight times, or is refused as wrong, is given up and listed. VideoR1Error
    is raised when the endpoint does not answer at all for `wait` seconds, refuses the key or the model, or
    fails at 50 questions in a row. One object serves one run.
    """

    batch_size = 1

    def __init__(
        self, settings: AnnotateSettings, endpoint: Endpoint, model: str, frames_as: FramesAs
    ) -> None:
        self.settings, self.endpoint, self.model = settings, endpoint, model
        self.frames_as: FramesAs = frames_as
        self._prompts = TextPrompts(settings.prompt_template, settings.subtitles)
        self._budget = settings.frame_budget(FrameBudget().size_multiple)
        self._frame_cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
        self._client = ChatClient(endpoint, settings.concurrency, held=2 * settings.workers)

    def answers(self, questions: Iterable[TeacherRequest]) -> Generator[list[TeacherAnswer]]:
        in_a_row = 0
        with closing(self._client.each(questions, self._answer)) as finished:
            for answered in finished:
                outcomes = [one.outcome for one in answered]
                failures = [one for one in outcomes if isinstance(one, Failed) and one.kind == "endpoint"]
                some_well = any(isinstance(one, list) for one in outcomes)
                in_a_row = 0 if some_well else in_a_row + len(failures)
                yield answered
                if in_a_row >= FAILED_IN_A_ROW:
                    raise VideoR1Error(
                        f"{self.endpoint.url}: {in_a_row} questions in a row were not answered, the last one "
                        f"because: {failures[-1].reason}; started again, the annotation continues"
                    )

    def close(self) -> None:
        """Ends the run: what is being decoded is waited for, requests under way are left to themselves."""
        self._client.close()

    async def _answer(self, question: TeacherRequest) -> TeacherAnswer:
        return TeacherAnswer(question.sample, await self._outcome(question.sample))

    async def _outcome(self, sample: Sample) -> list[Completion] | Failed:
        settings = self.settings
        sampling = SamplingSettings.of(settings)

        def request(n: int, drawn: int) -> dict[str, Any]:
            media = [read_cached(file, self._budget, self._frame_cache) for file in sample.files]
            seed = sample_seed(settings.seed, sample.problem_id, drawn)
            prompt = self._prompts.build(sample, media)
            body = chat_request(self.model, prompt, self.frames_as, sampling, n, seed)
            return body | settings.request_fields

        try:
            return await self._client.draw(settings.samples, request, completions_of)
        except (MediaError, PromptError) as error:
            return Failed(error.kind, str(error))
        except ServerFailure as failure:
            return Failed("endpoint", f"{failure} ({ATTEMPTS} attempts)")
        except ServerRefusal as refusal:
            if refusal.status in REFUSED_QUESTION:
                return Failed("endpoint", str(refusal))
            raise VideoR1Error(f"{self.endpoint.url} refuses all requests: {refusal}") from refusal
