"""Requests to OpenAI-compatible endpoints and vLLM servers, by the `openai` package.

    items ─► encode, send ─────────► wait for the answer ─► completions
             at most `held` at once  up to `concurrency` at once

`openai` sends a request, authorises it, reads its errors and decodes streamed answers. This module adds what
that package cannot do:

- Several addresses of one model share the requests; one that fails is skipped for a while (`Failover`). A
  retry goes to another address at once, and a pause that an address asks for (Retry-After) holds for all
  requests. So retries are made here, and `openai` is told to make none.
- A request is a task on one event loop, not a thread. Its body is freed when it is sent and built again for a
  retry. So thousands of requests can wait while the frames of only a few are in memory.
- A timeout covers the whole answer, so that a slow trickle of bytes cannot outlast it.

`openai` is imported by the first request: importing it takes a second.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import queue
import random
import resource
import ssl
import threading
import time
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from video_r1.errors import ConfigError, VideoR1Error
from video_r1.settings.decoding import addresses, has_path

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # of one request
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts, doubled each time
FIRST_SKIP, LONGEST_SKIP = 1.0, 30.0  # seconds for which a failed address is skipped, doubled each time
OTHER_FILES = 256  # files that a process may have open besides one per request
# Statuses of a request that is wrong in itself. Any other refusal (wrong key, unknown model) would meet all.
REFUSED_QUESTION = (400, 413, 415, 422)

T = TypeVar("T")
R = TypeVar("R")
FramesAs = Literal["images", "video"]
OnText = Callable[[int, str], object]
"""Called with the index of a completion and a piece of its text."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Addresses (…/v1) of one model, and their key.

    timeout: seconds for one request. wait: seconds to wait for an endpoint that does not answer.
    """

    urls: tuple[str, ...]
    key: str | None = None
    timeout: float = 600.0
    wait: float = 240.0

    @property
    def url(self) -> str:
        """Text that names all addresses, for messages."""
        return " and ".join(self.urls)

    def each(self) -> list[Endpoint]:
        """Return an Endpoint for every address."""
        return [replace(self, urls=(url,)) for url in self.urls]


class Completion(NamedTuple):
    """finish_reason: "stop", "length" (cut off), "content_filter" or another word of the endpoint's."""

    text: str
    finish_reason: str


class ServerFailure(Exception):
    """No answer, or an unusable one: a retry may help. retry_after: seconds that the server asks to wait."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerRefusal(Exception):
    """A refused request: a retry will not help. status: of the HTTP answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# ---- One request


def get(url: str, key: str | None, timeout: float) -> Any:
    """Return the JSON value at `url`; None for an empty body. key: sent as bearer token; timeout: seconds."""
    return wait_for(request("GET", url, key, timeout))


def post(url: str, key: str | None, body: Any, timeout: float) -> Any:
    """Post `body` as JSON (None: an empty body) and return the JSON answer; None for an empty one."""
    return wait_for(request("POST", url, key, timeout, b"" if body is None else json.dumps(body).encode()))


async def request(
    method: Literal["GET", "POST"],
    url: str,
    key: str | None,
    timeout: float,
    body: bytes | AsyncIterator[bytes] = b"",
    size: int | None = None,
) -> Any:
    """Send one request from the event loop and return its JSON answer; `timeout` covers all of it.

    body: JSON; the bytes of an iterator (`size` in all) are freed once they are sent. Raises ServerFailure
    and ServerRefusal.
    """
    try:
        async with asyncio.timeout(timeout), _opened(method, url, key, body, size) as (reply, _):
            content = await reply.aread()
            return json.loads(content) if content else None
    except TimeoutError as error:
        raise ServerFailure(f"no answer within {timeout:g} s at {urlsplit(url).path}") from error


