"""The client of a vLLM server against a server on loopback that fails in every way that a server can."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import moving_square, tiny_model, tiny_processor
from transformers import GenerationConfig
from vllm_prompts import ids

from video_r1 import chat_client
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.rollouts import Rollout
from video_r1.errors import ConfigError, RequestError, VideoR1Error
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.vllm import server
from video_r1.rollout.vllm.serve import WANTED, shape
from video_r1.rollout.vllm.server import ServerEngine

PROCESSOR = tiny_processor("qwen2_5_vl")
GENERATION = GenerationConfig(eos_token_id=[3, 5])
MODEL = "models/tiny"
TINY: Any = tiny_model("qwen2_5_vl", PROCESSOR.tokenizer)


class Server:
    """Speaks vLLM's interface. `script`: what happens to the next requests for completions."""

    def __init__(self) -> None:
        self.script: list[str] = []
        self.version, self.loaded, self.model = "default", "", MODEL
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.down = 0  # health checks that fail
        self.served: dict[str, Any] = {
            **shape("Qwen2_5_VLForConditionalGeneration", TINY.config),
            **WANTED,
            "dtype": "float32",
            "weight_transfer": None,
        }
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def do_GET(self) -> None:
                owner.answer(self, self.path, None)

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                owner.answer(self, self.path, json.loads(self.rfile.read(size) or b"null"))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: Any, path: str, body: Any) -> None:
        with self.lock:
            status, value, size = self.decide(path, body)
        is_stream = isinstance(value, dict) and "choices" in value
        text = (events(value["choices"]) if is_stream else json.dumps(value)).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text[:size])
        handler.close_connection = True

    def decide(self, path: str, body: Any) -> tuple[int, Any, int | None]:
        """Status, answer, and how much of it is sent (None: all)."""
        self.calls.append(path.split("?")[0])
        if path == "/health":
            self.down -= 1
            return (503 if self.down >= 0 else 200), {}, None
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "root": self.model, "max_model_len": 256}]}, None
        if path == "/weight_info":
            return 200, {"weight_version": self.version}, None
        if path == "/collective_rpc" and body["method"] == "served_model":
            return 200, {"results": [self.served]}, None
        if path == "/collective_rpc":
            self.loaded = body["kwargs"]["weights_path"]
            return 200, None, None
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path != "/inference/v1/generate":
            return 200, {"success": True}, None
        self.requests.append(body)
        event = self.script.pop(0) if self.script else "fine"
        count, version = body["sampling_params"]["n"], self.version
        if event == "restart":  # killed, away for two health checks, back with its first weights
            self.version, self.loaded, self.down = "default", "", 2
            return 200, {}, 0
        if event == "quick restart":
            self.version = version = "default"
        if event == "refuse":
            return 400, {"error": {"message": "top_k is odd"}}, None
        if event == "error":
            return 500, {"error": {"message": "engine died"}}, None
        choices = [
            {
                "index": index,
                "finish_reason": "abort" if event == "abort" else "stop",
                "token_ids": [body["sampling_params"]["seed"] % 97 + index, 5],
                "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.5}]},
                "weight_versions": [{"version": version, "start": 0, "end": 2}],
            }
            for index in reversed(range(count))
        ]
        if event == "fewer":
            choices.pop()
        if event == "breaks off":
            choices[-1] = {}
        return 200, {"choices": choices}, 300 * count if event == "half" else None


def events(choices: list[dict[str, Any]]) -> str:
    """A stream as vLLM's: the first token of each completion, then, with the reason, the rest of each."""
    starts = [{"choices": [part(choice, 0, 1)]} for choice in choices if choice]
    ends: list[Any] = [{"choices": [part(choice, 1, 2)]} for choice in choices if choice]
    if not all(choices):
        ends.append({"error": {"message": "engine died"}})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in starts + ends) + "data: [DONE]\n\n"


