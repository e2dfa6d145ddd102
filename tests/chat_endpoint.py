"""An OpenAI-compatible endpoint on loopback that fails in every way that one can, and annotations by it."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_models import moving_square, write_clip

from video_r1.annotation.annotate import Counts, run_annotate
from video_r1.settings.decoding import AnnotateSettings

QUESTION = re.compile(r"Question (\d+):")


def rationale(number: int, seed: int, index: int) -> str:
    """Thirty words that name the question, the seed and the completion."""
    story = " ".join(f"then{word} happens" for word in range(12))
    return f"In question {number} with seed {seed} and draw {index} first it begins, {story} and it ends."


class ChatEndpoint:
    """Answers "B" with a rationale to every question, unless the next event in `script[number]` is another.

    Events: an HTTP status; "busy", "later": 429 with Retry-After of no or one second; "garbage", "empty": no
    chat completion; "half": the answer is cut off; "drop": no answer; "slow", "trickle": an answer that comes
    late, or byte by byte; "one": one completion instead of all; "abort": a completion that broke off;
    "wrong": the wrong answer; "length": the token limit; "bare": no tags. Of a request to stream: "whole": it
    is not; "apart": the reasoning stands in a field of its own; "dies", "fails", "stalls": after three pieces
    the connection ends, an error is told, or nothing comes any more. `gate`: requests that have to be under
    way before any is answered.
    """

    def __init__(self, model: str = "teacher", owner: str = "tests") -> None:
        self.model, self.owner = model, owner
        self.script: defaultdict[int, list[Any]] = defaultdict(list)
        self.always: Any = None  # an event for every request without a script
        self.pause, self.gate, self.right = 0.0, 0, "B"
        self.beat = 0.0  # seconds between two pieces of a streamed answer
        self.closing = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = self.answered = 0
        self.changed = threading.Condition()
        self.listed = self.takes_video = True
        self.positions: str | None = None  # what it says of its rule of positions
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
        asked = QUESTION.search(json.dumps(body["messages"][0]["content"]))
        if "media_io_kwargs" in body and not self.takes_video:
            return self.reply(handler, 400, {"error": {"message": "media_io_kwargs are disabled"}})
        if asked is None:
            return self.reply(handler, 200, {"choices": []})
        number = int(asked[1])
        with self.changed:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most_under_way >= self.gate, timeout=60)
            event = self.script[number].pop(0) if self.script[number] else self.always
        time.sleep(0.3 if event == "slow" else self.pause)
        with self.changed:  # before the client can know of it
            self.under_way -= 1
            self.answered += 1
            self.changed.notify_all()
        self.act(handler, event, number, body)

    def act(self, handler: Any, event: Any, number: int, body: dict[str, Any]) -> None:
        if event == "drop":
            return
        if event in ("busy", "later"):
            seconds = {"Retry-After": "0" if event == "busy" else "1"}
            return self.reply(handler, 429, {"error": {"message": "slow down"}}, seconds)
        if isinstance(event, int):
            return self.reply(handler, event, {"error": {"message": f"this is a {event}"}})
        if event == "garbage":
            return self.reply(handler, 200, "<html>busy</html>")
        if event == "unstreamable" and body.get("stream"):
            return self.reply(handler, 400, {"error": {"message": "stream is not supported"}})
        if event == "empty":
            return self.reply(handler, 200, {"choices": []})
        seed, finish = body.get("seed", 0), {"length": "length", "abort": "abort"}.get(event, "stop")
        choices = []
        for index in range(1 if event == "one" else body.get("n", 1)):
            answer = "A" if event == "wrong" else self.right
            text = f"<think>{rationale(number, seed, index)}</think>\n<answer>{answer}</answer>"
            message = {"role": "assistant", "content": "It is B." if event == "bare" else text}
            choices.append({"index": index, "message": message, "finish_reason": finish})
        if body.get("stream") and event not in ("whole", "half", "trickle"):
            return self.stream(handler, event, choices)
        self.reply(handler, 200, {"choices": choices[::-1]}, cut=event == "half", trickle=event == "trickle")

    def stream(self, handler: Any, event: Any, choices: list[dict[str, Any]]) -> None:
        """The choices word by word, in turns."""
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.end_headers()
        handler.close_connection = True

        def say(value: Any) -> None:
            handler.wfile.write(
                f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
            )
            handler.wfile.flush()

        say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for count, deltas in enumerate(zip_longest(*(pieces_of(one, event == "apart") for one in choices))):
            time.sleep(self.beat)
            if event in ("dies", "fails", "stalls") and count == 3:
                if event == "fails":
                    say({"error": {"message": "the engine is out of memory"}})
                if event == "stalls":
                    self.closing.wait(60)
                return
            for index, delta in enumerate(deltas):
                if delta:
                    say({"choices": [{"index": index, "delta": delta, "finish_reason": None}]})
        for one in choices:
            say({"choices": [{"index": one["index"], "delta": {}, "finish_reason": one["finish_reason"]}]})
        say({"choices": [], "usage": {"completion_tokens": 20 * len(choices)}})
        say("[DONE]")

    def reply(
        self,
        handler: Any,
        status: int,
        value: Any,
        headers: dict[str, str] | None = None,
        cut: bool = False,
        trickle: bool = False,
    ) -> None:
        text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        handler.send_response(status)
        for name, content in {"Content-Length": str(len(text)), **(headers or {})}.items():
            handler.send_header(name, content)
        handler.end_headers()
        if trickle:
            for byte in text:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.02)
        else:
            handler.wfile.write(text[: len(text) // 2] if cut else text)
        handler.close_connection = True

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


def pieces_of(choice: dict[str, Any], apart: bool) -> list[dict[str, str]]:
    """The deltas of a choice, a word each; apart: its reasoning in a field of its own."""
    text = choice["message"]["content"]
    if not apart:
        return [{"content": word} for word in re.findall(r"\S+\s*", text)]
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    words = [{"reasoning_content": word} for word in re.findall(r"\S+\s*", reasoning)]
    return words + [{"content": word} for word in re.findall(r"\S+\s*", answer)]


@contextmanager
def chat_endpoint(**settings: Any) -> Iterator[ChatEndpoint]:
    """An endpoint for the length of the block."""
    endpoint = ChatEndpoint(**settings)
    try:
        yield endpoint
    finally:
        endpoint.close()


def images_of(request: dict[str, Any]) -> list[str]:
    """The media types and data of a request, decoded: `type:bytes`."""
    found = []
    for part in request["messages"][0]["content"]:
        for kind in ("image_url", "video_url"):
            if part["type"] == kind:
                head, _, data = part[kind]["url"].partition(",")
                assert all(base64.b64decode(piece, validate=True) for piece in data.split(","))
                found.append(f"{kind} {head} {len(data.split(','))}")
    return found


def write_questions(folder: Path, count: int, clips: int = 1, bad: tuple[int, ...] = ()) -> Path:
    """A manifest of multiple-choice questions: the first `clips` about a clip, the others about a picture.

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
