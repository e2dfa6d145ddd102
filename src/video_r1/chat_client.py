"""Requests to OpenAI-compatible endpoints and vLLM servers, and the one place that reads their replies.

A retry goes to another address at once (`Failover`), and a body is freed when it is sent and built again for
a retry: thousands of requests wait on one event loop while the frames of a few are in memory.

A reply is trusted in nothing: its size and the pause that it asks for are bounded, and what is read of it has
a checked type (`shape_of`). A wrong one is a ServerFailure, as if the server were down.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import random
import re
import resource
import ssl
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from video_r1.errors import ConfigError, VideoR1Error
from video_r1.settings.decoding import addresses, has_path

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # of one request
PAUSE = 0.25  # seconds; doubled for each attempt
LONGEST_PAUSE = 60.0  # seconds that a server may ask to wait
SKIP = 5.0  # seconds for which a failed address is skipped
LARGEST_REPLY = 16 << 20  # bytes, unpacked, besides what the caller expects
MOST_TOKENS = 1 << 20  # of a completion
OTHER_FILES = 256  # files that a process may have open besides one per request
# Statuses of a request that is wrong in itself. Any other refusal (wrong key, unknown model) would meet all.
REFUSED_QUESTION = (400, 413, 415, 422)

T = TypeVar("T")
R = TypeVar("R")
FramesAs = Literal["images", "video"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Addresses (…/v1) of one model, and their key."""

    urls: tuple[str, ...]
    key: str | None = None
    timeout: float = 600.0  # seconds for one request
    wait: float = 240.0  # seconds to wait for an endpoint that does not answer

    @property
    def url(self) -> str:
        """Text that names all addresses, for messages."""
        return " and ".join(self.urls)

    def each(self) -> list[Endpoint]:
        return [replace(self, urls=(url,)) for url in self.urls]


class Completion(NamedTuple):
    text: str
    finish_reason: str  # "stop", "length" (cut off), "content_filter" or another word of the endpoint's
    work: Sequence[Any] = ()  # of an engine with tools: its calls and their results
    failed_calls: int = 0


class ServerFailure(Exception):
    """No answer, or an unusable one: a retry may help. retry_after: seconds that the server asks to wait."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoConnection(ServerFailure):
    """Nothing listens at the address, or it hung up."""


class ServerRefusal(Exception):
    """A refused request: a retry will not help. status: of the HTTP answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# ---- One request


def get(url: str, key: str | None, timeout: float) -> Any:
    """Return the JSON value at `url`, as `request` does."""
    return wait_for(request(url, key, timeout))


def post(url: str, key: str | None, body: Any, timeout: float) -> Any:
    """Post `body` as JSON (None: an empty body) and return the answer, as `request` does."""
    return wait_for(request(url, key, timeout, b"" if body is None else json.dumps(body).encode()))


async def request(
    url: str,
    key: str | None,
    timeout: float,
    body: bytes | AsyncIterator[bytes] | None = None,
    size: int | None = None,
    on_line: Callable[[str], object] | None = None,
    expected: int = 0,
) -> Any:
    """Send one request from the event loop and return its JSON answer; None for an empty one.

    timeout: seconds for the whole answer. body: JSON to post, None for a GET; the bytes of an iterator,
    `size` in all, are freed once they are sent. on_line: called with each line of a streamed answer, which is
    not returned. expected: bytes of the answer besides LARGEST_REPLY. Raises ServerFailure and ServerRefusal.
    """
    import httpx2  # here: importing it takes a while

    headers = {"Accept-Encoding": "identity"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {} if body is None else {"Content-Type": "application/json"}
    headers |= {} if size is None else {"Content-Length": str(size)}
    try:
        # Each request has its own connection: a pool would search thousands of them for each request.
        async with (
            asyncio.timeout(timeout),
            httpx2.AsyncClient(verify=_certificates(), timeout=None) as http,
            http.stream("GET" if body is None else "POST", url, headers=headers, content=body) as reply,
        ):
            if not reply.is_success:
                raise await _status_error(reply)
            rest = bytearray()
            async for piece in _unpacked(reply, LARGEST_REPLY + expected):
                rest += piece
                if on_line is not None and b"\n" in piece:
                    *lines, rest = rest.split(b"\n")
                    for line in lines:
                        on_line(line.decode())
            return json.loads(rest) if rest and on_line is None else None
    except TimeoutError as error:
        raise ServerFailure(f"no answer within {timeout:g} s at {urlsplit(url).path}") from error
    except httpx2.TransportError as error:  # it only says that all attempts failed
        first: BaseException = error
        while getattr(first, "errno", None) is None and (cause := first.__cause__ or first.__context__):
            first = cause
        raise NoConnection(f"{type(first).__name__}: {first}") from error
    # No JSON, or nested too deeply.
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, RecursionError, zlib.error) as error:
        raise ServerFailure(f"{type(error).__name__}: {error}") from error


