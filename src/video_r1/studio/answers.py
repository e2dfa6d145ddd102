"""What every part of the page asks and answers with."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from video_r1.report.run_data import as_table

MAX_BODY = 100_000  # bytes of a POST


class Answer(JSONResponse):
    """JSON in ASCII: half a character pair, which a model may write, is no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def number(values: Mapping[str, Any], name: str) -> int:
    """A whole number of a request. Raises HTTPException 400."""
    try:
        return int(values.get(name, 0))
    except (TypeError, ValueError, OverflowError):
        raise HTTPException(400, f"{name} has to be a whole number") from None


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that a POST brings. Raises HTTPException 400, 413."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"more than {MAX_BODY} bytes")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the request is no JSON object")
    return as_table(asked)
