"""Servers that answer by modes: a wrong reply is asked again or ends in one line, and nothing is lost."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from chat_endpoint import ChatEndpoint, annotate, lines, write_questions
from judge_endpoint import JudgeEndpoint
from test_judge import group, open_judge
from test_server import SETTINGS, Server, engine, prompts
from tiny_questions import read_lines

from video_r1 import chat_client
from video_r1.chat_client import Failover, ServerFailure, ServerRefusal, get
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.evaluation.evaluate import run_eval
from video_r1.rollout import endpoint_engine
from video_r1.rollout.vllm import server
from video_r1.settings.decoding import EvalSettings

ENDLESS = b" " * (1 << 16)


class Raw(NamedTuple):
    """A reply as it is sent. ENDLESS is repeated until the client has had enough."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    pause: float | None = None  # what the client makes of Retry-After


# Wrong as a whole, whatever was asked.
RAW = {
    "empty": Raw(b""),
    "null": Raw(b"null"),
    "number": Raw(b"3"),
    "text": Raw(b'"text"'),
    "list": Raw(b"[]"),
    "object": Raw(b"{}"),
    "page": Raw(b"<html>busy</html>"),
    "half": Raw(b'{"choices": [{"mess'),
    "no UTF-8": Raw(b'{"choices": "\xff"}'),
    "deep list": Raw(b"[" * 200_000),
    "deep object": Raw(b'{"choices": ' * 50_000 + b"1" + b"}" * 50_000),
    "deep and whole": Raw(b'{"choices": [' + b"[" * 900 + b"]" * 900 + b"]}"),
    "long number": Raw(b'{"choices": ' + b"9" * 5000 + b"}"),
    "endless": Raw(ENDLESS),
    "bomb": Raw(gzip.compress(b" " * (64 << 20), mtime=0), headers={"Content-Encoding": "gzip"}),
    "half a gzip": Raw(
        gzip.compress(b'{"choices": []}', mtime=0)[:-12], headers={"Content-Encoding": "gzip"}
    ),
    "no gzip": Raw(b"{}", headers={"Content-Encoding": "deflate"}),
    "brotli": Raw(b"{}", headers={"Content-Encoding": "br"}),
    "too short": Raw(b"{}", headers={"Content-Length": "50"}),
    "pause": Raw(b"busy", 429, {"Retry-After": " 0 "}, 0.0),
    "pause of another script": Raw(b"busy", 429, {"Retry-After": "\u00b2"}),
    "pause for ever": Raw(b"busy", 503, {"Retry-After": "9" * 400}, 60.0),
    "pause below zero": Raw(b"busy", 429, {"Retry-After": "-1"}),
    "pause until a date": Raw(b"busy", 503, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
    "deep error": Raw(b'{"error": ' * 50_000, 500),
    "deep message": Raw(b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}", 500),
    "error bomb": Raw(gzip.compress(b"x" * (64 << 20), mtime=0), 500, {"Content-Encoding": "gzip"}),
    "endless error": Raw(ENDLESS, 500),
    "list of errors": Raw(b'[{"error": "no"}]', 500),
}


def send(handler: Any, raw: Raw) -> None:
    handler.send_response(raw.status)
    given = {} if raw.body is ENDLESS else {"Content-Length": str(len(raw.body))}
    for name, value in (given | raw.headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(raw.body)
    while raw.body is ENDLESS:  # BrokenPipeError ends it
        handler.wfile.write(raw.body)
    handler.close_connection = True


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "PAUSE", 0.0005)
    monkeypatch.setattr(chat_client, "LARGEST_REPLY", 1 << 20)


def one_line(error: BaseException, url: str) -> None:
    """Check what the user reads: the address, and not pages of what a stranger wrote."""
    message = str(error)
    assert url in message and "\n" not in message and len(message) < 2000, message


# ---- Chat endpoints


def changed(**fields: Any) -> Callable[[Any], Any]:
    """Return what replaces fields of the first choice of a reply."""
    return lambda reply: {**reply, "choices": [reply["choices"][0] | fields, *reply["choices"][1:]]}


DEEP: Any = json.loads("[" * 900 + "]" * 900)
CHAT: dict[str, Callable[[Any], Any]] = {
    "no choices": lambda reply: {},
    "choices null": lambda reply: {"choices": None},
    "choices a number": lambda reply: {"choices": 3},
    "none": lambda reply: {"choices": []},
    "choice null": lambda reply: {"choices": [None]},
    "choice a list": lambda reply: {"choices": [[]]},
    "indices that do not compare": lambda reply: {"choices": [{"index": 1}, {"index": "a"}]},
    "message null": changed(message=None),
    "message a text": changed(message="B"),
    "content a number": changed(message={"content": 3}),
    "content of numbers": changed(message={"content": [3]}),
    "content without text": changed(message={"content": [{"text": None}]}),
    "reason a list": changed(finish_reason=["stop"]),
    "reason deep": changed(finish_reason=DEEP),
    "reason too long": changed(finish_reason="x" * 10**5),
    "aborted": changed(finish_reason="abort"),
}
COUNTED: dict[str, Callable[[Any], Any]] = {
    f"tokens {count!r}": lambda reply, count=count: reply | {"usage": {"completion_tokens": count}}
    for count in ("many", -5, 1e300, float("nan"), float("inf"), 10**12, [1], DEEP)
} | {"usage a text": lambda reply: reply | {"usage": "x"}}


class Hostile(ChatEndpoint):
    """Answers the first `times` requests for each question in the mode `wrong`, and the others well."""

    wrong: Any = None
    times = 1

    def chat(self, handler: Any, body: dict[str, Any]) -> None:
        asked = json.dumps(body["messages"])
        self.seen = getattr(self, "seen", {})
        self.seen[asked] = self.seen.get(asked, 0) + 1
        self.hits = self.wrong is not None and self.seen[asked] <= self.times
        if isinstance(self.wrong, Raw) and self.hits:
            return send(handler, self.wrong)
        super().chat(handler, body)

    def reply(self, handler: Any, status: int, value: Any, *rest: Any, **more: Any) -> None:
        if handler.command == "POST" and self.hits:
            value = self.wrong(value)
        super().reply(handler, status, value, *rest, **more)


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    endpoint = Hostile()
    yield endpoint
    endpoint.close()


@pytest.mark.parametrize("mode", list(RAW))
def test_cases_one_reply(hostile: Hostile, mode: str) -> None:
    """A request ends in a failure, within bounds of size and time."""
    raw = RAW[mode]
    hostile.reply = lambda handler, *given: send(handler, raw)  # type: ignore[method-assign]
    began = time.monotonic()
    if raw.status == 200 and mode in ("empty", "null", "number", "text", "list", "object", "deep and whole"):
        get(f"{hostile.url}/models", None, 20.0)  # JSON, if nothing of use
        return
    with pytest.raises(ServerFailure) as raised:
        get(f"{hostile.url}/models", None, 20.0)
    assert len(str(raised.value)) < 500 and time.monotonic() - began < 10
    assert raised.value.retry_after == raw.pause


@pytest.mark.parametrize("mode", [*RAW, *CHAT])
def test_cases_annotation_loses_nothing(hostile: Hostile, tmp_path: Path, mode: str) -> None:
    """Each question's first reply is wrong; then one question's is wrong each time."""
    hostile.wrong = RAW.get(mode) or CHAT[mode]
    manifest = write_questions(tmp_path, count=2, clips=0)
    annotate(hostile.url, manifest, tmp_path / "out.jsonl", samples=1, wait=0.05)
    assert {row["problem_id"] for row in lines(tmp_path / "out.jsonl")} == {"q0", "q1"}
    hostile.times = 10**6
    with pytest.raises(VideoR1Error, match="no rationale was kept"):
        annotate(hostile.url, manifest, tmp_path / "again.jsonl", samples=1, wait=0.05)
    for row in lines(tmp_path / "again.rejected.jsonl"):
        assert "attempts" in str(row) and len(str(row)) < 3000


@pytest.mark.parametrize("mode", ["deep list", "bomb", "pause of another script", *CHAT, *COUNTED])
def test_cases_an_evaluation_continues(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    for module in (chat_client, endpoint_engine):
        monkeypatch.setattr(module, "ATTEMPTS", 2)
    hostile.wrong, hostile.times = RAW.get(mode) or CHAT.get(mode) or COUNTED[mode], 10**6
    settings = EvalSettings(
        manifest=str(write_questions(tmp_path, count=2, clips=0)), engine=hostile.url, model="teacher",
        out=str(tmp_path / "out"), timeout=20.0, image_pixels=56 * 56,
    )  # fmt: skip
    with pytest.raises(VideoR1Error) as raised:
        run_eval(settings)
    one_line(raised.value, hostile.url)
    hostile.wrong = None
    run_eval(settings)
    assert len(read_lines(tmp_path / "out" / "predictions-16.jsonl")) == 2


@pytest.mark.parametrize(
    "mode", ["deep list", "bomb", "pause for ever", "null", "choice null", "reason deep"]
)
def test_cases_a_judge_that_may_be_skipped_ends_no_run(tmp_path: Path, mode: str) -> None:
    endpoint, wrong = JudgeEndpoint(), RAW.get(mode) or CHAT[mode]
    judge = open_judge(endpoint, tmp_path, judge_down="skip")
    well = endpoint.reply
    try:
        endpoint.reply = lambda handler, status, value, *rest: (  # type: ignore[method-assign]
            send(handler, wrong) if isinstance(wrong, Raw) else well(handler, status, wrong(value), *rest)
        )
        assert judge([group("right", "left")])[0].isnan().all()
        endpoint.reply = well  # type: ignore[method-assign]
        assert not judge([group("right", "left")])[0].isnan().any()
    finally:
        endpoint.close()


@pytest.mark.parametrize("listed", [
    {}, [], {"data": None}, {"data": 3}, {"data": [None]}, {"data": [{}]}, {"data": [{"id": None}]},
    {"data": [{"id": DEEP}]}, {"data": [{"id": "x" * 10**5}]}, {"data": DEEP},
], ids=lambda listed: str(listed)[:40])  # fmt: skip
def test_cases_lists_of_models(hostile: Hostile, tmp_path: Path, listed: Any) -> None:
    hostile.reply = lambda handler, *given: send(  # type: ignore[method-assign]
        handler, Raw(json.dumps(listed).encode())
    )
    with pytest.raises(ConfigError) as raised:
        annotate(hostile.url, write_questions(tmp_path, count=1), tmp_path / "out.jsonl", wait=0.05)
    one_line(raised.value, hostile.url)
    with pytest.raises(ConfigError) as raised:
        engine(hostile.url, tmp_path, wait=0.05)
    one_line(raised.value, hostile.url.removesuffix("/v1"))


def test_cases_a_pause_has_an_end() -> None:
    pool = Failover(["a"])
    with pytest.raises(ServerFailure), pool.asking():
        raise ServerFailure("busy", 60.0)
    assert pool._all["a"].skipped_until - time.monotonic() <= 60


# ---- vLLM servers


def first_token(**fields: Any) -> Callable[[Any], Any]:
    """Return what replaces fields of the first token's entry of log-probs of the first choice."""

    def change(reply: Any) -> Any:
        first, *others = reply["choices"]
        content = first["logprobs"]["content"]
        return {"choices": [first | {"logprobs": {"content": [fields, *content[1:]]}}, *others]}

    return change


NINE = {"token_ids": [7] * 9, "logprobs": {"content": [{"logprob": -1.0}] * 9}, "finish_reason": "length"}
LONG = Raw(
    b"data: "
    + json.dumps({"choices": [{**NINE, "index": i, "weight_versions": None} for i in range(3)]}).encode()
    + b"\n\n"
)  # of 8 tokens at most
GENERATED: dict[str, Any] = {
    "no tokens": changed(token_ids=[], logprobs={"content": []}),
    "tokens null": changed(token_ids=None),
    "tokens a text": changed(token_ids="ab"),
    "another token": changed(token_ids=[10**9, 5]),
    "a token below zero": changed(token_ids=[-1, 5]),
    "a token of a million digits": changed(token_ids=[10**4000, 5]),
    "true as a token": changed(token_ids=[True, 5]),
    "more tokens than log-probs": changed(logprobs={"content": [{"logprob": -1.0}]}),
    "more than was asked for":LONG,
    "log-probs null": changed(logprobs=None),
    "log-probs a text": changed(logprobs={"content": "ab"}),
    "no log-prob": first_token(),
    "log-prob null": first_token(logprob=None),
    "log-prob a text": first_token(logprob="-1"),
    "log-prob NaN": first_token(logprob=float("nan")),
    "log-prob of 1e30": first_token(logprob=1e30),
    "log-prob of -1e30": first_token(logprob=-1e30),
    "reason null": lambda reply: {"choices": reply["choices"][1:]},
    "index null": changed(index=None),
    "index 7": changed(index=7),
    "versions a number": changed(weight_versions=3),
    "versions of lists": changed(weight_versions=[{"version": []}]),
}  # fmt: skip
SCORED: dict[str, Any] = {
    "missing": None,
    "null": lambda found: None,
    "empty": lambda found: [],
    "short": lambda found: found[:-1],
    "list": lambda found: [list(entry or ()) for entry in found],
    "null entry": lambda found: [*found[:-1], None],
    "another token": lambda found: [*found[:-1], {"1": {"logprob": -1.0, "rank": 1}}],
    **{
        f"{name} {value!r}": lambda found, name=name, value=value: [
            entry and {token: own | {name: value} for token, own in entry.items()} for entry in found
        ]
        for name, values in {
            "logprob": (None, "x", float("nan"), float("inf"), 1e30, -1e30, True, [DEEP]),
            "rank": (None, 0, -1, 1.5, "1", True),
        }.items()
        for value in values
    },
}


class HostileVLLM(Server):
    """Answers in the mode `wrong` what has a path in `hit`, `times` times."""

    wrong: Any = None
    hit = "/inference/v1/generate"
    times = 10**6

    def answer(self, handler: Any, path: str, body: Any) -> None:
        if isinstance(self.wrong, Raw) and path == self.hit and self.times > 0:
            self.times -= 1
            return send(handler, self.wrong)
        super().answer(handler, path, body)

    def decide(self, path: str, body: Any) -> tuple[int, Any, int | None]:
        status, value, size = super().decide(path, body)
        if path == self.hit and self.times > 0 and callable(self.wrong):
            self.times -= 1
            value = self.wrong(value)
        return status, value, size


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileVLLM]:
    monkeypatch.setattr(
        server, "server_request",
        lambda prompt, parameters, dtype: {
            "token_ids": prompt.input_ids.tolist(), "sampling_params": parameters,
        },
    )  # fmt: skip
    fake = HostileVLLM()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


@pytest.mark.parametrize("mode", [*RAW, *GENERATED])
def test_cases_rollouts(served: HostileVLLM, tmp_path: Path, mode: str) -> None:
    client = engine(served.url, tmp_path, wait=5.0)
    expected = client.sample(prompts(2), SETTINGS)
    served.wrong, served.times = RAW.get(mode) or GENERATED[mode], 1
    found = client.sample(prompts(2), SETTINGS)
    assert served.times == 0
    for group_, other in zip(expected, found, strict=True):
        assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(group_, other, strict=True))
    served.times = 10**6
    with pytest.raises(VideoR1Error) as raised:
        client.sample(prompts(2), SETTINGS)
    one_line(raised.value, served.url)


