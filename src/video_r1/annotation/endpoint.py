"""A teacher behind an OpenAI-compatible endpoint (`/chat/completions`): vLLM, another server, or a service.

    questions ─► decode, encode, send ─► wait for the answer ─► Answered
                 at most `held` at once   up to `concurrency` at once

A thread for each request. The frames and the body of a request are let go when it is sent; one that has to
be sent again is decoded again. So thousands can wait for their answers with the frames of a few in memory.
"""

from __future__ import annotations

import json
import queue
import resource
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from video_r1.annotation.teachers import Answered, Failed, Question, failed, sample_seed
from video_r1.data.frame_cache import FrameCache, read_cached
from video_r1.data.prompts import Template
from video_r1.data.records import Sample
from video_r1.errors import ConfigError, MediaError, PromptError, VideoR1Error
from video_r1.rollout.chat import (
    ATTEMPTS,
    Completion,
    Endpoint,
    FramesAs,
    chat_request,
    completions_of,
    pause_before,
)
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.requests_http import ServerFailure, ServerRefusal, get, post_once
from video_r1.settings.frames import FrameBudget

OTHER_FILES = 256  # that a process may have open beside one for each request
FAILED_IN_A_ROW = 50  # questions without an answer, after which it is not the questions' fault
# A request that is wrong in itself; any other refusal (a wrong key, no such model) would meet all of them.
REFUSED_QUESTION = (400, 413, 415, 422)


class Stopped(Exception):
    """The run has ended, and with it what its threads were doing."""


