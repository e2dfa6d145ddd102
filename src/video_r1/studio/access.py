"""Who may speak to the server: this machine's own pages, or whoever has the token.

A page of another site cannot read answers (no CORS) or begin work (Sec-Fetch-Site), cannot rebind a name to
this address (the Host header is checked), cannot write (a POST needs this page's origin and a header that
forms cannot send), and what a run folder says cannot become script (the policy runs the page's files alone).
"""

import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self'; "
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
OWN_HEADER = "x-video-r1"


class Access:
    """The gate before every answer. token: None where only this machine is listened to."""

    def __init__(self, app: ASGIApp, token: str | None, hosts: Sequence[str] = ()) -> None:
        self.app, self.token, self.hosts = app, token, {*LOCAL, *hosts}

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
        """What is answered instead, None where the request may pass."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.token is None and host.rsplit(":", 1)[0] not in self.hosts:
            return _text(f"this server does not answer for {host[:100]!r}: open it by 127.0.0.1", 421)
        # Another page may link to this one, and no more; what is no browser does not say where it is from.
        if scope["path"] != "/" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return _text("only this server's own page may ask", 403)
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if headers.get(OWN_HEADER) != "1" or (origin is not None and urlsplit(origin).netloc != host):
                return _text("only this server's own page may write", 403)
        if self.token is None:
            return None
        given = QueryParams(scope["query_string"]).get("token")
        if given is not None and self._is_token(given):
            # The token leaves the address bar, and with it the history.
            entered = RedirectResponse("/", 303)
            entered.set_cookie(COOKIE, given, httponly=True, samesite="strict")
            return entered
        if self._is_token(_cookie(headers)) or self._is_token(headers.get("authorization", "")[7:]):
            return None
        return _text("open the address with ?token=… that the server printed when it started", 401)

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def _cookie(headers: Headers) -> str:
    pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")


def _text(text: str, status: int) -> Response:
    return PlainTextResponse(text + "\n", status)
