"""JSON over HTTP with two kinds of errors: those that pass, and those that do not.

All requests of a process run on one event loop in a thread of its own, however many wait for their answers.
`ask` is for coroutines on that loop (`wait_for` runs them), `get` and `post` for callers who want one answer.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import ssl
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

# A connection for each request, which lasts seconds: none is found closed, and no pool has to look through
# thousands of others whenever a request begins or ends. Whoever asks limits how many there are.
LIMITS = httpx.Limits(max_connections=1, max_keepalive_connections=0)
# A request that is wrong in itself; any other refusal (a wrong key, no such model) would meet all of them.
REFUSED_QUESTION = (400, 413, 415, 422)


class ServerFailure(Exception):
    """It did not answer, or not usably: asking again may help. retry_after: seconds that it asks to wait."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerRefusal(Exception):
    """It refused the request: asking again will not help. status: of the HTTP answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def get(url: str, key: str | None, timeout: float) -> Any:
    """The JSON value at `url`; None for an empty body. `key`: sent as bearer token. timeout: seconds."""
    return wait_for(ask("GET", url, key, timeout))


def post(url: str, key: str | None, body: Any, timeout: float) -> Any:
    """Posts `body` as JSON (None: an empty body) and returns the JSON answer; None for an empty one."""
    return wait_for(ask("POST", url, key, timeout, b"" if body is None else json.dumps(body).encode()))


async def ask(
    method: str,
    url: str,
    key: str | None,
    timeout: float,
    body: bytes | AsyncIterator[bytes] | None = None,
    size: int | None = None,
) -> Any:
    """One request on the event loop; `timeout` is for all of it, so that no trickle outlasts it.

    body: JSON; an iterator's bytes (`size` in all) are gone when they are sent, not kept until the answer.
    Raises ServerFailure and ServerRefusal.
    """
    try:
        async with asyncio.timeout(timeout), opened(method, url, key, body, size) as reply:
            content = await reply.aread()
            return json.loads(content) if content else None
    except TimeoutError as error:
        raise ServerFailure(f"no answer within {timeout:g} s at {urlsplit(url).path}") from error


@asynccontextmanager
async def opened(
    method: str,
    url: str,
    key: str | None,
    body: bytes | AsyncIterator[bytes] | None = None,
    size: int | None = None,
) -> AsyncIterator[httpx.Response]:
    """A successful answer of which nothing has been read yet.

    Raises ServerFailure and ServerRefusal, also for what breaks while it is read, and for what is no JSON.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {} if body is None else {"Content-Type": "application/json"}
    headers |= {} if size is None else {"Content-Length": str(size)}
    try:
        async with (
            httpx.AsyncClient(verify=_certificates(), timeout=None, limits=LIMITS) as client,
            client.stream(method, url, headers=headers, content=body) as reply,
        ):
            if not reply.is_success:
                await reply.aread()
                raise _failure(reply, urlsplit(url).path)
            yield reply
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        # No connection, one that broke, half an answer, or none in JSON.
        raise ServerFailure(f"{type(error).__name__}: {_said(error)}") from error


def _failure(reply: httpx.Response, path: str) -> ServerFailure | ServerRefusal:
    message = f"HTTP {reply.status_code} at {path}: {_reason(reply)}"
    # 408, 429: too slow, too many. 5xx: an engine that dies answers so before its process ends.
    if reply.status_code in (408, 429) or reply.is_server_error:
        pause = reply.headers.get("Retry-After", "").strip()  # seconds, or a date
        return ServerFailure(message, float(pause) if pause.isdigit() else None)
    return ServerRefusal(message, reply.status_code)


def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs it on the event loop, from another thread; it is cancelled when its caller is interrupted."""
    future = asyncio.run_coroutine_threadsafe(coroutine, event_loop())
    try:
        return future.result()
    finally:
        future.cancel()


def event_loop() -> asyncio.AbstractEventLoop:
    """The one on which all requests of this process run."""
    with _starting:
        return _started_loop()


@functools.cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # Requests that wait for an answer when the run is interrupted must not keep the process alive.
    threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
    return loop


_starting = threading.Lock()
os.register_at_fork(after_in_child=_started_loop.cache_clear)  # a forked process has no such thread


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()  # the system's; reading them takes a while


def _said(error: BaseException) -> str:
    """What the system said, where the library has only that no attempt succeeded; else the error's text."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "errno", None) is None:
        cause = cause.__cause__ or cause.__context__
    return str(cause or error)


def _reason(reply: httpx.Response) -> str:
    """The first 300 characters of what the server says."""
    if reply.has_redirect_location:
        return f"it has moved to {reply.headers['Location']}"
    text = reply.text
    try:
        said = json.loads(text)
        text = str(said.get("detail") or said.get("error", {}).get("message") or text)
    except (json.JSONDecodeError, AttributeError):
        pass
    return text[:300]