async def _unpacked(reply: Any, most: int) -> AsyncIterator[bytes]:
    """Yield the bytes of a reply. Raises ServerFailure after `most`, and for an unknown compression."""
    packed = reply.headers.get("Content-Encoding", "identity").lower()
    if packed not in ("identity", "gzip", "deflate"):
        raise ServerFailure(f"its answer at {reply.url.path} is compressed by {packed[:20]!r}, unasked")
    unpacker = None if packed == "identity" else zlib.decompressobj(32 + zlib.MAX_WBITS)  # finds out which
    left = most
    async for piece in reply.aiter_raw():
        part = piece if unpacker is None else unpacker.decompress(piece, left + 1)
        if (left := left - len(part)) < 0:
            raise ServerFailure(f"its answer at {reply.url.path} has more than {most >> 20} MiB")
        yield part


async def _status_error(reply: Any) -> ServerFailure | ServerRefusal:
    text, said = "", reply.headers.get("Location")
    with suppress(ServerFailure, zlib.error):  # the status counts, whatever the text is
        async for piece in _unpacked(reply, LARGEST_REPLY):
            text += piece.decode(errors="replace")
            if len(text) > 10_000:
                break
    with suppress(ValueError, RecursionError, AttributeError):
        body = json.loads(text)
        message = body.get("error", body).get("message")
        said = said or (message if isinstance(message, str) else None)
    message = f"HTTP {reply.status_code} at {reply.url.path}: {(said or text)[:300]}"
    # 408, 429: too slow, too many. 5xx: an engine that dies answers so before its process ends.
    if reply.status_code in (408, 429) or reply.is_server_error:
        pause = re.fullmatch(r"\s*([0-9]+)\s*", reply.headers.get("Retry-After", ""))  # or it is a date
        return ServerFailure(message, min(float(pause[1]), LONGEST_PAUSE) if pause else None)
    return ServerRefusal(message, reply.status_code)


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


_loops: list[asyncio.AbstractEventLoop] = []
_starting = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop on which all requests of this process run."""
    with _starting:
        if not _loops:
            _loops.append(asyncio.new_event_loop())
            # A daemon: requests that wait when the run is interrupted must not keep the process alive.
            threading.Thread(target=_loops[0].run_forever, name="http", daemon=True).start()
        return _loops[0]


# ---- Several addresses


@dataclass(slots=True)
class Address:
    url: str
    in_flight: int = 0  # requests
    failed: bool = False  # since its last answer
    skipped_until: float = 0.0  # by time.monotonic

    @property
    def is_ready(self) -> bool:
        """Whether it may be asked. One request tries a failed address and decides for the others."""
        return self.skipped_until <= time.monotonic() and not (self.failed and self.in_flight)

    @property
    def rank(self) -> tuple[int, float]:
        return (0, self.in_flight) if self.is_ready else (1, self.skipped_until)


class Failover:
    """Chooses the address for each request: the least busy one that works. Thread-safe.

    A failed address is skipped for `SKIP` seconds, or as long as it asks for. When all are skipped, the next
    one is asked.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._all = {url: Address(url) for url in urls}
        self._lock = threading.Lock()

    def any_ready(self) -> bool:
        return any(address.is_ready for address in self._all.values())

    @contextmanager
    def asking(self) -> Iterator[Address]:
        """Yield the address for one request. A ServerFailure inside counts against it, a refusal does not."""
        with self._lock:
            address = min(self._all.values(), key=lambda address: address.rank)
            address.in_flight += 1
        try:
            yield address
            self.is_back(address.url)
        except ServerRefusal:
            self.is_back(address.url)
            raise
        except ServerFailure as failure:
            if not address.failed and len(self._all) > 1:
                logger.warning("%s: %s; skipped until it answers", address.url, failure)
            address.failed = True
            address.skipped_until = time.monotonic() + max(SKIP, failure.retry_after or 0.0)
            raise
        finally:
            with self._lock:
                address.in_flight -= 1

    def is_back(self, url: str) -> None:
        """Stop skipping an address, which has answered."""
        self._all[url].failed, self._all[url].skipped_until = False, 0.0


