"""Requests to OpenAI-compatible endpoints and vLLM servers, by the `openai` package.

    items ─► build, send ───────────► wait for the answer ─► completions
             at most `held` at once   up to `concurrency` at once

`openai` sends a request, authorises it, reads errors and decodes streamed answers. What it cannot do is here:
- Several addresses share the requests (`Failover`). A retry goes to another address at once, and a pause that
  an address asks for (Retry-After) holds for all requests: so retries are made here, not by `openai`.
- A request is a task on one event loop. Its body is freed when it is sent, and built again for a retry:
  thousands of requests wait while the frames of a few are in memory.
- A timeout covers the whole answer, so that a slow trickle of bytes cannot outlast it.
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
from contextlib import ExitStack, contextmanager
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
Build = Callable[[], dict[str, Any]]
OnEvent = Callable[[Any], object]
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
        return [replace(self, urls=(url,)) for url in self.urls]


class Completion(NamedTuple):
    text: str
    finish_reason: str  # "stop", "length" (cut off), "content_filter" or another word of the endpoint's


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
    """Return the JSON value at `url`, as `request` does."""
    return wait_for(request("GET", url, key, timeout))


def post(url: str, key: str | None, body: Any, timeout: float) -> Any:
    """Post `body` as JSON (None: an empty body) and return the answer, as `request` does."""
    return wait_for(request("POST", url, key, timeout, b"" if body is None else json.dumps(body).encode()))


async def request(
    method: Literal["GET", "POST"],
    url: str,
    key: str | None,
    timeout: float,
    body: bytes | AsyncIterator[bytes] = b"",
    size: int | None = None,
    on_event: OnEvent | None = None,
) -> Any:
    """Send one request from the event loop and return its JSON answer; None for an empty one.

    timeout: seconds for all of it, or between two events of a streamed answer. body: JSON; the bytes of an
    iterator, `size` in all, are freed once they are sent. on_event: is called with each JSON value of a
    streamed answer as it arrives, or with the only one of a server that does not stream; its exceptions end
    the request. Raises ServerFailure and ServerRefusal.
    """
    import httpx2  # here: importing both takes a second
    import openai

    headers: dict[str, Any] = {
        "Authorization": f"Bearer {key}" if key else openai.omit,
        "OpenAI-Organization": openai.omit,  # no environment variables of openai's own are sent
        "OpenAI-Project": openai.omit,
        **({} if size is None else {"Content-Length": str(size)}),
    }
    given: Any = {"cast_to": httpx2.Response, "options": {"headers": headers}}
    if on_event is not None:
        given |= {"stream": True, "stream_cls": openai.AsyncStream[object]}
    # Each request has its own connection, which is never found closed; a pool would search thousands of them
    # whenever a request begins or ends.
    limits = httpx2.Limits(max_connections=1, max_keepalive_connections=0)
    now = asyncio.get_running_loop().time
    try:
        async with (
            asyncio.timeout(timeout) as limit,
            httpx2.AsyncClient(verify=_certificates(), timeout=None, limits=limits) as http,
        ):
            client = openai.AsyncOpenAI(
                api_key="-", base_url="http://-", max_retries=0, timeout=None, http_client=http
            )
            reply = await (
                client.get(url, **given) if method == "GET" else client.post(url, content=body, **given)
            )
            if on_event is None or "event-stream" not in reply.headers.get("Content-Type", ""):
                content = await reply.aread()
                answer = json.loads(content) if content else None
                return answer if on_event is None else on_event(answer)
            async for event in openai.AsyncStream(cast_to=object, response=reply, client=client):
                limit.reschedule(now() + timeout)
                on_event(event)
    except TimeoutError as error:
        said = "no answer" if on_event is None else "not a word"
        raise ServerFailure(f"{said} within {timeout:g} s at {urlsplit(url).path}") from error
    except openai.APIStatusError as error:
        raise _status_error(error) from error
    # No connection, a broken one, half an answer, an event that is an error, or no JSON.
    except (openai.OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        first = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
        raise ServerFailure(f"{type(first).__name__}: {_system_error(first) or first}") from error


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


def _system_error(error: BaseException | None) -> BaseException | None:
    """Return the system's error behind one of httpx, which only says that all attempts failed."""
    while error is not None and getattr(error, "errno", None) is None:
        error = error.__cause__ or error.__context__
    return error


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()  # the system's; reading them takes a while


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
    the others. When all are skipped, the one whose time ends first is asked. An address that asks for a pause
    gets no request before its end.
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
        """Yield the address for one request. A ServerFailure inside counts against it, a refusal does not."""
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
        self._answered(next(address for address in self._all if address.url == url))

    def _choice(self) -> Address:
        if ready := self._ready():
            return min(ready, key=lambda address: address.in_flight)
        return min(self._all, key=lambda address: address.skipped_until)

    def _ready(self) -> list[Address]:
        now = self._clock()
        return [a for a in self._all if a.skipped_until <= now and not (a.failures and a.in_flight)]

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
        """Yield the results of `answer` for all `items`, in lists, as they finish; then raise what it raised.

        The next items start when the caller asks for more: a killed run repeats only what was in flight.
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

        build(n, drawn): returns the body of a request for n more completions, in another thread. read:
        converts an answer into at least one completion, or raises ServerFailure. on_text: gets each piece of
        text as it arrives; then failures are not retried, and an endpoint that refuses to stream is asked
        again without.
        Raises ServerRefusal, ServerFailure after eight attempts, and VideoR1Error if no address answers.
        """
        drawn: list[T] = []
        while (missing := count - len(drawn)) > 0:
            body = partial(build, missing, len(drawn))
            if on_text is None:
                drawn += (await self._retried(body, read))[:missing]
                continue
            try:
                drawn += (await self._streamed(body, read, on_text, len(drawn)))[:missing]
            except ServerRefusal as refusal:
                if refusal.status not in (400, 422):
                    raise
                return await self.draw(count, build, read)
        return drawn

    async def _retried(self, build: Build, read: Callable[[Any], list[T]]) -> list[T]:
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
                if not self._failover.any_ready():
                    pause = min(FIRST_PAUSE * 2 ** max(0, attempt - 1), LONGEST_PAUSE)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # not the same for all who wait

    async def _once(self, build: Build, read: Callable[[Any], list[T]]) -> list[T]:
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

            return read(await self._post(sent_once(), len(body[0])))

    async def _streamed(
        self, build: Build, read: Callable[[Any], list[T]], on_text: OnText, drawn: int
    ) -> list[T]:
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        body, chat = await self._built(lambda: build() | streaming), StreamedChat(on_text, drawn)
        await self._post(body, None, chat.take)
        return read(chat.reply())

    async def _post(
        self, body: Any, size: int | None, on_event: Callable[[Any], object] | None = None
    ) -> Any:
        with self._failover.asking() as address:
            url, endpoint = f"{address.url}/chat/completions", self.endpoint
            return await request("POST", url, endpoint.key, endpoint.timeout, body, size, on_event)

    async def _built(self, build: Build) -> bytes:
        def encoded() -> bytes:
            return json.dumps({name: value for name, value in build().items() if value is not None}).encode()

        return await asyncio.wrap_future(self._builders.submit(encoded))

    async def _was_away(self) -> bool:
        """Return whether no address answered at all. All requests wait together until one does."""
        if self._reaching is None or self._reaching.done():
            self._reaching = asyncio.create_task(models_of(self.endpoint, self.endpoint.wait))
        try:
            return (await asyncio.shield(self._reaching))[1]
        except ServerFailure as failure:
            raise VideoR1Error(
                f"{self.endpoint.url} has not answered for {self.endpoint.wait:g} s ({failure}); "
                "started again, an annotation or evaluation continues"
            ) from failure