class EndpointTeacher:
    """Asks `model` at the endpoint for `sampling.n` rationales of each question.

    frames_as: see `chat_request`. held: questions whose frames are in memory at once. request_fields: added
    to each request; None leaves a field out.

    Failures that pass (5xx, 429, time-outs, broken or unusable answers) are tried again with growing pauses,
    or after the pause that the endpoint asks for; then the question is given up and listed. VideoR1Error is
    raised when the endpoint does not answer at all for `wait` seconds, refuses the key or the model, or fails
    at 50 questions in a row. One object serves one run.
    """

    batch_size = 1

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        template: Template,
        budget: FrameBudget,
        sampling: SamplingSettings,
        *,
        seed: int = 0,
        concurrency: int = 64,
        held: int = 8,
        frames_as: FramesAs = "images",
        request_fields: Mapping[str, Any] | None = None,
        frame_cache: FrameCache | None = None,
    ) -> None:
        self.endpoint, self.model, self.template, self.budget = endpoint, model, template, budget
        self.sampling, self.seed, self.concurrency = sampling, seed, concurrency
        self.frames_as: FramesAs = frames_as
        self.request_fields, self.frame_cache = dict(request_fields or {}), frame_cache
        self._held = threading.Semaphore(held)
        # Decoders leave scratch memory in every thread that they have run in: they get a few of their own.
        # Python waits for these at its end; a thread that is left behind in native code could crash it.
        self._decoders = ThreadPoolExecutor(held, thread_name_prefix="annotation")
        self._open_again = 0.0  # no request is sent before: the endpoint asked for a pause
        self._stop = threading.Event()

    def answers(self, questions: Iterable[Question]) -> Generator[list[Answered]]:
        allow_open_files(self.concurrency)
        source, taking = iter(questions), threading.Lock()
        results: queue.SimpleQueue[Answered | BaseException | None] = queue.SimpleQueue()
        # Free again when the caller has dealt with an answer: a run that is killed has no more to do again.
        places = threading.Semaphore(self.concurrency)

        def work() -> None:
            try:
                while not self._stop.is_set():
                    if not places.acquire(timeout=1.0):
                        continue
                    with taking:
                        question = next(source, None)
                    if question is None:
                        places.release()
                        break
                    results.put(Answered(question.sample, self._outcome(question.sample)))
            except Stopped:
                pass
            except BaseException as error:  # a thread's errors are the run's: they are raised below
                results.put(error)
            results.put(None)

        # Threads that wait for an answer when the run is interrupted must not keep the process alive.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.concurrency)]
        try:
            for thread in threads:
                thread.start()
            for answered in self._collected(results):
                yield answered
                places.release(len(answered))
        finally:
            self._stop.set()

    def _collected(self, results: queue.SimpleQueue) -> Iterator[list[Answered]]:
        """What the threads have finished, all that is there at a time, until each has said None."""
        running, in_a_row = self.concurrency, 0
        while running:
            found = [results.get()]
            while not results.empty():
                found.append(results.get())
            answered = [result for result in found if isinstance(result, Answered)]
            failures = [
                r.outcome for r in answered if isinstance(r.outcome, Failed) and r.outcome.kind == "endpoint"
            ]
            some_well = any(isinstance(result.outcome, list) for result in answered)
            in_a_row = 0 if some_well else in_a_row + len(failures)
            if answered:
                yield answered
            errors = [result for result in found if isinstance(result, BaseException)]
            if errors:
                raise errors[0]
            if in_a_row >= FAILED_IN_A_ROW:
                raise VideoR1Error(
                    f"{self.endpoint.url}: {in_a_row} questions in a row were not answered, the last one "
                    f"because: {failures[-1].reason}; started again, the annotation continues"
                )
            running -= sum(result is None for result in found)

    def close(self) -> None:
        """Ends the run: what is being decoded is waited for, requests under way are left to themselves."""
        self._stop.set()
        self._decoders.shutdown(cancel_futures=True)

    def _outcome(self, sample: Sample) -> list[Completion] | Failed:
        """K completions, with as many requests as it takes: some endpoints give one at a time."""
        completions: list[Completion] = []
        try:
            while len(completions) < self.sampling.n:
                missing = self.sampling.n - len(completions)
                fields = {"n": missing, "seed": sample_seed(self.seed, sample.problem_id, len(completions))}
                completions += self._ask(sample, fields)[:missing]
        except (MediaError, PromptError) as error:
            return failed(error)
        except ServerFailure as failure:
            return Failed("endpoint", f"{failure} ({ATTEMPTS} attempts)")
        except ServerRefusal as refusal:
            if refusal.status in REFUSED_QUESTION:
                return Failed("endpoint", str(refusal))
            raise VideoR1Error(f"{self.endpoint.url} refuses all requests: {refusal}") from refusal
        return completions

    def _ask(self, sample: Sample, fields: dict[str, Any]) -> list[Completion]:
        """One request, tried again while its failures pass."""
        attempt, began = 0, time.monotonic()
        while True:
            try:
                return completions_of(self._post(sample, fields))
            except ServerFailure as failure:
                # An endpoint that names a pause is well; it has not all the time of the world either.
                asked_to_wait = failure.retry_after is not None
                attempt += not asked_to_wait or time.monotonic() - began > self.endpoint.wait
                if attempt >= ATTEMPTS:
                    if not self._was_away():
                        raise
                    attempt = 1
                if failure.retry_after is not None:
                    self._open_again = max(self._open_again, time.monotonic() + failure.retry_after)
                self._sleep(pause_before(max(1, attempt)))

    def _post(self, sample: Sample, fields: dict[str, Any]) -> Any:
        """Sends one request and waits for its answer; what it holds meanwhile is the socket."""
        while (pause := self._open_again - time.monotonic()) > 0:
            self._sleep(pause)
        with ExitStack() as holding:
            while not self._held.acquire(timeout=1.0):
                self._sleep(0.0)
            holding.callback(self._held.release)
            self._sleep(0.0)  # has the run ended?
            body = [self._decoders.submit(self._body, sample, fields).result()]
            size = len(body[0])

            def sent_once() -> Iterator[bytes]:
                yield body.pop()
                holding.close()  # more is asked for, so that all of it is sent

            url = f"{self.endpoint.url}/chat/completions"
            return post_once(url, self.endpoint.key, sent_once(), size, self.endpoint.timeout)

    def _body(self, sample: Sample, fields: dict[str, Any]) -> bytes:
        media = read_cached(sample, self.budget, self.frame_cache)
        question = self.template.render(sample)
        request = chat_request(self.model, question, media, self.frames_as, self.sampling)
        request |= fields | self.request_fields
        return json.dumps({name: value for name, value in request.items() if value is not None}).encode()

    def _was_away(self) -> bool:
        """Whether the endpoint answered nothing at all, which is waited for. Raises VideoR1Error."""
        deadline = time.monotonic() + self.endpoint.wait
        away = False
        while True:
            try:
                get(f"{self.endpoint.url}/models", self.endpoint.key, timeout=10.0)
                return away
            except ServerRefusal:  # some have no list of models
                return away
            except ServerFailure as failure:
                away = True
                if time.monotonic() > deadline:
                    raise VideoR1Error(
                        f"{self.endpoint.url} has not answered for {self.endpoint.wait:g} s ({failure}); "
                        "started again, the annotation continues"
                    ) from failure
                self._sleep(min(2.0, self.endpoint.wait / 10))

    def _sleep(self, seconds: float) -> None:
        """Raises Stopped when the run ends meanwhile."""
        if self._stop.wait(seconds):
            raise Stopped


def allow_open_files(requests: int) -> None:
    """Raises this process's limit of open files to what so many requests need: many systems begin with 1,024.

    Raises ConfigError when the system does not allow it.
    """
    wanted = requests + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(
            f"{requests} requests at once need {wanted} open files, and this system allows {hard}; lower "
            "concurrency, or raise the limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
