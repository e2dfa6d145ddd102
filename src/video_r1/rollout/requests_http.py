"""JSON over HTTP with two kinds of errors: those that pass, and those that do not."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


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
    return _ask(urllib.request.Request(url), key, timeout)


def post(url: str, key: str | None, body: Any, timeout: float) -> Any:
    """Posts `body` as JSON (None: an empty body) and returns the JSON answer; None for an empty one."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return _ask(urllib.request.Request(url, data, headers, method="POST"), key, timeout)


def post_once(url: str, key: str | None, body: Iterator[bytes], size: int, timeout: float) -> Any:
    """As `post`, with a body of `size` bytes that is gone when it is sent, not kept until it is answered."""
    headers = {"Content-Type": "application/json", "Content-Length": str(size)}
    return _ask(urllib.request.Request(url, body, headers, method="POST"), key, timeout)


def _ask(request: urllib.request.Request, key: str | None, timeout: float) -> Any:
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    deadline = time.monotonic() + timeout
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = _read(answer, deadline)
        return json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        message = f"HTTP {error.code} at {request.selector}: {_reason(error)}"
        # 408, 429: too slow, too many. 5xx: an engine that dies answers so before its process ends.
        if error.code in (408, 429) or error.code >= 500:
            raise ServerFailure(message, _seconds(error.headers.get("Retry-After"))) from error
        raise ServerRefusal(message, error.code) from error
    except TimeoutError as error:
        raise ServerFailure(f"no answer within {timeout:g} s at {request.selector}") from error
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        # No connection, one that broke, or half an answer.
        raise ServerFailure(f"{type(error).__name__}: {error}") from error


def _read(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body. The socket's own time-out starts anew with every byte, so that it never ends a trickle.

    Raises TimeoutError after the deadline, IncompleteRead for a body that was cut off.
    """
    parts = []
    while part := answer.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    if answer.length:  # bytes that were promised and did not come
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _seconds(retry_after: str | None) -> float | None:
    """The header Retry-After, where it is a number of seconds (it may be a date)."""
    return float(retry_after) if retry_after and retry_after.strip().isdigit() else None


def _reason(error: urllib.error.HTTPError) -> str:
    """The first 300 characters of what the server says."""
    try:
        text = error.read().decode(errors="replace")
    except OSError:
        return str(error.reason)
    try:
        said = json.loads(text)
        text = str(said.get("detail") or said.get("error", {}).get("message") or text)
    except (json.JSONDecodeError, AttributeError):
        pass
    return text[:300]