# ---- Many requests at once


class ChatClient:
    """Requests completions from an endpoint, up to `concurrency` requests at once; `held` are built at once.

    Failures are retried: at once if another address works, else after growing pauses, or the pause that the
    endpoint asks for.
    """

    def __init__(self, endpoint: Endpoint, concurrency: int, held: int = 8) -> None:
        self.endpoint, self.concurrency = endpoint, concurrency
        self._held, self._reaching = asyncio.Semaphore(held), asyncio.Lock()
        # Decoders leave scratch memory in every thread that they have run in, so few threads build requests.
        self._builders = ThreadPoolExecutor(held, thread_name_prefix="endpoint")
        self._failover = Failover(endpoint.urls)

    def each(self, items: Iterable[T], answer: Callable[[T], Coroutine[Any, Any, R]]) -> Generator[list[R]]:
        """Yield the results of `answer` for all `items`, in lists, as they finish; then raise what it raised.

        The next items start when the caller asks for more.
        """
        allow_open_files(self.concurrency)
        source = iter(items)
        in_flight: set[Future[R]] = set()
        try:
            while True:
                for item in islice(source, self.concurrency - len(in_flight)):
                    in_flight.add(asyncio.run_coroutine_threadsafe(answer(item), event_loop()))
                if not in_flight:
                    return
                done, in_flight = wait(in_flight, return_when=FIRST_COMPLETED)
                if results := [future.result() for future in done if future.exception() is None]:
                    yield results
                for future in done:
                    future.result()
        finally:
            for future in in_flight:
                future.cancel()

    def close(self) -> None:
        """Wait for requests that are being built; abandon those in flight."""
        self._builders.shutdown(cancel_futures=True)

    async def draw(
        self, count: int, build: Callable[[int, int], dict[str, Any]], read: Callable[[Any], list[T]]
    ) -> list[T]:
        """Return `count` completions, by as many requests as it takes: some endpoints give one at a time.

        build(n, drawn): returns the body of a request for n more completions. read: converts an answer into
        at least one, or raises ServerFailure. Raises ServerRefusal, ServerFailure after eight attempts, and
        VideoR1Error if no address answers for `wait` seconds.
        """
        drawn: list[T] = []
        while (missing := count - len(drawn)) > 0:
            drawn += (await self._retried(partial(build, missing, len(drawn)), read))[:missing]
        return drawn

    async def _retried(self, build: Callable[[], dict[str, Any]], read: Callable[[Any], list[T]]) -> list[T]:
        attempt, began = 0, time.monotonic()
        while True:
            try:
                return read(await self._once(build))
            except ServerFailure as failure:
                # An endpoint that names a pause works; only after `wait` seconds does its answer count.
                waits = failure.retry_after is not None
                attempt += not waits or time.monotonic() - began > self.endpoint.wait
                if attempt >= ATTEMPTS:
                    raise
                if isinstance(failure, NoConnection):
                    await self._reach()
                if not self._failover.any_ready():  # the pauses of all who wait differ
                    pause = min(failure.retry_after or PAUSE * 2**attempt, max(PAUSE, self.endpoint.wait))
                    await asyncio.sleep(pause * random.uniform(1.0, 1.5))

    async def _reach(self) -> None:
        """Wait for an address that answers, one request for all. Raises VideoR1Error after `wait` seconds."""
        endpoint = self.endpoint
        async with self._reaching:
            try:
                await models_of(endpoint, endpoint.wait)
            except ServerFailure as failure:
                raise VideoR1Error(
                    f"{endpoint.url} has not answered for {endpoint.wait:g} s ({failure}); started again, "
                    "an annotation or evaluation continues"
                ) from failure

    async def _once(self, build: Callable[[], dict[str, Any]]) -> Any:
        """Send one request and return its answer. While it waits, it holds no body."""

        def encoded() -> bytes:
            return json.dumps({name: value for name, value in build().items() if value is not None}).encode()

        async def sent_once() -> AsyncIterator[bytes]:
            yield body.pop()
            holding.close()  # reached once the body has been sent

        with ExitStack() as holding:
            await self._held.acquire()
            holding.callback(self._held.release)
            body = [await event_loop().run_in_executor(self._builders, encoded)]
            with self._failover.asking() as address:
                url, asked = f"{address.url}/chat/completions", self.endpoint
                return await request(url, asked.key, asked.timeout, sent_once(), len(body[0]))


