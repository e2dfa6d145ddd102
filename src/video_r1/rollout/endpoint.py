"""Completions from any OpenAI-compatible endpoint (`/chat/completions`): vLLM, another server, or a service.

    asked ─► decode, encode, send ─► wait for the answer ─► completions
             at most `held` at once   up to `concurrency` at once

Such an endpoint has its own processor: it gets the question's text and the frames, and gives text. What it
sampled and how likely it was stays its own, so nothing can be trained on it.

A request is a task on one event loop, not a thread. Its frames and its body are let go when it is sent; one
that has to be sent again is made again. So thousands can wait with the frames of a few in memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import random
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

from video_r1.errors import ConfigError, VideoR1Error
from video_r1.rollout.addresses import Addresses
from video_r1.rollout.chat import FramesAs
from video_r1.rollout.http_client import ServerFailure, ServerRefusal, ask, event_loop, post, wait_for
from video_r1.rollout.streamed import HearText, WrittenChat, post_streamed
from video_r1.settings.decoding import addresses, has_path

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # of one request whose failures pass
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts, doubled each time
OTHER_FILES = 256  # that a process may have open beside one for each request

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Addresses (…/v1) of one model, their key, and limits in seconds: of one request, and of waiting for one
    that is away. `url`: the addresses in words."""

    urls: tuple[str, ...]
    key: str | None = None
    timeout: float = 600.0
    wait: float = 240.0

    @property
    def url(self) -> str:
        return " and ".join(self.urls)

    def each(self) -> list[Endpoint]:
        """An Endpoint for every address."""
        return [replace(self, urls=(url,)) for url in self.urls]


# ---- Many requests at once


