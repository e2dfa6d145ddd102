"""The chat client on loopback: single requests, failover between addresses, and the engine of an endpoint."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from chat_endpoint import annotate, chat_endpoint, images_of, wait_for, write_questions
from tiny_questions import read_lines

from video_r1 import chat_client
from video_r1.chat_client import SKIP, Failover, ServerFailure, ServerRefusal, get, post
from video_r1.data.prompts import TextPrompts
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.evaluation.evaluate import run_eval
from video_r1.rollout import endpoint_engine
from video_r1.rollout.engine_factory import is_endpoint, open_engine
from video_r1.settings.decoding import AnnotateSettings, EvalSettings, addresses

SIZES: dict[str, Any] = {"frame_pixels": 56 * 56, "image_pixels": 56 * 56, "model": "teacher"}


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

    answer = chat_client.wait_for(chat_client.request(f"{url}/", None, 10.0, parts(), 3))
    assert (answer["body"], answer["chunked"], sent) == ("123", None, [True])


@pytest.mark.parametrize(("path", "error", "message"), [
    ("404/no", ServerRefusal, "HTTP 404 at /404/no: no"),
    ('422/{"error":{"message":"odd"}}', ServerRefusal, ": odd"),
    ("307/", ServerRefusal, "HTTP 307 at /307/: 7"),
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


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(chat_client, "time", SimpleNamespace(monotonic=clock))
    return clock


def fail(pool: Failover, retry_after: float | None = None) -> str:
    """Return the address of a request that fails."""
    with pytest.raises(ServerFailure), pool.asking() as address:
        raise ServerFailure("away", retry_after)
    return address.url


def answer(pool: Failover) -> str:
    with pool.asking() as address:
        return address.url


# ---- Which address is asked


def test_the_least_busy_address_is_asked() -> None:
    pool = Failover(["a", "b", "c"])
    with ExitStack() as under_way:
        first = [under_way.enter_context(pool.asking()).url for _ in range(7)]
        assert sorted(first[:3]) == sorted(first[3:6]) == ["a", "b", "c"]
        assert answer(pool) != first[6]


def test_a_failed_address_is_skipped_and_tried_by_one_request(clock: Clock) -> None:
    pool = Failover(["a", "b"])
    for _ in range(2):
        assert fail(pool) == "a" and pool.any_ready()
        clock.now += SKIP - 0.1
        assert {answer(pool) for _ in range(3)} == {"b"}
        clock.now += 0.1
    with pool.asking() as tries, pool.asking() as other:
        assert (tries.url, other.url) == ("a", "b")
        assert answer(pool) == "b"  # busier than a, but a has not answered yet
    assert not tries.failed and answer(pool) == "a"


def test_when_all_are_skipped_the_first_to_return_is_asked(clock: Clock) -> None:
    pool = Failover(["a", "b"])
    assert fail(pool, retry_after=60.0) == "a"
    assert fail(pool, retry_after=20.0) == "b" and not pool.any_ready()
    assert answer(pool) == "b" and pool.any_ready()
    assert fail(pool) == "b"
    clock.now += SKIP
    assert answer(pool) == "b"
    pool.is_back("a")
    assert answer(pool) == "a"


@pytest.mark.parametrize(("kind", "values", "message"), [
    (EvalSettings, {"engine": "http://a:1,http://b:2/v1"}, "either all addresses or none"),
    (EvalSettings, {"engine": "http://a:1,vllm"}, "transformers, vllm, module:function, or addresses"),
    (EvalSettings, {"engine": "localhost:8000/v1"}, "transformers, vllm, module:function, or addresses"),
    (EvalSettings, {"engine": "http://a,own.py:Engine"}, "transformers, vllm, module:function, or addresses"),
    (AnnotateSettings, {"teacher": "http://a:1,checkpoint"}, "several endpoints"),
])  # fmt: skip
def test_addresses_in_settings(kind: Any, values: dict[str, str], message: str) -> None:
    assert addresses("http://a:1/, http://b:2/v1 ,http://a:1") == ("http://a:1", "http://b:2/v1")
    with pytest.raises(ConfigError, match=message):
        kind(**values)


# ---- Several chat endpoints


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "PAUSE", 0.01)


def seeds(requests: list[dict[str, Any]]) -> dict[str, set[int]]:
    """Of each question the seeds that it was asked with."""
    found: dict[str, set[int]] = {}
    for request in requests:
        text = request["messages"][0]["content"][-1]["text"]
        found.setdefault(text, set()).add(request["seed"])
    return found


def test_an_annotation_outlives_one_of_its_endpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_questions(tmp_path, 40)
    with chat_endpoint() as alone:
        annotate(alone.url, manifest, tmp_path / "alone.json", concurrency=4)
        expected = seeds(alone.requests)
    with chat_endpoint() as first, chat_endpoint() as second:
        first.pause = second.pause = 0.05

        def kill() -> None:
            wait_for(first, 6)
            with first.changed:
                first.always, asked = "drop", len(first.requests)
                assert first.changed.wait_for(lambda: len(first.requests) > asked, timeout=60)
            first.close()  # the request that came last has no answer

        killing = threading.Thread(target=kill)
        killing.start()
        both = f"{first.url}, {second.url}"
        counts = annotate(both, manifest, tmp_path / "both.json", concurrency=8, wait=60.0)
        killing.join()
        assert counts.questions == {"kept": 40}
        asked_first, asked_second = len(first.requests), len(second.requests)
        assert 6 <= asked_first < 20 and asked_second >= 40 - asked_first
        assert seeds(first.requests).keys() & seeds(second.requests).keys()
        assert seeds(first.requests + second.requests) == expected
    assert (tmp_path / "both.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert f"{first.url}: " in caplog.text and "skipped until it answers" in caplog.text


def test_servers_of_different_models_are_refused(tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 1)
    with chat_endpoint() as first, chat_endpoint(model="student") as second:
        both = f"{first.url},{second.url}"
        with pytest.raises(ConfigError, match=f"{second.url} serves student"):
            annotate(both, manifest, tmp_path / "cot.json")
        with pytest.raises(ConfigError, match=f"{second.url} serves student, not teacher"):
            annotate(both, manifest, tmp_path / "cot.json", model="teacher")
        assert first.requests == second.requests == []


# ---- The engine


def evaluated(folder: Path, url: str, **changes: Any) -> list[dict[str, Any]]:
    """The predictions of four questions, two of them about a clip, in both frame orders."""
    manifest = write_questions(folder, count=4, clips=2)
    order: Any = ["ordered", "shuffled"]
    out = folder / "out"
    settings = EvalSettings(
        manifest=str(manifest), engine=url, out=str(out), order=order, batch_size=4, **SIZES, **changes
    )
    run_eval(settings)
    return read_lines(out / "predictions-16.jsonl")


@pytest.mark.parametrize("owner", ["tests", "vllm"])
def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    monkeypatch.setenv("MY_KEY", "abc")
    with chat_endpoint(owner=owner) as server:
        records = evaluated(tmp_path, server.url, key_variable="MY_KEY")
        requests, headers = server.requests, server.headers
    assert len(records) == 6 and all(record["score"] == 1.0 for record in records)
    assert all(header["Authorization"] == "Bearer abc" for header in headers)
    assert all(request["max_tokens"] == 1024 and request["model"] == "teacher" for request in requests)
    by_question: dict[str, list[str]] = {}
    for request in requests:
        *_, text = request["messages"][0]["content"]
        shown = [part for part in request["messages"][0]["content"][:-1] if part["type"] != "text"]
        by_question.setdefault(text["text"], []).append(str(shown))
    assert sorted(map(len, by_question.values())) == [1, 1, 2, 2]
    for shown in by_question.values():  # the two frame orders are two requests with other frames
        assert len(set(shown)) == len(shown)
    kinds = {images_of(request)[0].split()[0] for request in requests}
    assert kinds == ({"video_url", "image_url"} if owner == "vllm" else {"image_url"})


@pytest.mark.parametrize(("event", "message"), [(400, "refused.*this is a 400"), (500, "failed 3 times")])
def test_failures_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: int, message: str
) -> None:
    for module in (chat_client, endpoint_engine):
        monkeypatch.setattr(module, "ATTEMPTS", 3)
    with chat_endpoint() as server:
        server.always = event
        with pytest.raises(VideoR1Error, match=message):
            evaluated(tmp_path, server.url)
        server.always = None
        assert len(evaluated(tmp_path, server.url)) == 6  # started again, it continues


def test_it_cannot_be_trained_with() -> None:
    with chat_endpoint() as server:
        engine = open_engine(EvalSettings(engine=server.url, **SIZES), TextPrompts())
        with pytest.raises(VideoR1Error, match="cannot sample for training"):
            engine.update_weights(torch.nn.Linear(1, 1))
        with pytest.raises(ConfigError, match="serves teacher, not other"):
            open_engine(EvalSettings(engine=server.url, **{**SIZES, "model": "other"}), TextPrompts())


@pytest.mark.parametrize(("engine", "expected"), [
    ("http://host:8000/", False), ("https://host/api/v1/", True), ("vllm", False),
])  # fmt: skip
def test_an_address_with_a_path_is_an_endpoint(engine: str, expected: bool) -> None:
    assert is_endpoint(engine) == expected
