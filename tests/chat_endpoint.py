"""An OpenAI-compatible endpoint on loopback that fails in every way that one can, and annotations by it."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_models import moving_square, write_clip

from video_r1.annotation.annotate import Counts, run_annotate
from video_r1.settings.decoding import AnnotateSettings

QUESTION = re.compile(r"Question (\d+):")


def rationale(number: int, seed: int, index: int) -> str:
    """Return thirty words that name the question, the seed and the completion."""
    story = " ".join(f"then{word} happens" for word in range(12))
    return f"In question {number} with seed {seed} and draw {index} first it begins, {story} and it ends."


class ChatEndpoint:
    """Answers "B" with a rationale to every question, unless the next event in `script[number]` is another.

    Events: an HTTP status; "busy": 429 with Retry-After 0; "garbage": no chat completion; "drop": no
    answer; "slow": a late answer; "one": one completion instead of all; "abort": an aborted completion;
    "wrong": the wrong answer; "length": the token limit; "bare": no tags; "<…": this text.
    `gate`: requests that must be in flight before any is answered. `right`: the right answer.
    """

    def __init__(self, model: str = "teacher", owner: str = "tests") -> None:
        self.model, self.owner = model, owner
        self.script: defaultdict[int, list[Any]] = defaultdict(list)
        self.always: Any = None  # an event for every request without a script
        self.pause, self.gate, self.right = 0.0, 0, "B"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = self.answered = 0
        self.changed = threading.Condition()
        self.listed = self.takes_video = True
        self.positions: str | None = None  # its rule of positions, for collective_rpc
        owner_ = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def do_GET(self) -> None:
                entry = {"id": owner_.model, "owned_by": owner_.owner}
                owner_.reply(self, 200 if owner_.listed else 404, {"data": [entry]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/collective_rpc":  # of servers that video-r1 has started
                    told = {"results": [{"positions": owner_.positions}]}
                    return owner_.reply(self, 200 if owner_.positions else 404, told)
                owner_.headers.append({name.title(): value for name, value in self.headers.items()})
                owner_.chat(self, body)

        class Server(ThreadingHTTPServer):
            request_queue_size = 1024
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None: ...  # the client has gone

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def chat(self, handler: Any, body: dict[str, Any]) -> None:
        asked = QUESTION.search(json.dumps(body["messages"]))
        if "media_io_kwargs" in body and not self.takes_video:
            return self.reply(handler, 400, {"error": {"message": "media_io_kwargs are disabled"}})
        if asked is None:
            return self.reply(handler, 200, {"choices": []})
        number = int(asked[1])
        script = self.script[number]
        event = self.event_of(body, lambda: script.pop(0) if script else self.always)
        self.act(handler, event, number, body)

    def event_of(self, body: dict[str, Any], find: Callable[[], Any]) -> Any:
        """Take a request up and wait as long as it is to take. `find`: what happens then."""
        with self.changed:
            self.requests.append(body)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most_under_way >= self.gate, timeout=60)
            event = find()
        time.sleep(0.3 if event == "slow" else self.pause)
        with self.changed:  # before the client can know of it
            self.under_way -= 1
            self.answered += 1
            self.changed.notify_all()
        return event

    def act(self, handler: Any, event: Any, number: int, body: dict[str, Any]) -> None:
        if event == "drop":
            return
        if event == "busy":
            return self.reply(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
        if isinstance(event, int):
            return self.reply(handler, event, {"error": {"message": f"this is a {event}"}})
        if event == "garbage":
            return self.reply(handler, 200, "<html>busy</html>")
        seed, finish = body.get("seed", 0), {"length": "length", "abort": "abort"}.get(event, "stop")
        choices = []
        for index in range(1 if event == "one" else body.get("n", 1)):
            answer = "A" if event == "wrong" else self.right
            text = f"<think>{rationale(number, seed, index)}</think>\n<answer>{answer}</answer>"
            text = event if str(event).startswith("<") else "It is B." if event == "bare" else text
            message = {"role": "assistant", "content": text}
            choices.append({"index": index, "message": message, "finish_reason": finish})
        self.reply(handler, 200, {"choices": choices[::-1]})

    def reply(self, handler: Any, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        handler.send_response(status)
        for name, content in {"Content-Length": str(len(text)), **(headers or {})}.items():
            handler.send_header(name, content)
        handler.end_headers()
        handler.wfile.write(text)
        handler.close_connection = True

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def chat_endpoint(**settings: Any) -> Iterator[ChatEndpoint]:
    """Serve an endpoint inside the block."""
    endpoint = ChatEndpoint(**settings)
    try:
        yield endpoint
    finally:
        endpoint.close()


def images_of(request: dict[str, Any]) -> list[str]:
    """Return the media types of a request and the number of their pieces of data."""
    found = []
    for part in request["messages"][0]["content"]:
        for kind in ("image_url", "video_url"):
            if part["type"] == kind:
                head, _, data = part[kind]["url"].partition(",")
                assert all(base64.b64decode(piece, validate=True) for piece in data.split(","))
                found.append(f"{kind} {head} {len(data.split(','))}")
    return found


def write_questions(folder: Path, count: int, clips: int = 1, bad: tuple[int, ...] = ()) -> Path:
    """Write a manifest of multiple-choice questions: the first `clips` about a clip, the others an image.

    The media of the questions in `bad` cannot be read.
    """
    write_clip(folder / "clip.mp4", moving_square(8), fps=4.0)
    Image.fromarray(np.full((56, 56, 3), 90, np.uint8)).save(folder / "image.png")
    (folder / "broken.mp4").write_text("no clip")
    rows = []
    for number in range(count):
        is_clip = number < clips or number in bad
        name = "broken.mp4" if number in bad else "clip.mp4" if is_clip else "image.png"
        rows.append(
            {
                "problem_id": f"q{number}",
                "problem": f"Question {number}: which way does the square move?",
                "data_type": "video" if is_clip else "image",
                "problem_type": "multiple choice",
                "options": ["A. left", "B. right"],
                "solution": "<answer>B</answer>",
                "path": f"./{name}",
                "data_source": "tests/squares",
                "task_type": "motion",
            }
        )
    path = folder / "manifest.json"
    path.write_text(json.dumps(rows))
    return path


SMALL: dict[str, Any] = {
    "frame_pixels": 56 * 56,
    "image_pixels": 56 * 56,
    "max_frames": 4,
    "media_seconds": 0.0,
}


def annotate(url: str, manifest: Path, out: Path, **changes: Any) -> Counts:
    settings = {"teacher": url, "manifest": str(manifest), "out": str(out), "wait": 5.0, **SMALL, **changes}
    return run_annotate(AnnotateSettings(**settings))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def wait_for(endpoint: ChatEndpoint, answered: int) -> None:
    with endpoint.changed:
        assert endpoint.changed.wait_for(lambda: endpoint.answered >= answered, timeout=60)