def allow_open_files(requests: int) -> None:
    """Raise this process's limit of open files for so many requests: many systems start with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [limit for limit in (requests + OTHER_FILES, hard) if limit != resource.RLIM_INFINITY]
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(limits)), hard))


# ---- Reading answers


@contextmanager
def shape_of(reply: Any, what: str) -> Iterator[None]:
    """Raise ServerFailure, with the beginning of the reply, if the block cannot read `what` in it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        beginning = "it is nested too deeply"
        with suppress(RecursionError):
            beginning = json.dumps(reply)[:200]
        raise ServerFailure(f"its answer is no {what}: {beginning}") from error


def number(value: Any, least: float, most: float) -> Any:
    """Return a finite JSON number within bounds. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"no number from {least:g} to {most:g}")
    return value


def integer(value: Any, least: int, most: int) -> int:
    """Return a JSON integer within bounds. Raises ValueError."""
    if not isinstance(value, int):
        raise ValueError("no integer")
    return number(value, least, most)


def word(value: Any) -> str:
    """Return a text of one to 1,000 characters, such as a name. Raises ValueError."""
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise ValueError("no name")
    return value


def completions_of(reply: Any) -> list[Completion]:
    """Return the completions in an answer, in order. Reasoning in a field of its own becomes the rationale.

    Raises ServerFailure when the answer is no chat completion, or the server aborted a completion.
    """
    with shape_of(reply, "chat completion"):
        choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
        completions = [_completion(choice["message"], choice.get("finish_reason")) for choice in choices]
    if not completions:
        raise ServerFailure("its answer has no completions")
    for completion in completions:
        if completion.finish_reason in ("abort", "error"):
            raise ServerFailure(f"a completion ended with {completion.finish_reason!r}")
    return completions


def _completion(message: dict[str, Any], finish_reason: Any) -> Completion:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip() and "<think>" not in content:
        content = f"<think>{reasoning.strip()}</think>\n{content.strip()}"
    elif "</think>" in content and "<think>" not in content:  # the server's template wrote the first tag
        content = f"<think>{content.lstrip()}"
    if refusal := message.get("refusal"):
        return Completion(refusal if isinstance(refusal, str) else "", "content_filter")
    content = content.encode(errors="replace").decode()  # without surrogates
    return Completion(content, word(finish_reason or "stop"))


# ---- Which model an endpoint serves


async def models_of(endpoint: Endpoint, wait: float) -> Any:
    """Return the list of models of the first address that answers, or the ServerRefusal to give one.

    Raises ServerFailure when no address answers within `wait` seconds.
    """
    deadline, warned, failure = time.monotonic() + wait, False, ServerFailure("no address")
    while True:
        for url in endpoint.urls:
            try:
                return await request(f"{url}/models", endpoint.key, 10.0)
            except ServerRefusal as refusal:
                return refusal
            except ServerFailure as error:
                failure = error
        if time.monotonic() >= deadline:
            raise failure
        if not warned:
            logger.warning("%s: %s; waiting up to %g s for it", endpoint.url, failure, wait)
        warned = True
        await asyncio.sleep(min(1.0, wait / 10))


def open_endpoint(
    endpoint: Endpoint, wanted: str | None, frames_as: Literal["auto", "images", "video"]
) -> tuple[str, FramesAs]:
    """Return the name of the model to ask for and the form of its clips. Waits for addresses that start.

    frames_as: "auto" is "video" if all addresses are vLLM and take the frames' times, else "images". Raises
    ConfigError as `served_model` does, for two models, and for "video" where an address takes none.
    """
    found = [(one, *served_model(one, wanted)) for one in endpoint.each()]
    model = found[0][1]
    if any(name != model for _, name, _ in found):
        served = ", ".join(f"{one.url} serves {name}" for one, name, _ in found)
        raise ConfigError(f"requests are shared by servers of one model, but {served}")
    if frames_as == "images" or (frames_as == "auto" and not all(is_vllm for *_, is_vllm in found)):
        return model, "images"
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Say yes."}]}
    body |= {"max_tokens": 1, "media_io_kwargs": {"video": {"num_frames": -1}}}
    for one in endpoint.each():
        try:
            post(f"{one.url}/chat/completions", one.key, body, one.timeout)
        except ServerFailure as failure:
            raise ConfigError(f"{one.url}: {failure}") from failure
        except ServerRefusal as refusal:
            if frames_as == "auto":
                return model, "images"
            raise ConfigError(
                f"{one.url} does not take a video's frames with their times ({refusal}); start vLLM with "
                "--trust-request-mm-kwargs, or set frames_as images"
            ) from refusal
    return model, "video"


def served_model(endpoint: Endpoint, wanted: str | None, prefix: str = "") -> tuple[str, bool]:
    """Return the name of the model to ask for, and whether the endpoint is vLLM. Waits for one that starts.

    prefix: start of the settings that errors name, as in judge_model. Raises ConfigError if nothing answers,
    the key is refused, or the model cannot be chosen.
    """
    url = endpoint.url
    try:
        listed = wait_for(models_of(endpoint, endpoint.wait))
    except ServerFailure as failure:
        raise ConfigError(f"{url}: no endpoint answered within {endpoint.wait:g} s ({failure})") from failure
    status = getattr(listed, "status", None)  # of a refusal
    if status == 404 and wanted is not None:
        return wanted, False
    try:
        if status:
            raise listed
        with shape_of(listed, "list of models"):
            owners = {word(entry["id"]): entry.get("owned_by") for entry in listed["data"]}
    except (ServerFailure, ServerRefusal) as error:
        raise ConfigError(
            f"{url}: {error}; give the address of an OpenAI-compatible endpoint, which mostly ends in /v1, "
            f"the model's name with --{prefix}model, and the key in the environment (--{prefix}key_variable)"
        ) from error
    shown = ", ".join(sorted(owners)[:10])
    if wanted is None and len(owners) != 1:
        raise ConfigError(f"{url} serves {len(owners)} models; name one with --{prefix}model: {shown}")
    model = wanted or next(iter(owners))
    if owners and model not in owners:
        raise ConfigError(f"{url} serves {shown}, not {model}")
    return model, owners.get(model) == "vllm"


def endpoint_urls(text: str) -> tuple[str, ...]:
    """Return the addresses in a setting; a host alone gets the usual `/v1`."""
    return tuple(url if has_path(url) else f"{url}/v1" for url in addresses(text))