@pytest.mark.parametrize("mode", [*RAW, *SCORED])
def test_cases_scores(
    served: HostileVLLM, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(1)[0]
    ids = prompt.input_ids
    well = [None, *({str(token): {"logprob": -1.0, "rank": 2}} for token in ids[1:].tolist())]
    decide = served.decide
    scores: Any = {"change": lambda found: found}

    def scored(path: str, body: Any) -> tuple[int, Any, int | None]:
        if path != served.hit:
            return decide(path, body)
        change = scores["change"]
        return 200, {"prompt_logprobs": change(list(well))} if change else {}, None

    monkeypatch.setattr(served, "decide", scored)
    client = engine(served.url, tmp_path, wait=5.0)
    asked = [(prompt, torch.tensor([len(ids) - 2, len(ids) - 1]))]
    assert client.score(asked) == [[(-1.0, 2), (-1.0, 2)]]
    served.wrong, scores["change"] = RAW.get(mode), SCORED.get(mode)
    with pytest.raises(VideoR1Error) as raised:
        client.score(asked)
    one_line(raised.value, served.url)


@pytest.mark.parametrize(("path", "mode"), [
    ("/v1/models", {"data": []}), ("/v1/models", {"data": [{"id": "a"}]}), ("/v1/models", {"data": [3]}),
    ("/v1/models", {"data": [{"id": "\0", "max_model_len": 9}]}),
    *(("/v1/models", {"data": [{"id": "models/tiny", "max_model_len": n}]}) for n in ("x", None, 0, 1.5)),
    *(("/collective_rpc", {"results": found}) for found in (None, [], [{}], [3], {}, "x")),
    ("/collective_rpc", {"vocab_size": "x"}), ("/collective_rpc", {"dtype": "odd"}),
    ("/collective_rpc", {"dtype": DEEP}), ("/collective_rpc", {"architecture": None}),
    *(("/v1/models", RAW[name]) for name in ("deep list", "bomb", "endless", "pause for ever")),
    *(("/collective_rpc", RAW[name]) for name in ("deep list", "bomb", "endless", "no gzip")),
    *(("/tokenize", found) for found in ({}, {"tokens": 3}, {"tokens": ["a"]}, RAW["bomb"])),
], ids=lambda each: str(each)[:40])  # fmt: skip
def test_cases_what_a_server_says_of_itself(
    served: HostileVLLM, tmp_path: Path, path: str, mode: Any
) -> None:
    served.hit = path
    is_part = path == "/collective_rpc" and isinstance(mode, dict) and "results" not in mode
    served.wrong = (
        mode
        if isinstance(mode, Raw)
        else lambda said: {"results": [served.served | mode]} if is_part else mode
    )
    with pytest.raises(VideoR1Error) as raised:
        engine(served.url, tmp_path, wait=0.1).tokenize("a")
    one_line(raised.value, served.url)


def test_cases_a_status_is_a_refusal_whatever_its_text(hostile: Hostile) -> None:
    for mode in ("deep error", "error bomb", "endless error", "deep message"):
        raw = RAW[mode]._replace(status=401)
        hostile.reply = lambda handler, *given, raw=raw: send(handler, raw)  # type: ignore[method-assign]
        with pytest.raises(ServerRefusal) as raised:
            get(f"{hostile.url}/models", None, 20.0)
        assert raised.value.status == 401 and len(str(raised.value)) < 500