async def request_streamed(
    url: str, key: str | None, timeout: float, body: bytes, take: Callable[[Any], object]
) -> None:
    """Post `body` and call `take` with each JSON value of the answer as it arrives.

    A server that does not stream gives one value. timeout: seconds without any data. An exception of `take`
    ends the request. Raises ServerRefusal, and ServerFailure when the connection breaks or an event is an
    error or no JSON.
    """
    loop, path = asyncio.get_running_loop(), urlsplit(url).path
    try:
        async with (
            asyncio.timeout(timeout) as limit,
            _opened("POST", url, key, body, stream=True) as (reply, events),
        ):
            if "event-stream" not in reply.headers.get("Content-Type", ""):
                take(json.loads(await reply.aread()))
                return
            async for event in events():
                limit.reschedule(loop.time() + timeout)
                take(event)
    except TimeoutError as error:
        raise ServerFailure(f"not a word within {timeout:g} s at {path}") from error


@asynccontextmanager
async def _opened(
    method: Literal["GET", "POST"],
    url: str,
    key: str | None,
    body: bytes | AsyncIterator[bytes],
    size: int | None = None,
    stream: bool = False,
) -> AsyncIterator[tuple[Any, Callable[[], AsyncIterator[Any]]]]:
    """Yield a successful response, not read yet if `stream`, and a function that decodes its events.

    Each request has its own connection: it is never found closed, and a pool with thousands of connections
    does not search them all whenever a request begins or ends. Raises ServerFailure and ServerRefusal.
    """
    import httpx2
    import openai

    headers: dict[str, Any] = {
        # Nothing that openai would read from its own environment variables is sent.
        "Authorization": f"Bearer {key}" if key else openai.omit,
        "OpenAI-Organization": openai.omit,
        "OpenAI-Project": openai.omit,
        **({} if size is None else {"Content-Length": str(size)}),
    }
    limits = httpx2.Limits(max_connections=1, max_keepalive_connections=0)
    try:
        async with (
            httpx2.AsyncClient(verify=_certificates(), timeout=None, limits=limits) as http,
            openai.AsyncOpenAI(
                api_key="unused", base_url="http://unused", max_retries=0, timeout=None, http_client=http
            ) as client,
        ):
            given: Any = {"cast_to": httpx2.Response, "options": {"headers": headers}, "stream": stream}
            if stream:
                given["stream_cls"] = openai.AsyncStream[object]
            reply = await (
                client.get(url, **given) if method == "GET" else client.post(url, content=body, **given)
            )
            yield reply, partial(openai.AsyncStream, cast_to=object, response=reply, client=client)
    except openai.APIStatusError as error:
        raise _status_error(error) from error
    # No connection, a broken one, half an answer, an event that is an error, or no JSON.
    except (openai.OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise ServerFailure(_reason(error)) from error


def _status_error(error: Any) -> ServerFailure | ServerRefusal:
    """Convert openai's APIStatusError, with the first 300 characters of the server's message."""
    reply, body = error.response, error.body
    said = body.get("message") or body.get("detail") if isinstance(body, Mapping) else None
    if reply.has_redirect_location:
        said = f"it has moved to {reply.headers['Location']}"
    message = f"HTTP {error.status_code} at {reply.url.path}: {str(said or reply.text)[:300]}"
    # 408, 429: too slow, too many. 5xx: an engine that dies answers so before its process ends.
    if error.status_code in (408, 429) or reply.is_server_error:
        pause = reply.headers.get("Retry-After", "").strip()  # seconds, or a date
        return ServerFailure(message, float(pause) if pause.isdigit() else None)
    return ServerRefusal(message, error.status_code)


def _reason(error: BaseException) -> str:
    """Describe a failure by what the system said, where libraries only say that no attempt succeeded."""
    cause: BaseException | None = error
    last = error
    while cause is not None and getattr(cause, "errno", None) is None:
        last, cause = cause, cause.__cause__ or cause.__context__
    first = error.__cause__ if str(error) == "Connection error." and error.__cause__ else error
    return f"{type(first).__name__}: {cause or (str(first) or last)}"


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()  # the system's; reading them takes a while


# ---- The event loop


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on the event loop from another thread; an interrupted caller cancels it."""
    future = asyncio.run_coroutine_threadsafe(coroutine, event_loop())
    try:
        return future.result()
    finally:
        future.cancel()


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop on which all requests of this process run."""
    with _starting:
        return _started_loop()


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # A daemon: requests that still wait when the run is interrupted must not keep the process alive.
    threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
    return loop


_starting = threading.Lock()
os.register_at_fork(after_in_child=_started_loop.cache_clear)  # a forked process has no such thread


# ---- Several addresses


@dataclass(slots=True)
class Address:
    """The state of one address. Times are seconds of the clock that `Failover` is given."""

    url: str
    in_flight: int = 0  # requests
    failures: int = 0  # since the last answer; requests that fail together count once
    skipped_until: float = 0.0
    paused_until: float = 0.0  # it asked for a pause


class Failover:
    """Chooses the address for each request: the least busy one that works. Thread-safe.

    A failed address is skipped, at first for `FIRST_SKIP` seconds; then one request tries it and decides for
    the others. When all are skipped, the one whose time ends first is asked; the caller decides how long to
    wait before. An address that asks for a pause gets no request before its end.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._all = [Address(url) for url in urls]
        self._clock = clock
        self._lock = threading.Lock()

    def pause(self) -> float:
        """Return the seconds for which no address may be asked."""
        with self._lock:
            return max(0.0, self._choice().paused_until - self._clock())

    def any_ready(self) -> bool:
        with self._lock:
            return bool(self._ready())

    @contextmanager
    def asking(self) -> Iterator[Address]:
        """Yield the address for one request.

        A ServerFailure raised inside counts against the address; any other outcome, a refusal too, counts as
        an answer.
        """
        with self._lock:
            address = self._choice()
            address.in_flight += 1
        try:
            yield address
            self._answered(address)
        except ServerRefusal:
            self._answered(address)
            raise
        except ServerFailure as failure:
            self._failed(address, failure)
            raise
        finally:
            with self._lock:
                address.in_flight -= 1

    def is_back(self, url: str) -> None:
        """Stop skipping the address at `url`, which has answered."""
        for address in self._all:
            if address.url == url:
                self._answered(address)

    def _choice(self) -> Address:
        if ready := self._ready():
            return min(ready, key=lambda address: address.in_flight)
        return min(self._all, key=lambda address: address.skipped_until)

    def _ready(self) -> list[Address]:
        now = self._clock()
        return [
            address
            for address in self._all
            if address.skipped_until <= now and not (address.failures and address.in_flight)
        ]

    def _answered(self, address: Address) -> None:
        with self._lock:
            address.failures, address.skipped_until = 0, address.paused_until

    def _failed(self, address: Address, failure: ServerFailure) -> None:
        with self._lock:
            now = self._clock()
            if failure.retry_after is not None:  # the address works, and is busy
                address.paused_until = max(address.paused_until, now + failure.retry_after)
                skip = max(failure.retry_after, FIRST_SKIP)
                address.skipped_until = max(address.skipped_until, now + skip)
            elif address.skipped_until <= now:
                skip = min(FIRST_SKIP * 2**address.failures, LONGEST_SKIP)
                address.failures += 1
                address.skipped_until = now + skip
                if len(self._all) > 1:
                    logger.warning("%s: %s; skipped for %g s", address.url, failure, skip)


# ---- Many requests at once


class ChatClient:
    """Requests completions from an endpoint, up to `concurrency` requests at once; `held` are built at once.

    Temporary failures (no connection, 5xx, 429, 408, timeouts, unusable answers) are retried: at once if
    another address works, else after growing pauses.
    """

    def __init__(self, endpoint: Endpoint, concurrency: int, held: int = 8) -> None:
        self.endpoint, self.concurrency = endpoint, concurrency
        self._held = asyncio.Semaphore(held)
        # Decoders leave scratch memory in every thread that they have run in, so few threads build requests.
        # Python waits for these at its end; a thread that is left behind in native code could crash it.
        self._builders = ThreadPoolExecutor(held, thread_name_prefix="endpoint")
        self._failover = Failover(endpoint.urls)
        self._reaching: asyncio.Task[tuple[Any, bool]] | None = None

    def each(self, items: Iterable[T], answer: Callable[[T], Coroutine[Any, Any, R]]) -> Generator[list[R]]:
        """Yield the results of `answer` for all `items`, in lists, as they finish.

        The next items start when the caller asks for more: a killed run repeats only what was in flight.
        Raises what `answer` raises, after all results that finished well.
        """
        allow_open_files(self.concurrency)
        source = iter(items)
        in_flight: set[Future[R]] = set()
        finished: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
        try:
            while True:
                for item in islice(source, self.concurrency - len(in_flight)):
                    future = asyncio.run_coroutine_threadsafe(answer(item), event_loop())
                    in_flight.add(future)
                    future.add_done_callback(finished.put)
                if not in_flight:
                    return
                done = [finished.get()]
                while not finished.empty():
                    done.append(finished.get())
                in_flight.difference_update(done)
                if results := [future.result() for future in done if future.exception() is None]:
                    yield results
                for future in done:
                    future.result()
        finally:
            for future in in_flight:
                future.cancel()
            if self._reaching is not None:
                event_loop().call_soon_threadsafe(self._reaching.cancel)

    def close(self) -> None:
        """Wait for requests that are being built; those in flight are abandoned."""
        self._builders.shutdown(cancel_futures=True)

    async def draw(
        self,
        count: int,
        build: Callable[[int, int], dict[str, Any]],
        read: Callable[[Any], list[T]],
        on_text: OnText | None = None,
    ) -> list[T]:
        """Return `count` completions, by as many requests as it takes: some endpoints give one at a time.

        build(n, drawn): called in another thread; returns the body of a request for n more completions.
        read: converts an answer into at least one completion, or raises ServerFailure.
        on_text: is called with each piece of text as it arrives. Text cannot be taken back, so failures are
        not retried then; an endpoint that refuses to stream is asked again without.
        Raises ServerRefusal, ServerFailure after eight attempts, and VideoR1Error for an endpoint that stays
        away.
        """
        drawn: list[T] = []
        while (missing := count - len(drawn)) > 0:
            body = partial(build, missing, len(drawn))
            if on_text is None:
                more = await self._retried(body, read)
            else:
                try:
                    more = await self._streamed(body, read, partial(_shifted, on_text, len(drawn)))
                except ServerRefusal as refusal:
                    if refusal.status not in (400, 422):
                        raise
                    return await self.draw(count, build, read)
            drawn += more[:missing]
        return drawn

    async def _retried(self, build: Callable[[], dict[str, Any]], read: Callable[[Any], list[T]]) -> list[T]:
        attempt, began = 0, time.monotonic()
        while True:
            try:
                return await self._once(build, read)
            except ServerFailure as failure:
                # An endpoint that names a pause works; only after `wait` seconds does its answer count.
                asked_to_wait = failure.retry_after is not None
                attempt += not asked_to_wait or time.monotonic() - began > self.endpoint.wait
                if attempt >= ATTEMPTS:
                    if not await self._was_away():
                        raise
                    attempt = 1
                if self._failover.any_ready():
                    continue
                pause = min(FIRST_PAUSE * 2 ** max(0, attempt - 1), LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # not the same for all who wait

    async def _once(self, build: Callable[[], dict[str, Any]], read: Callable[[Any], list[T]]) -> list[T]:
        """Send one request and read its answer. While it waits, it holds a socket but no body."""
        with ExitStack() as holding:
            await self._held.acquire()
            holding.callback(self._held.release)
            body = [await self._built(build)]
            while (pause := self._failover.pause()) > 0:
                await asyncio.sleep(pause)

            async def sent_once() -> AsyncIterator[bytes]:
                yield body.pop()
                holding.close()  # reached once the body has been sent

            endpoint, size = self.endpoint, len(body[0])
            with self._failover.asking() as address:
                url = f"{address.url}/chat/completions"
                return read(await request("POST", url, endpoint.key, endpoint.timeout, sent_once(), size))

    async def _streamed(
        self, build: Callable[[], dict[str, Any]], read: Callable[[Any], list[T]], on_text: OnText
    ) -> list[T]:
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        body, chat, endpoint = (
            await self._built(lambda: build() | streaming),
            StreamedChat(on_text),
            self.endpoint,
        )
        with self._failover.asking() as address:
            url = f"{address.url}/chat/completions"
            await request_streamed(url, endpoint.key, endpoint.timeout, body, chat.take)
            return read(chat.reply())

    async def _built(self, build: Callable[[], dict[str, Any]]) -> bytes:
        def encoded() -> bytes:
            return json.dumps({name: value for name, value in build().items() if value is not None}).encode()

        return await asyncio.wrap_future(self._builders.submit(encoded))

    async def _was_away(self) -> bool:
        """Return whether no address answered at all. All requests wait together until one does."""
        if self._reaching is None or self._reaching.done():
            self._reaching = asyncio.create_task(models_when_reached(self.endpoint))
        try:
            return (await asyncio.shield(self._reaching))[1]
        except ServerFailure as failure:
            raise VideoR1Error(
                f"{self.endpoint.url} has not answered for {self.endpoint.wait:g} s ({failure}); "
                "started again, an annotation or evaluation continues"
            ) from failure


def _shifted(on_text: OnText, drawn: int, index: int, piece: str) -> None:
    on_text(drawn + index, piece)


def allow_open_files(requests: int) -> None:
    """Raise this process's limit of open files to what `requests` need: many systems start with 1,024.

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


# ---- Reading answers


def completions_of(reply: Any) -> list[Completion]:
    """Return the completions in an answer, in order. Reasoning in a field of its own becomes the rationale.

    Raises ServerFailure when the answer is no chat completion, or the server aborted a completion.
    """
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
        completions = [_completion(choice["message"], choice.get("finish_reason")) for choice in choices]
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerFailure(f"its answer is no chat completion: {json.dumps(reply)[:200]}") from error
    if not completions:
        raise ServerFailure("its answer has no completions")
    for completion in completions:
        if completion.finish_reason in ("abort", "error"):
            raise ServerFailure(f"a completion ended with {completion.finish_reason!r}")
    return completions


def _completion(message: Mapping[str, Any], finish_reason: str | None) -> Completion:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip() and "<think>" not in content:
        content = f"<think>{reasoning.strip()}</think>\n{content.strip()}"
    elif "</think>" in content and "<think>" not in content:  # the server's template wrote the first tag
        content = f"<think>{content.lstrip()}"
    if message.get("refusal"):
        return Completion(str(message["refusal"]), "content_filter")
    return Completion(content, str(finish_reason or "stop"))


class StreamedChat:
    """A chat completion assembled from streamed pieces.

    Reasoning in a field of its own is passed to `on_text` inside <think> tags, as `completions_of` writes it.
    """

    def __init__(self, on_text: OnText) -> None:
        self._on_text = on_text
        self._choices: dict[int, dict[str, Any]] = {}
        self._whole: Any = None  # answer of an endpoint that does not stream
        self._usage: Any = None
        self._pieces = 0

    def take(self, event: Any) -> None:
        """Add an event. Raises ServerFailure for one that is no piece of a chat completion."""
        try:
            self._usage = event.get("usage") or self._usage
            choices = [(choice.get("index", 0), choice) for choice in event["choices"]]
            if any("message" in choice for _, choice in choices):
                self._whole = event
                return
            pieces = [(index, piece) for index, choice in choices for piece in self._join(index, choice)]
        except (KeyError, TypeError, AttributeError) as error:
            said = json.dumps(event)[:200]
            raise ServerFailure(f"its answer is no piece of a chat completion: {said}") from error
        for index, piece in pieces:
            self._pieces += 1
            self._on_text(index, piece)

    def _join(self, index: int, choice: dict[str, Any]) -> list[str]:
        """Add a piece to its choice; return its texts."""
        blank = {"content": "", "reasoning": "", "refusal": "", "finish_reason": None}
        so_far = self._choices.setdefault(index, blank)
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        content = delta.get("content") or ""
        texts = []
        if reasoning:
            texts.append(reasoning if so_far["reasoning"] else f"<think>{reasoning.lstrip()}")
        if content:
            ends = so_far["reasoning"] and not so_far["content"]
            texts.append(f"</think>\n{content.lstrip()}" if ends else content)
        so_far["reasoning"] += reasoning
        so_far["content"] += content
        so_far["refusal"] += delta.get("refusal") or ""
        so_far["finish_reason"] = choice.get("finish_reason") or so_far["finish_reason"]
        return texts

    def reply(self) -> Any:
        """Return the answer as `completions_of` reads it. Raises ServerFailure for an incomplete one."""
        if self._whole is not None:
            return self._whole
        if not self._choices or any(choice["finish_reason"] is None for choice in self._choices.values()):
            raise ServerFailure(f"its answer broke off after {self._pieces} pieces")
        choices = [
            {"index": index, "message": message, "finish_reason": message["finish_reason"]}
            for index, message in self._choices.items()
        ]
        return {"choices": choices, "usage": self._usage or {"completion_tokens": self._pieces}}


# ---- Which model an endpoint serves


async def models_when_reached(endpoint: Endpoint) -> tuple[Any, bool]:
    """Return the list of models, or the ServerRefusal to give one, and whether the endpoint was away first.

    Of several addresses the first that answers counts. Raises ServerFailure when none answers within
    `endpoint.wait` seconds.
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
    """Return the list of models of the first address that answers. Raises ServerFailure and ServerRefusal."""
    *others, last = (f"{url}/models" for url in endpoint.urls)
    for url in others:
        with suppress(ServerFailure):
            return await request("GET", url, endpoint.key, 10.0)
    return await request("GET", last, endpoint.key, 10.0)


def open_endpoint(
    endpoint: Endpoint, wanted: str | None, frames_as: Literal["auto", "images", "video"]
) -> tuple[str, FramesAs]:
    """Return the name of the model to ask for and the form of its clips. Waits for addresses that start.

    frames_as: "auto" is "video" if all addresses take one, else "images". Raises ConfigError as
    `served_model` and `form_of_frames` do, and when two addresses serve different models.
    """
    found = {one.url: (one, *served_model(one, wanted)) for one in endpoint.each()}
    names = {url: name for url, (_, name, _) in found.items()}
    if len(set(names.values())) > 1:
        served = ", ".join(f"{url} serves {name}" for url, name in names.items())
        raise ConfigError(f"requests are shared by servers of one model, but {served}")
    forms = {form_of_frames(one, name, is_vllm, frames_as) for one, name, is_vllm in found.values()}
    return next(iter(names.values())), "video" if forms == {"video"} else "images"


def served_model(endpoint: Endpoint, wanted: str | None, prefix: str = "") -> tuple[str, bool]:
    """Return the name of the model to ask for, and whether the endpoint is vLLM. Waits for one that starts.

    prefix: start of the settings that errors name, as in judge_model. Raises ConfigError when nothing answers
    within `endpoint.wait`, the key is refused, several models are served and none is named, or the named one
    is not served. A service without a list of models needs `wanted`.
    """
    try:
        listed, _ = wait_for(models_when_reached(endpoint))
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
    shown = ", ".join(sorted(entries)[:10])
    if wanted is None and len(entries) != 1:
        raise ConfigError(
            f"{endpoint.url} serves {len(entries)} models; name one with --{prefix}model: {shown}"
        )
    model = next(iter(entries)) if wanted is None else wanted
    if entries and model not in entries:
        raise ConfigError(f"{endpoint.url} serves {shown}, not {model}")
    return model, entries.get(model) == "vllm"


def form_of_frames(
    endpoint: Endpoint, model: str, is_vllm: bool, wanted: Literal["auto", "images", "video"]
) -> FramesAs:
    """Return how a clip is sent. "auto": as a video if a vLLM server takes the frames' times, else as images.

    Raises ConfigError when "video" is wanted from an endpoint that does not take it.
    """
    if wanted == "images" or (wanted == "auto" and not is_vllm):
        return "images"
    body = {"model": model, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
    body["media_io_kwargs"] = {"video": {"num_frames": -1}}
    try:
        post(f"{endpoint.url}/chat/completions", endpoint.key, body, endpoint.timeout)
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
    """Return the addresses in a setting, without trailing slashes; a host alone gets the usual `/v1`."""
    return tuple(url if has_path(url) else f"{url}/v1" for url in addresses(text))