def part(choice: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    tokens, content = choice["token_ids"][start:end], choice["logprobs"]["content"][start:end]
    last = {} if start else {"finish_reason": None, "weight_versions": None}
    return {**choice, "token_ids": tokens, "logprobs": {"content": content}, **last}


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Prompts go by their text alone: the encoding of pixels is vLLM's own."""
    monkeypatch.setattr(
        server,
        "server_request",
        lambda prompt, parameters, dtype: {
            "token_ids": prompt.input_ids.tolist(),
            "sampling_params": parameters,
        },
    )
    fake = Server()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


def prompts(count: int) -> list[Prompt]:
    builder = PromptBuilder(PROCESSOR)
    frames = torch.from_numpy(moving_square(4, 56, 56)).permute(0, 3, 1, 2)
    media = Media(frames, torch.arange(4).double(), 4.0, "video")
    samples = [Sample(i, f"Where {i}?", "video", "free-form", "", "x") for i in range(count)]
    return [builder.build(sample, media) for sample in samples]


def engine(url: str | list[str], tmp_path: Path, **changes: Any) -> ServerEngine:
    settings = {"model": MODEL, "folder": tmp_path / "weights", "wait": 60.0, "concurrency": 3, **changes}
    return ServerEngine(url, PROCESSOR, GENERATION, **settings)


def _umask() -> int:
    found = os.umask(0o22)
    os.umask(found)
    return found


SETTINGS = SamplingSettings(n=3, max_tokens=8, seed=1)


def test_a_server_of_other_weights_than_the_checkpoints_files(loopback: Server, tmp_path: Path) -> None:
    """Sent by a training, or read before the files were changed: no answers under the checkpoint's name."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("x")
    loopback.model, changed = str(folder), (folder / "config.json").stat().st_mtime_ns
    loopback.served["started"] = changed + 10**9
    client = engine(loopback.url, tmp_path, model=folder)
    client.require_weights_of(str(folder))
    os.utime(folder / "model.safetensors", ns=(0, changed + 2 * 10**9))
    with pytest.raises(ConfigError, match=r"weights of .*model: they have changed since it was started; st"):
        client.require_weights_of(str(folder))
    loopback.served["started"], loopback.version = changed + 3 * 10**9, "of a training"
    with pytest.raises(ConfigError, match="a training has sent it others"):
        client.require_weights_of(str(folder))


def test_completions_in_order(loopback: Server, tmp_path: Path) -> None:
    client = engine(loopback.url, tmp_path)
    groups = client.sample(prompts(5), SETTINGS, counts=[3, 1, 0, 2, 3])
    assert [len(group) for group in groups] == [3, 1, 0, 2, 3]
    for group in groups:
        first = group[0].token_ids[0] if group else 0
        assert [int(rollout.token_ids[0] - first) for rollout in group] == list(range(len(group)))
    assert groups[0][0].logprobs.tolist() == [-0.5, -1.5]
    sent = loopback.requests[0]["sampling_params"]
    assert sent["stop_token_ids"] == sorted({3, 5, PROCESSOR.tokenizer.convert_tokens_to_ids("<|im_end|>")})
    (greedy,) = client.sample(prompts(1), SamplingSettings(n=2, temperature=0, max_tokens=8))
    assert len(greedy) == 2 and loopback.requests[-1]["sampling_params"]["n"] == 1


@pytest.mark.parametrize("event", ["restart", "quick restart", "half", "abort", "fewer", "breaks off"])
def test_what_fails_is_asked_again_and_counted_once(loopback: Server, tmp_path: Path, event: str) -> None:
    client = engine(loopback.url, tmp_path)
    model = copy.deepcopy(TINY)
    client.update_weights(model)
    expected = client.sample(prompts(6), SETTINGS)
    version, weights = loopback.version, loopback.loaded
    loopback.requests.clear()
    loopback.script = ["fine", event, event, "fine", event]
    found: list[tuple[int, int, Rollout]] = []
    client.follow((prompts(6), SETTINGS, [3] * 6), lambda *ended: found.append(ended))
    assert sorted(ended[:2] for ended in found) == [
        (index, number) for index in range(6) for number in range(3)
    ]
    assert all(torch.equal(new.token_ids, expected[index][number].token_ids) for index, number, new in found)
    assert len(loopback.requests) > 6
    assert len({json.dumps(request) for request in loopback.requests}) == 6  # the same seeds again
    assert (loopback.version, loopback.loaded) == (version, weights)


def test_weights_are_sent_and_caches_emptied(loopback: Server, tmp_path: Path) -> None:
    client = engine(loopback.url, tmp_path)
    model = copy.deepcopy(TINY)
    client.update_weights(model)
    first = Path(loopback.loaded)
    mode = (first / "model.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~_umask()  # a server may run as another user
    found = load_file(first / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    steps = [call for call in loopback.calls if call not in ("/health", "/v1/models", "/weight_info")]
    assert steps[1:] == [
        "/pause", "/collective_rpc", "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache",
        "/update_weight_version", "/resume",
    ]  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    client.update_weights(model)
    second = Path(loopback.loaded)
    assert second != first and not first.exists()
    assert torch.equal(load_file(second / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    client.close()
    assert not second.exists()


def test_a_server_that_stays_away(loopback: Server, tmp_path: Path) -> None:
    client = engine(loopback.url, tmp_path, wait=0.5)
    loopback.script, loopback.down = ["error"] * 6, 10**6
    with pytest.raises(VideoR1Error, match="did not return within"):
        client.sample(prompts(6), SETTINGS)
    loopback.down = 0
    loopback.script.clear()
    assert len(client.sample(prompts(6), SETTINGS)) == 6  # later, it is back


def test_a_refused_request_is_not_repeated(loopback: Server, tmp_path: Path) -> None:
    client = engine(loopback.url, tmp_path)
    loopback.script = ["refuse"]
    with pytest.raises(VideoR1Error, match="top_k is odd"):
        client.sample(prompts(1), SETTINGS)
    assert len(loopback.requests) == 1


def test_a_server_that_was_started_otherwise(loopback: Server, tmp_path: Path) -> None:
    loopback.served["positions"] = "vllm"
    with pytest.raises(ConfigError, match="positions is vllm, not transformers; start it with"):
        engine(loopback.url, tmp_path)


def test_weights_of_another_model_are_not_sent(loopback: Server, tmp_path: Path) -> None:
    loopback.served["hidden_size"] = 4096
    client = engine(loopback.url, tmp_path)
    with pytest.raises(ConfigError, match="whose hidden_size is 4096, the trained one has"):
        client.update_weights(TINY)
    assert loopback.loaded == "" and "/pause" not in loopback.calls


def test_no_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="video-r1 serve models/tiny"):
        engine("http://127.0.0.1:9", tmp_path, wait=0.2)
    assert caplog.text.count("for it") == 1  # said at once, and once


def test_too_long_for_the_server(loopback: Server, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="256 tokens"):
        engine(loopback.url, tmp_path).sample(prompts(1), SamplingSettings(max_tokens=250))


def test_a_server_that_comes_back_unasked_is_supplied(
    loopback: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first of several processes does, whose own requests may be done."""
    monkeypatch.setattr(server, "WATCH_SECONDS", 0.02)
    client = engine(loopback.url, tmp_path)
    client.update_weights(copy.deepcopy(TINY))
    weights = loopback.loaded
    watch = threading.Thread(target=client._keep_supplied, daemon=True)
    watch.start()
    loopback.version, loopback.loaded, loopback.down = "default", "", 3
    deadline = time.monotonic() + 60
    while loopback.version != client._version and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (loopback.version, loopback.loaded) == (client._version, weights)
    client.close()
    watch.join(10)
    assert not watch.is_alive()


# ---- Several servers


@pytest.fixture
def beside(loopback: Server) -> Iterator[Server]:
    """A second server."""
    other = Server()
    yield other
    other.http.shutdown()
    other.http.server_close()


def sent(server: Server) -> set[str]:
    return {json.dumps(request) for request in server.requests}


@pytest.mark.parametrize("event", ["error", "restart"])
def test_another_server_is_asked_again(
    loopback: Server, beside: Server, tmp_path: Path, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same completions, whoever gives them; the one that failed is left out."""
    monkeypatch.setattr(chat_client, "SKIP", 1000.0)
    expected = engine(loopback.url, tmp_path).sample(prompts(12), SETTINGS)
    alone = sent(loopback)
    loopback.requests.clear()
    client = engine([loopback.url, beside.url], tmp_path, concurrency=1)
    loopback.script = ["fine", event]
    groups = client.sample(prompts(12), SETTINGS)
    assert ids(groups) == ids(expected)
    assert sent(loopback) | sent(beside) == alone  # with the same seeds
    assert (len(loopback.requests), len(beside.requests)) == (2, 11)
    assert client.concurrency == 2


def test_servers_of_different_models(loopback: Server, beside: Server, tmp_path: Path) -> None:
    both = [loopback.url, beside.url]
    beside.served["hidden_size"] = 4096
    with pytest.raises(ConfigError, match=f"{beside.url}: its hidden_size is 4096, that of {loopback.url}"):
        engine(both, tmp_path)
    beside.model = "models/other"
    with pytest.raises(ConfigError, match=f"{beside.url} serves models/other, not models/tiny"):
        engine(both, tmp_path)
