"""JSON over HTTP: what is an answer, what passes and what does not, and how it is said."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

from video_r1.chat_client import ServerFailure, ServerRefusal, get, post, request, wait_for


class Handler(BaseHTTPRequestHandler):
    """The path says what is answered: /STATUS/TEXT; a post is given back."""

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        _, status, text = self.path.split("/", 2)
        self.reply(int(status), unquote(text).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = {"body": body.decode(), "key": self.headers["Authorization"]}
        said["chunked"] = self.headers["Transfer-Encoding"]
        self.reply(200, json.dumps(said).encode())

    def reply(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status in (307, 429):
            self.send_header("Location" if status == 307 else "Retry-After", "7")
        self.end_headers()
        for byte in text if text == b"trickle" else [text]:
            self.wfile.write(bytes([byte]) if isinstance(byte, int) else byte)
            time.sleep(0.1 if text == b"trickle" else 0.0)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_answers(url: str) -> None:
    assert get(f"{url}/200/[1]", None, 10.0) == [1]
    assert get(f"{url}/200/", None, 10.0) is None
    assert post(f"{url}/", "k", {"a": "ü"}, 10.0) == {
        "body": '{"a": "\\u00fc"}', "key": "Bearer k", "chunked": None
    }  # fmt: skip
    assert post(f"{url}/", None, None, 10.0) == {"body": "", "key": None, "chunked": None}


def test_a_body_is_let_go_when_it_is_sent(url: str) -> None:
    sent = []

    async def parts() -> AsyncIterator[bytes]:
        yield b"12"
        yield b"3"
        sent.append(True)

    answer = wait_for(request("POST", f"{url}/", None, 10.0, parts(), 3))
    assert (answer["body"], answer["chunked"], sent) == ("123", None, [True])


@pytest.mark.parametrize(("path", "error", "message"), [
    ("404/no", ServerRefusal, "HTTP 404 at /404/no: no"),
    ('422/{"error":{"message":"odd"}}', ServerRefusal, ": odd"),
    ("307/", ServerRefusal, "HTTP 307 at /307/: it has moved to 7"),
    ("429/many", ServerFailure, "HTTP 429 at /429/many: many"),
    ("503/dead", ServerFailure, "HTTP 503 at /503/dead: dead"),
    ("200/<html>", ServerFailure, "JSONDecodeError: "),
    ("200/trickle", ServerFailure, "no answer within 0.3 s at /200/trickle"),
])  # fmt: skip
def test_what_is_no_answer(url: str, path: str, error: type[Exception], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(error) as raised:
        get(f"{url}/{path}", None, 0.3 if "trickle" in path else 10.0)
    assert message in str(raised.value)
    assert getattr(raised.value, "retry_after", None) == (7.0 if "429" in path else None)
    assert getattr(raised.value, "status", None) == (int(path[:3]) if error is ServerRefusal else None)
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(("url", "message"), [
    ("http://127.0.0.1:9", "Connect call failed ('127.0.0.1', 9)"), ("http://host:port", "Invalid port"),
])  # fmt: skip
def test_no_connection(url: str, message: str) -> None:
    with pytest.raises(ServerFailure) as raised:
        get(url, None, 10.0)
    assert message in str(raised.value)


def test_a_forked_process_has_a_loop_of_its_own(url: str) -> None:
    get(f"{url}/200/1", None, 10.0)
    process = multiprocessing.get_context("fork").Process(target=get, args=(f"{url}/200/1", None, 10.0))
    process.start()
    process.join(20)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == 0