class ChatClient:
    """Draws completions at an endpoint, up to `concurrency` requests at once; `held` are being made at once.

    Failures that pass (no connection, 5xx, 429, 408, time-outs, unusable answers) are tried again: at another
    address that is well at once, else with growing pauses. The pause that an address asks for holds for all
    requests to it.
    """

    def __init__(self, endpoint: Endpoint, concurrency: int, held: int = 8) -> None:
        self.endpoint, self.concurrency = endpoint, concurrency
        self._held = asyncio.Semaphore(held)
        # Decoders leave scratch memory in every thread that they have run in: they get a few of their own.
        # Python waits for these at its end; a thread that is left behind in native code could crash it.
        self._makers = ThreadPoolExecutor(held, thread_name_prefix="endpoint")
        self._addresses = Addresses(endpoint.urls)
        self._reaching: asyncio.Task[tuple[Any, bool]] | None = None

    def each(self, asked: Iterable[T], answer: Callable[[T], Coroutine[Any, Any, R]]) -> Generator[list[R]]:
        """What `answer` gives for each of `asked`, as they are finished: all that are at a time.

        The next are begun when the caller has dealt with those: a run that is killed has no more to do again
        than what is under way. Raises what `answer` raises, after all that was finished well.
        """
        allow_open_files(self.concurrency)
        source = iter(asked)
        under_way: set[Future[R]] = set()
        finished: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
        try:
            while True:
                for one in islice(source, self.concurrency - len(under_way)):
                    future = asyncio.run_coroutine_threadsafe(answer(one), event_loop())
                    under_way.add(future)
                    future.add_done_callback(finished.put)
                if not under_way:
                    return
                found = [finished.get()]
                while not finished.empty():
                    found.append(finished.get())
                under_way.difference_update(found)
                if well := [future.result() for future in found if future.exception() is None]:
                    yield well
                for future in found:
                    future.result()
        finally:
            for future in under_way:
                future.cancel()
            if self._reaching is not None:
                event_loop().call_soon_threadsafe(self._reaching.cancel)

    def close(self) -> None:
        """Waits for what is being decoded; requests under way are left to themselves."""
        self._makers.shutdown(cancel_futures=True)

    async def draw(
        self, count: int, request: Callable[[int, int], dict[str, Any]], read: Callable[[Any], list[T]]
    ) -> list[T]:
        """`count` completions, with as many requests as it takes: some endpoints give one at a time.

        request(n, drawn): the body of a request for n more when so many are drawn; called in another thread.
        read: makes an answer into completions, at least one, or raises ServerFailure. Raises ServerRefusal,
        ServerFailure after eight attempts, and VideoR1Error for an endpoint that stays away.
        """
        drawn: list[T] = []
        while (missing := count - len(drawn)) > 0:
            more = await self._ask(partial(request, missing, len(drawn)), read)
            drawn += more[:missing]
        return drawn

    async def _ask(self, request: Callable[[], dict[str, Any]], read: Callable[[Any], list[T]]) -> list[T]:
        """One request, tried again while its failures pass."""
        attempt, began = 0, time.monotonic()
        while True:
            try:
                return await self._post(request, read)
            except ServerFailure as failure:
                # An endpoint that names a pause is well; it has not all the time of the world either.
                asked_to_wait = failure.retry_after is not None
                attempt += not asked_to_wait or time.monotonic() - began > self.endpoint.wait
                if attempt >= ATTEMPTS:
                    if not await self._was_away():
                        raise
                    attempt = 1
                if self._addresses.some_ready():
                    continue
                pause = min(FIRST_PAUSE * 2 ** max(0, attempt - 1), LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # not the same for all who wait

    async def draw_aloud(
        self,
        count: int,
        request: Callable[[int, int], dict[str, Any]],
        read: Callable[[Any], list[T]],
        hear: HearText,
    ) -> list[T]:
        """As `draw`, and each piece of a completion is heard as it is written.

        What was heard cannot be taken back: no failure is tried again. An endpoint that refuses to stream is
        asked once more without.
        """
        drawn: list[T] = []
        while (missing := count - len(drawn)) > 0:
            begun = len(drawn)
            written = WrittenChat(lambda number, piece, begun=begun: hear(begun + number, piece))
            aloud = partial(_aloud, request, missing, begun)
            body = await asyncio.wrap_future(self._makers.submit(_encoded, aloud))
            try:
                with self._addresses.asking() as address:
                    url, endpoint = f"{address.url}/chat/completions", self.endpoint
                    await post_streamed(url, endpoint.key, endpoint.timeout, body, written.take)
                    drawn += read(written.reply())[:missing]
            except ServerRefusal as refusal:
                if refusal.status not in (400, 422):
                    raise
                return await self.draw(count, request, read)
        return drawn

    async def _post(self, request: Callable[[], dict[str, Any]], read: Callable[[Any], list[T]]) -> list[T]:
        """Sends one request and reads its answer; what it holds meanwhile is the socket."""
        with ExitStack() as holding:
            await self._held.acquire()
            holding.callback(self._held.release)
            body = [await asyncio.wrap_future(self._makers.submit(_encoded, request))]
            while (pause := self._addresses.pause()) > 0:
                await asyncio.sleep(pause)

            async def sent_once() -> AsyncIterator[bytes]:
                yield body.pop()
                holding.close()  # more is asked for, so that all of it is sent

            endpoint, size = self.endpoint, len(body[0])
            with self._addresses.asking() as address:
                url = f"{address.url}/chat/completions"
                return read(await ask("POST", url, endpoint.key, endpoint.timeout, sent_once(), size))

    async def _was_away(self) -> bool:
        """Whether no address answered anything at all, which all requests wait for together."""
        if self._reaching is None or self._reaching.done():
            self._reaching = asyncio.create_task(models_of(self.endpoint))
        try:
            return (await asyncio.shield(self._reaching))[1]
        except ServerFailure as failure:
            raise VideoR1Error(
                f"{self.endpoint.url} has not answered for {self.endpoint.wait:g} s ({failure}); "
                "started again, an annotation or evaluation continues"
            ) from failure


def _aloud(request: Callable[[int, int], dict[str, Any]], n: int, drawn: int) -> dict[str, Any]:
    return {**request(n, drawn), "stream": True, "stream_options": {"include_usage": True}}


def _encoded(request: Callable[[], dict[str, Any]]) -> bytes:
    return json.dumps({name: value for name, value in request().items() if value is not None}).encode()


def allow_open_files(requests: int) -> None:
    """Raises this process's limit of open files to what so many requests need: many systems begin with 1,024.

    Raises ConfigError when the system does not allow it.
    """
    wanted = requests + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except ValueError as error:
        raise ConfigError(
            f"{requests} requests at once need {wanted} open files, and this system allows {hard}; lower "
            "concurrency, or raise the limit (ulimit -Hn)"
        ) from error


# ---- What it serves


async def models_of(endpoint: Endpoint) -> tuple[Any, bool]:
    """Its list of models, or its refusal to give one; and whether it was away and had to be waited for. Of
    several addresses the first one that answers counts.

    Raises ServerFailure when all stay away for `endpoint.wait` seconds.
    """
    deadline, away = time.monotonic() + endpoint.wait, False
    while True:
        try:
            return await models_now(endpoint), away
        except ServerRefusal as refusal:
            return refusal, away
        except ServerFailure as failure:
            if time.monotonic() > deadline:
                raise
            if not away:
                logger.warning("%s: %s; waiting up to %g s for it", endpoint.url, failure, endpoint.wait)
            away = True
        await asyncio.sleep(min(1.0, endpoint.wait / 10))


async def models_now(endpoint: Endpoint) -> Any:
    *others, last = (f"{url}/models" for url in endpoint.urls)
    for url in others:
        with suppress(ServerFailure):
            return await ask("GET", url, endpoint.key, 10.0)
    return await ask("GET", last, endpoint.key, 10.0)


def open_endpoint(
    endpoint: Endpoint, wanted: str | None, frames_as: Literal["auto", "images", "video"]
) -> tuple[str, FramesAs]:
    """The name of the model to ask for, and how it is sent a clip. Waits for addresses that start.

    frames_as: "auto" is a video where all of the endpoint's addresses take one, else images. Raises
    ConfigError as `served_model` and `form_of_frames` do, and when two addresses serve different models.
    """
    found = {one.url: (one, *served_model(one, wanted)) for one in endpoint.each()}
    names = {url: name for url, (_, name, _) in found.items()}
    if len(set(names.values())) > 1:
        served = ", ".join(f"{url} serves {name}" for url, name in names.items())
        raise ConfigError(f"requests are shared by servers of one model, but {served}")
    forms = {form_of_frames(one, name, is_vllm, frames_as) for one, name, is_vllm in found.values()}
    return next(iter(names.values())), "video" if forms == {"video"} else "images"


def served_model(endpoint: Endpoint, wanted: str | None, prefix: str = "") -> tuple[str, bool]:
    """The name of the model to ask for, and whether the endpoint is vLLM. Waits for an endpoint that starts.

    Raises ConfigError: nothing answers within `endpoint.wait`, the key is refused, it serves several models
    and none is named, or not the one that is named. A service without a list of models has to be told one.
    prefix: how the settings begin that errors name, as in judge_model.
    """
    try:
        listed, _ = wait_for(models_of(endpoint))
    except ServerFailure as failure:
        raise ConfigError(
            f"{endpoint.url}: no endpoint answered within {endpoint.wait:g} s ({failure})"
        ) from failure
    if isinstance(listed, ServerRefusal):
        if wanted is not None and listed.status == 404:
            return wanted, False
        raise ConfigError(
            f"{endpoint.url}: {listed}; give the address of an OpenAI-compatible endpoint, which mostly "
            f"ends in /v1, the model's name with --{prefix}model, and the key in the environment "
            f"(--{prefix}key_variable)"
        ) from listed
    try:
        entries = {str(entry["id"]): entry.get("owned_by") for entry in listed["data"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{endpoint.url}/models is no list of models: {json.dumps(listed)[:200]}"
        ) from error
    if wanted is None and len(entries) != 1:
        shown = ", ".join(sorted(entries)[:10])
        raise ConfigError(
            f"{endpoint.url} serves {len(entries)} models; name one with --{prefix}model: {shown}"
        )
    model = next(iter(entries)) if wanted is None else wanted
    if entries and model not in entries:
        raise ConfigError(f"{endpoint.url} serves {', '.join(sorted(entries)[:10])}, not {model}")
    return model, entries.get(model) == "vllm"


def form_of_frames(
    endpoint: Endpoint, model: str, is_vllm: bool, wanted: Literal["auto", "images", "video"]
) -> FramesAs:
    """How a clip is sent. "auto": as a video where a vLLM server takes the frames' times, else as images.

    Raises ConfigError when "video" is wanted of an endpoint that does not take them.
    """
    if wanted == "images" or (wanted == "auto" and not is_vllm):
        return "images"
    request = {"model": model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
    fields = {"media_io_kwargs": {"video": {"num_frames": -1}}}
    try:
        post(f"{endpoint.url}/chat/completions", endpoint.key, {**request, **fields}, endpoint.timeout)
        return "video"
    except ServerRefusal as refusal:
        if wanted == "auto":
            return "images"
        raise ConfigError(
            f"{endpoint.url} does not take a video's frames with their times ({refusal}); start vLLM with "
            "--trust-request-mm-kwargs, or set frames_as images"
        ) from refusal
    except ServerFailure as failure:
        raise ConfigError(f"{endpoint.url}: {failure}") from failure


def endpoint_urls(text: str) -> tuple[str, ...]:
    """The addresses in a setting, without slashes at their ends; a host alone gets the usual `/v1`."""
    return tuple(url if has_path(url) else f"{url}/v1" for url in addresses(text))
