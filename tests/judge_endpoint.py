"""A judge on loopback, which can be away, and questions that have answers of words."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from chat_endpoint import ChatEndpoint
from tiny_questions import write_manifest

GIVEN = re.compile(r"<given_answer>\n(.*)\n</given_answer>", re.DOTALL)

TRIAL = "It has 4 legs."  # the answer in the question before the first step


class JudgeEndpoint(ChatEndpoint):
    """Scores an answer by its letters; `said[answer]` is what it says in place of that, or an HTTP status.
    `away`: it closes every connection.
    """

    def __init__(self) -> None:
        super().__init__("judge")
        self.said: dict[str, str | int] = {}
        self.away = False
        self.away_after: int | None = None  # so many requests

    def asked(self) -> list[str]:
        """The answers that it was asked about, in turn, without the trial before the first step."""
        found = [GIVEN.search(request["messages"][0]["content"]) for request in self.requests]
        return [one[1] for one in found if one and one[1] != TRIAL]

    def chat(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        (answer,) = GIVEN.findall(body["messages"][0]["content"])
        with self.changed:
            many = self.away_after is not None and len(self.asked()) >= self.away_after
            self.away = self.away or (many and answer != TRIAL)
            if self.away:
                return handler.connection.close()
        said = self.event_of(body, lambda: self.said.get(answer, str(score(answer))))
        if isinstance(said, int):
            return self.act(handler, said, 0, body)
        message = {"role": "assistant", "content": said}
        self.reply(handler, 200, {"choices": [{"message": message, "finish_reason": "stop"}]})

    def reply(self, handler: Any, status: int, value: Any, *rest: Any, **more: Any) -> None:
        if self.away:
            return handler.connection.close()
        super().reply(handler, status, value, *rest, **more)


def score(answer: str) -> float:
    return sum(map(ord, answer)) % 11 / 10


def free_form_manifest(folder: Path) -> Path:
    """The tiny questions, all of which want a sentence."""
    path = write_manifest(folder)
    changes = {"problem_type": "free-form", "options": [], "solution": "<answer>it moves right</answer>"}
    path.write_text(json.dumps([{**row, **changes} for row in json.loads(path.read_text())]))
    return path
