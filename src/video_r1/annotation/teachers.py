"""Teachers: engines and endpoints that write K rationales for each of many questions.

`answers(batches, done)` yields lists of `Answered` as they are finished, in any order, one for each question
that is not in `done`. A teacher reads a bounded number of questions ahead of its caller.
"""

from collections.abc import Container, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from video_r1.chat_client import (
    ATTEMPTS,
    REFUSED_QUESTION,
    ChatClient,
    Endpoint,
    FramesAs,
    ServerFailure,
    ServerRefusal,
    completions_of,
    event_loop,
)
from video_r1.data.decoding.frame_cache import open_frame_cache
from video_r1.data.manifests.records import Sample, work_messages
from video_r1.data.prompts import TextPrompts
from video_r1.data.reading import Batch, Reader
from video_r1.data.rollouts import Rollout
from video_r1.data.tools import Toolbox
from video_r1.errors import MediaError, PromptError, VideoR1Error
from video_r1.evaluation.question_loop import read_batches
from video_r1.rollout.endpoint_engine import EndpointEngine, chat_request
from video_r1.rollout.engine import RolloutEngine, SamplingSettings
from video_r1.rollout.episodes import ToolEngine
from video_r1.seeds import derived_seed
from video_r1.settings.decoding import TeacherSettings
from video_r1.settings.frames import FrameBudget

# A question with `completions` (text and finish_reason of each), or `failed` (media, prompt or endpoint) and
# the `reason` in words.
Answered = tuple[Sample, dict[str, Any]]
Batches = Sequence[Sequence[Sample]]
Done = Container[str | int]  # problem_ids


def sample_seed(seed: int, problem_id: str | int, draw: int = 0) -> int:
    """Return a seed in [0, 2^31) for one question."""
    return derived_seed(seed, problem_id, draw, bits=31)


@dataclass(slots=True)
class EngineTeacher:
    """A checkpoint behind a rollout engine. A batch is asked again as a whole, for the same answers."""

    engine: RolloutEngine
    builder: TextPrompts
    reader: Reader
    settings: TeacherSettings

    def answers(self, batches: Batches, done: Done) -> Generator[list[Answered]]:
        sampling = SamplingSettings.of(self.settings, self.settings.samples)
        for read in read_batches(self.reader, [Batch(batch) for batch in batches], self.builder.build):
            found = {sample.problem_id: _failed(error) for sample, error in read.failed}
            if any(sample.problem_id not in done for sample, _ in read.usable):
                seeds = tuple(sample_seed(self.settings.seed, sample.problem_id) for sample, _ in read.usable)
                prompts = [prompt for _, prompt in read.usable]
                groups = self.engine.sample(prompts, replace(sampling, seed=seeds))
                for (sample, _), group in zip(read.usable, groups, strict=True):
                    found[sample.problem_id] = _completed(group)
            yield [
                (sample, found[sample.problem_id]) for sample in read.samples if sample.problem_id not in done
            ]

    def close(self) -> None:
        self.reader.close()
        self.engine.close()


FAILED_IN_A_ROW = 50  # unanswered questions, after which the endpoint is at fault


class EndpointTeacher:
    """A model at an OpenAI-compatible endpoint. frames_as: see `chat_request`. One object serves one run.

    A question whose request fails eight times, or is refused as wrong, is given up. VideoR1Error is raised
    when the endpoint stays away, refuses the key or the model, or fails at 50 questions in a row.
    """

    def __init__(
        self, settings: TeacherSettings, endpoint: Endpoint, model: str, frames_as: FramesAs
    ) -> None:
        self.settings, self.endpoint, self.model = settings, endpoint, model
        self.frames_as: FramesAs = frames_as
        budget = settings.frame_budget(FrameBudget().size_multiple)
        cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
        toolbox = Toolbox(settings, budget, (), cache) if settings.tools else None
        self._prompts = TextPrompts(settings.prompt_template, settings.subtitles, toolbox)
        self._reader = Reader(budget, cache)
        self._client = ChatClient(endpoint, settings.concurrency, held=2 * settings.workers)
        self._episodes: ToolEngine | None = None
        if settings.tools:
            self._engine = EndpointEngine(endpoint, model, frames_as, fields=settings.request_fields)
            self._episodes = ToolEngine(self._engine, self._prompts)
            self._threads = ThreadPoolExecutor(2 * settings.workers, thread_name_prefix="episodes")

    def answers(self, batches: Batches, done: Done) -> Generator[list[Answered]]:
        in_a_row, samples = 0, [sample for batch in batches for sample in batch]
        with closing(self._client.each(samples, self._answer)) as finished:
            for answered in finished:
                failures = [entry["reason"] for _, entry in answered if entry.get("failed") == "endpoint"]
                some_well = any("completions" in entry for _, entry in answered)
                in_a_row = 0 if some_well else in_a_row + len(failures)
                yield answered
                if in_a_row >= FAILED_IN_A_ROW:
                    raise VideoR1Error(
                        f"{self.endpoint.url}: {in_a_row} questions in a row were not answered, the last one "
                        f"because: {failures[-1]}; started again, the annotation continues"
                    )

    def close(self) -> None:
        self._client.close()
        if self._episodes is not None:
            self._threads.shutdown(cancel_futures=True)
            self._episodes.close()

    async def _episode(self, sample: Sample, engine: ToolEngine) -> list[Rollout]:
        """Return the answers to one question, with calls of tools."""
        seed = sample_seed(self.settings.seed, sample.problem_id)
        sampling = replace(SamplingSettings.of(self.settings, self.settings.samples), seed=(seed,))
        run = partial(event_loop().run_in_executor, self._threads)
        prompt = await run(self._prompts.build, sample, await run(self._reader.media, sample))
        _, (episodes,), then = engine.begin([prompt], sampling)
        await self._engine.converse(prompt, sampling, len(episodes), partial(then, 0), self._threads)
        engine.toolbox.forget()
        return [episode.rollout for episode in episodes]

    async def _answer(self, sample: Sample) -> Answered:
        settings = self.settings
        sampling = SamplingSettings.of(settings)

        def request(n: int, drawn: int) -> dict[str, Any]:
            media = self._reader.media(sample)
            seed = sample_seed(settings.seed, sample.problem_id, drawn)
            prompt = self._prompts.build(sample, media)
            body = chat_request(self.model, prompt, self.frames_as, sampling, n, seed)
            return body | settings.request_fields

        try:
            if self._episodes is not None:
                found: Any = await self._episode(sample, self._episodes)
            else:
                found = await self._client.draw(settings.samples, request, completions_of)
            return sample, _completed(found)
        except (MediaError, PromptError) as error:
            return sample, _failed(error)
        except ServerFailure as failure:
            return sample, {"failed": "endpoint", "reason": f"{failure} ({ATTEMPTS} attempts)"}
        except ServerRefusal as refusal:
            if refusal.status in REFUSED_QUESTION:
                return sample, {"failed": "endpoint", "reason": str(refusal)}
            raise VideoR1Error(f"{self.endpoint.url} refuses all requests: {refusal}") from refusal


def _completed(completions: Iterable[Any]) -> dict[str, Any]:
    return {
        "completions": [
            {"text": c.text, "finish_reason": c.finish_reason}
            | ({"work": work_messages(c.work), "failed_calls": c.failed_calls} if c.work else {})
            for c in completions
        ]
    }


def _failed(error: MediaError | PromptError) -> dict[str, Any]:
    return {"failed": error.kind, "reason": str(error)}