def allow_open_files(requests: int) -> None:
    """Raise this process's limit of open files to what `requests` need: many systems start with 1,024.

    Raises ConfigError when the system does not allow it.
    """
    wanted = requests + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if soft != resource.RLIM_INFINITY and soft < wanted:
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
    """A chat completion assembled from streamed pieces. drawn: completions of the answers before.

    Reasoning in a field of its own is passed to `on_text` inside <think> tags, as `completions_of` writes it.
    """

    def __init__(self, on_text: OnText, drawn: int) -> None:
        self._on_text, self._drawn = on_text, drawn
        self._messages: dict[int, dict[str, str]] = {}
        self._finished: dict[int, str] = {}
        self._whole: Any = None  # answer of an endpoint that does not stream
        self._usage: Any = None
        self._pieces = 0

    def take(self, event: Any) -> None:
        """Add an event. Raises ServerFailure for one that is no piece of a chat completion."""
        try:
            self._usage = event.get("usage") or self._usage
            if any("message" in choice for choice in event["choices"]):
                self._whole = event
                return
            pieces = [piece for choice in event["choices"] for piece in self._texts(choice)]
        except (KeyError, TypeError, AttributeError) as error:
            said = json.dumps(event)[:200]
            raise ServerFailure(f"its answer is no piece of a chat completion: {said}") from error
        for index, piece in pieces:
            self._pieces += 1
            self._on_text(self._drawn + index, piece)

    def _texts(self, choice: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Add a piece to its message; yield its texts."""
        index, delta = choice.get("index", 0), choice.get("delta") or {}
        message = self._messages.setdefault(index, {"reasoning": "", "content": "", "refusal": ""})
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        content = delta.get("content") or ""
        if reasoning:
            yield index, reasoning if message["reasoning"] else f"<think>{reasoning.lstrip()}"
        message["reasoning"] += reasoning
        if content:
            ends = message["reasoning"] and not message["content"]
            yield index, f"</think>\n{content.lstrip()}" if ends else content
        message["content"] += content
        message["refusal"] += delta.get("refusal") or ""
        if choice.get("finish_reason"):
            self._finished[index] = choice["finish_reason"]

    def reply(self) -> Any:
        """Return the answer as `completions_of` reads it. Raises ServerFailure for an incomplete one."""
        if self._whole is not None:
            return self._whole
        if not self._messages or self._messages.keys() != self._finished.keys():
            raise ServerFailure(f"its answer broke off after {self._pieces} pieces")
        choices = [
            {"index": index, "message": message, "finish_reason": self._finished[index]}
            for index, message in self._messages.items()
        ]
        return {"choices": choices, "usage": self._usage or {"completion_tokens": self._pieces}}


# ---- Which model an endpoint serves


async def models_of(endpoint: Endpoint, wait: float) -> tuple[Any, bool]:
    """Return the list of models, or the ServerRefusal to give one, and whether the endpoint was away first.

    Raises ServerFailure when no address answers within `wait` seconds.
    """
    deadline, away, failure = time.monotonic() + wait, False, ServerFailure("no address")
    while True:
        for url in endpoint.urls:
            try:
                return await request("GET", f"{url}/models", endpoint.key, 10.0), away
            except ServerRefusal as refusal:
                return refusal, away
            except ServerFailure as error:
                failure = error
        if time.monotonic() >= deadline:
            raise failure
        if not away:
            logger.warning("%s: %s; waiting up to %g s for it", endpoint.url, failure, wait)
        away = True
        await asyncio.sleep(min(1.0, wait / 10))


def open_endpoint(
    endpoint: Endpoint, wanted: str | None, frames_as: Literal["auto", "images", "video"]
) -> tuple[str, FramesAs]:
    """Return the name of the model to ask for and the form of its clips. Waits for addresses that start.

    frames_as: "auto" is "video" if all addresses take one, else "images". Raises ConfigError as
    `served_model` and `form_of_frames` do, and when two addresses serve different models.
    """
    found = [(one, *served_model(one, wanted)) for one in endpoint.each()]
    if len({name for _, name, _ in found}) > 1:
        served = ", ".join(f"{one.url} serves {name}" for one, name, _ in found)
        raise ConfigError(f"requests are shared by servers of one model, but {served}")
    forms = {form_of_frames(one, name, is_vllm, frames_as) for one, name, is_vllm in found}
    return found[0][1], "video" if forms == {"video"} else "images"


def served_model(endpoint: Endpoint, wanted: str | None, prefix: str = "") -> tuple[str, bool]:
    """Return the name of the model to ask for, and whether the endpoint is vLLM. Waits for one that starts.

    prefix: start of the settings that errors name, as in judge_model. Raises ConfigError if nothing answers,
    the key is refused, or the model cannot be chosen. A service without a list of models needs `wanted`.
    """
    try:
        listed, _ = wait_for(models_of(endpoint, endpoint.wait))
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
        owners = {str(entry["id"]): entry.get("owned_by") for entry in listed["data"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{endpoint.url}/models is no list of models: {json.dumps(listed)[:200]}"
        ) from error
    shown = ", ".join(sorted(owners)[:10])
    if wanted is None and len(owners) != 1:
        raise ConfigError(
            f"{endpoint.url} serves {len(owners)} models; name one with --{prefix}model: {shown}"
        )
    model = next(iter(owners)) if wanted is None else wanted
    if owners and model not in owners:
        raise ConfigError(f"{endpoint.url} serves {shown}, not {model}")
    return model, owners.get(model) == "vllm"


def form_of_frames(
    endpoint: Endpoint, model: str, is_vllm: bool, wanted: Literal["auto", "images", "video"]
) -> FramesAs:
    """Return how a clip is sent. "auto": as a video if a vLLM server takes the frames' times, else as images.

    Raises ConfigError when "video" is wanted from an endpoint that does not take it.
    """
    if wanted == "images" or (wanted == "auto" and not is_vllm):
        return "images"
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Say yes."}]}
    body |= {"max_tokens": 1, "media_io_kwargs": {"video": {"num_frames": -1}}}
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
