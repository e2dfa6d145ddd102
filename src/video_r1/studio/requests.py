"""Requests to the studio's server: who may ask (every request needs the token), their values, JSON answers.

The token is taken from the address once and kept as a cookie. A page of another site cannot read answers
(no CORS), start work (Sec-Fetch-Site), rebind a name to this address (the Host header is checked) or write (a
POST needs this page's origin and a header that forms cannot send). Text of a run folder cannot become a
script: the policy allows the studio's own files only.
"""

import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from video_r1.errors import RequestError
from video_r1.report.values import as_json

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1")
COOKIE = "video_r1_studio"
TOKEN_VARIABLE = "VIDEO_R1_STUDIO_TOKEN"
SHORTEST_TOKEN = 16  # characters
MAX_BODY = 100_000  # bytes of a POST
OWN_HEADER = "x-video-r1"


class Access:
    """ASGI middleware in front of every answer. any_host: accept Host headers of other machines too."""

    def __init__(self, app: ASGIApp, token: str, any_host: bool = False) -> None:
        self.app, self.token, self.any_host = app, token, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, with_headers)

    def refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that may not pass, None for one that may."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.any_host and host.rsplit(":", 1)[0] not in LOCAL:
            return _text(f"this server does not answer for {host[:100]!r}: open it by 127.0.0.1", 421)
        # Another page may link to this one, and no more. Only browsers send the header.
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return _text("only this server's own page may ask", 403)
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if headers.get(OWN_HEADER) != "1" or (origin is not None and urlsplit(origin).netloc != host):
                return _text("only this server's own page may write", 403)
        # Browsers send the cookies of one port to all ports of a machine.
        cookie = f"{COOKIE}_{host.rpartition(':')[2]}" if host[-1:].isdigit() else COOKIE
        given = QueryParams(scope["query_string"]).get("token")
        if given is not None and self._is_token(given):
            # The token leaves the address bar, and with it the history.
            entered = RedirectResponse("/", 303)
            entered.set_cookie(cookie, given, httponly=True, samesite="strict")
            return entered
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if any(map(self._is_token, (Request(scope).cookies.get(cookie, ""), bearer))):
            return None
        return _text("paste the address with ?token=… that the studio printed when it started", 401)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def token_of(token: str | None, token_file: str | None) -> tuple[str, bool]:
    """Return the token and whether the studio made it.

    A given one comes from `token`, else the file, else the environment variable. Raises RequestError for one
    that is short or that an address cannot contain, and when the file cannot be read.
    """
    source, given = "--token", token
    if given is None and token_file is not None:
        source = f"--token_file {token_file}"
        try:
            given = Path(token_file).read_text("utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise RequestError(f"{source} cannot be read: {getattr(error, 'strerror', error)}") from error
    if given is None:
        source, given = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return secrets.token_urlsafe(32), True
    if len(given) < SHORTEST_TOKEN or not re.fullmatch(r"[A-Za-z0-9._~-]+", given):
        raise RequestError(
            f"{source}: a token has at least {SHORTEST_TOKEN} characters (letters, digits, -._~); this has "
            f"{len(given)}; without a token the studio makes its own"
        )
    return given, False


def _text(text: str, status: int) -> Response:
    return PlainTextResponse(text + "\n", status)


class Answer(JSONResponse):
    """A JSON answer."""

    def render(self, content: Any) -> bytes:
        return as_json(content).encode("ascii")


def number(values: Mapping[str, Any], name: str) -> int:
    """Return a whole number of a request, 0 without one. Raises HTTPException 400."""
    try:
        return int(values.get(name, 0))
    except (TypeError, ValueError, OverflowError):
        raise HTTPException(400, f"{name} must be a whole number") from None


async def body_of(request: Request) -> dict[str, Any]:
    """Return the JSON object of a POST. Raises HTTPException 400, 413."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request has more than {MAX_BODY} bytes")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return asked
