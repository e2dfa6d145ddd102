"""Answers as a server writes them (`stream: true`): server-sent events, and what they come to together.

data: {"choices": [{"index": 0, "delta": {"content": "The"}}]}   ─► a piece of text, heard at once
…
data: [DONE]                                                     ─► the answer as a whole
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from video_r1.rollout.http_client import ServerFailure, opened

HearText = Callable[[int, str], object]
"""Is given the number of a completion and a piece of its text."""
HearToken = Callable[[int, int], object]
"""Is given the number of a completion and a token of it."""


async def post_streamed(
    url: str, key: str | None, timeout: float, body: bytes, take: Callable[[Any], object]
) -> None:
    """Gives `take` each JSON value of the answer as it comes; the whole one of a server that does not stream.

    timeout: seconds without a word. What `take` raises ends the request. Raises ServerRefusal, and
    ServerFailure where the connection breaks, an event is no JSON or tells of an error.
    """
    loop, path = asyncio.get_running_loop(), urlsplit(url).path
    try:
        async with asyncio.timeout(timeout) as limit, opened("POST", url, key, body) as reply:
            if "event-stream" not in reply.headers.get("Content-Type", ""):
                take(json.loads(await reply.aread()))
                return
            async for line in reply.aiter_lines():
                limit.reschedule(loop.time() + timeout)
                field, _, said = line.partition(":")
                if field != "data" or said.strip() == "[DONE]":
                    continue
                event = json.loads(said)
                if isinstance(event, dict) and event.get("error"):
                    raise ServerFailure(f"{path}: {_reason(event['error'])}")
                take(event)
    except TimeoutError as error:
        raise ServerFailure(f"not a word within {timeout:g} s at {path}") from error


def _reason(error: Any) -> str:
    return str(error.get("message") if isinstance(error, dict) else error)[:300]


class WrittenChat:
    """A chat completion that is put together from its pieces. A reasoning that an endpoint sends apart is
    heard between the tags of a rationale, as `completions_of` will write it.
    """

    def __init__(self, hear: HearText) -> None:
        self._hear = hear
        self._choices: dict[int, dict[str, Any]] = {}
        self._whole: Any = None  # of an endpoint that does not stream
        self._usage: Any = None
        self._pieces = 0

    def take(self, event: Any) -> None:
        """Raises ServerFailure for what is no piece of a chat completion."""
        try:
            self._usage = event.get("usage") or self._usage
            pieces = [(choice.get("index", 0), choice) for choice in event["choices"]]
            if any("message" in choice for _, choice in pieces):
                self._whole = event
                return
            heard = [(index, piece) for index, choice in pieces for piece in self._joined(index, choice)]
        except (KeyError, TypeError, AttributeError) as error:
            said = json.dumps(event)[:200]
            raise ServerFailure(f"its answer is no piece of a chat completion: {said}") from error
        for index, piece in heard:
            self._pieces += 1
            self._hear(index, piece)

    def _joined(self, index: int, choice: dict[str, Any]) -> list[str]:
        """Adds a piece to its choice; returns what of it is heard."""
        blank = {"content": "", "reasoning": "", "refusal": "", "finish_reason": None}
        so_far = self._choices.setdefault(index, blank)
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        content = delta.get("content") or ""
        heard = []
        if reasoning:
            heard.append(reasoning if so_far["reasoning"] else f"<think>{reasoning.lstrip()}")
        if content:
            ends = so_far["reasoning"] and not so_far["content"]
            heard.append(f"</think>\n{content.lstrip()}" if ends else content)
        so_far["reasoning"] += reasoning
        so_far["content"] += content
        so_far["refusal"] += delta.get("refusal") or ""
        so_far["finish_reason"] = choice.get("finish_reason") or so_far["finish_reason"]
        return heard

    def reply(self) -> Any:
        """The answer as `completions_of` reads it. Raises ServerFailure for one that broke off."""
        if self._whole is not None:
            return self._whole
        if not self._choices or any(one["finish_reason"] is None for one in self._choices.values()):
            raise ServerFailure(f"its answer broke off after {self._pieces} pieces")
        choices = [
            {"index": index, "message": one, "finish_reason": one["finish_reason"]}
            for index, one in self._choices.items()
        ]
        return {"choices": choices, "usage": self._usage or {"completion_tokens": self._pieces}}


class WrittenTokens:
    """Completions of vLLM's token endpoint that are put together from their tokens."""

    def __init__(self, hear: HearToken) -> None:
        self._hear = hear
        self._choices: dict[int, dict[str, Any]] = {}

    def take(self, event: Any) -> None:
        """Raises ServerFailure for what is no piece of such an answer."""
        try:
            for piece in event["choices"]:
                blank = {"index": piece["index"], "token_ids": [], "logprobs": {"content": []}}
                so_far = self._choices.setdefault(piece["index"], blank)
                ids = piece["token_ids"] or []
                so_far["token_ids"] += ids
                so_far["logprobs"]["content"] += (piece["logprobs"] or {"content": []})["content"]
                for name in ("finish_reason", "weight_versions"):
                    so_far[name] = piece.get(name) or so_far.get(name)
        except (KeyError, TypeError) as error:
            raise ServerFailure(f"its answer has no tokens: {json.dumps(event)[:200]}") from error
        for piece in event["choices"]:
            for token in piece["token_ids"] or []:
                self._hear(piece["index"], token)

    def choices(self) -> list[dict[str, Any]]:
        return list(self._choices.values())
