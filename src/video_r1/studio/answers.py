"""What every part of the page asks and answers with."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


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
