"""Rollouts on a vLLM server, on other GPUs or another machine.

    Prompt: tokens, processed pixels ─► POST /inference/v1/generate, one request a prompt ─► Rollouts
    trained model ─► checkpoint_weights ─► a folder, or vLLM's weight transfer ─► the server, caches emptied

A request that fails is sent again with the same seed, and its answer takes the place of the one that never
came: nothing is counted twice. Every answer names the weights that sampled it. A server that comes back with
other weights is handed the present ones again before anything of it is used.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig

from video_r1.chat_client import (
    Failover,
    ServerFailure,
    ServerRefusal,
    get,
    post,
    request_streamed,
    wait_for,
)
from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.models.group_forward import vision_language_model
from video_r1.processes import gather, process_count, process_index, wait_for_everyone
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import stop_token_ids
from video_r1.rollout.vllm.requests import Ask, asks_of, rollout_of, server_request
from video_r1.rollout.vllm.serve import WANTED, shape
from video_r1.rollout.vllm.weight_sync import FolderHandOver, HandOver, NCCLHandOver, checkpoint_weights

T = TypeVar("T")
logger = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"
WATCH_SECONDS = 2.0
TRANSFER_SECONDS = 600.0  # from GPU to GPU
ATTEMPTS = 5  # of one request, each after the server has answered its health check


class ServerEngine:
    """Samples on vLLM servers that were started with `video-r1 serve` (or as that command prints).

    url: the server's address. Several addresses share the requests; such servers take no other weights.
    processor: the one that prompts are built with. generation: names the end tokens
        (`update_weights` replaces it).
    model: the checkpoint that the server has to serve; None accepts any.
    folder: where a folder for the hand-over of weights is made, which the server has to see under the same
        path (default: the system's folder for temporary files).
    wait: seconds to wait for a server that does not answer; timeout: seconds for one request;
    concurrency: requests under way at once, for each address.

    The key of a server that asks for one is read from VLLM_API_KEY. Raises ConfigError when nothing answers
    at an address within `wait`, or when the server there serves another model or was started in another way.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        processor: Any,
        generation: GenerationConfig,
        *,
        model: str | Path | None = None,
        folder: str | Path | None = None,
        wait: float = 240.0,
        timeout: float = 600.0,
        concurrency: int = 32,
    ) -> None:
        urls = [url] if isinstance(url, str) else url
        self.urls = tuple(one.rstrip("/").removesuffix("/v1") for one in urls)
        self.url = " and ".join(self.urls)  # in words, and of the only one
        self._failover = Failover(self.urls)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.wait, self.timeout, self.concurrency = wait, timeout, concurrency * len(self.urls)
        self._key = os.environ.get(KEY_VARIABLE)
        self._model = None if model is None else str(model)
        self._stop_ids = stop_token_ids(generation, self.tokenizer)
        # As a server that was started in another folder has to find it
        self._folder = Path(tempfile.gettempdir() if folder is None else folder).absolute()
        self._hand_over: HandOver | None = None  # None: the server samples with what it started with
        self._version: str | None = None
        self._recovery = threading.Lock()
        self._recoveries = 0
        self._closed = threading.Event()
        self._lost: VideoR1Error | None = None
        self._failures: dict[str, None] = {}  # of the present loss, in their order
        lengths = []
        for one in self.urls:
            try:
                lengths.append(self._when_there(partial(self._longest, one)))
            except ServerFailure as failure:
                raise ConfigError(
                    f"{one}: no vLLM server answered within {wait:g} s ({failure}); start one with "
                    f"video-r1 serve {self._model or 'MODEL'} --port 8000"
                ) from failure
        self.max_model_len = min(lengths)
        self.served = self._describe(self.urls[0])
        for one in self.urls[1:]:
            for name, value in self._describe(one).items():
                if self.served[name] != value:
                    raise ConfigError(
                        f"{one}: its {name} is {value}, that of {self.urls[0]} is {self.served[name]}; "
                        "requests are shared by servers of one model"
                    )

    def _describe(self, url: str) -> dict[str, Any]:
        """What WorkerExtension says of it. Raises ConfigError when it samples otherwise than is counted."""
        advice = "start it with video-r1 serve, or with the words that this command prints"
        try:
            served = describe(url, self._key, self.timeout)
        except (ServerRefusal, ServerFailure) as error:
            raise ConfigError(f"{url} does not say what it serves ({error}); {advice}") from error
        for name, value in WANTED.items():
            if served[name] != value:
                raise ConfigError(f"{url}: its {name} is {served[name]}, not {value}; {advice}")
        return served

    # ---- Weights

    def update_weights(self, model: Any) -> None:
        """Hands the model's weights to the server, adapters merged.

        Every process calls it; the first one sends. Raises ConfigError when the server has another model or
        there are several, and VideoR1Error when it does not take the weights.
        """
        if len(self.urls) > 1:
            raise ConfigError(f"{self.url}: training samples on one server; name one")
        wait_for_everyone()  # nobody is sampling any more
        inner = vision_language_model(model)
        self._stop_ids = stop_token_ids(inner.generation_config, self.tokenizer)
        if self._hand_over is None:
            for name, value in shape(type(inner).__name__, inner.config).items():
                if self.served[name] != value:
                    raise ConfigError(
                        f"{self.url} serves a model whose {name} is {self.served[name]}, the trained one has "
                        f"{value}; serve the checkpoint that training starts from"
                    )
            self._hand_over = self._way_of_weights()
        version = gather(uuid.uuid4().hex)[0]
        dtype = getattr(torch, self.served["dtype"])
        weights = checkpoint_weights(model)  # sharded ones are gathered by all processes together
        with self._recovery:
            if process_index() == 0:
                self._hand_over.keep(self._hand_over.copies.take(weights, dtype), version)
            else:
                deque(weights, maxlen=0)
                self._hand_over.keep(None, version)
            self._version, self._lost = version, None
        if process_index() == 0:
            self._recover(self._recoveries)
        wait_for_everyone()

    def _keep_supplied(self) -> None:
        """Hands its weights to a server that returns while only processes without weights wait for it."""
        while not self._closed.wait(WATCH_SECONDS):
            try:
                if self._get("/weight_info")["weight_version"] != self._version:
                    self._recover(self._recoveries)
            except (ServerFailure, ServerRefusal, VideoR1Error):
                pass  # whoever asks something of the server reports it

    def _way_of_weights(self) -> HandOver:
        if self.served["weight_transfer"] == "nccl" and torch.cuda.is_available():
            if process_count() > 1 and process_index() == 0:
                threading.Thread(target=self._keep_supplied, daemon=True).start()
            workers = int(self._get("/get_world_size")["world_size"])
            return NCCLHandOver(self.url, workers, f"cuda:{torch.cuda.current_device()}", TRANSFER_SECONDS)
        return FolderHandOver(self._folder / f"server-weights-{gather(uuid.uuid4().hex)[0]}")

    def _give_weights(self) -> None:
        """Gives the server the present weights unless it has them, and drops what it has cached of others."""
        self._reach()
        if self._hand_over is None:
            return
        served = self._get("/weight_info")["weight_version"]
        if served == self._version:
            return
        if process_index() and isinstance(self._hand_over, NCCLHandOver):
            raise ServerFailure("it waits for the first process's weights")
        try:
            self._post("/pause?mode=abort")
            self._hand_over.send(self._post, served)
            for cache in ("encoder", "mm", "prefix"):
                self._post(f"/reset_{cache}_cache")
            self._post("/update_weight_version", {"new_version": self._version})
            self._post("/resume")
        except ServerRefusal as refusal:
            raise VideoR1Error(
                f"{self.url} does not take weights ({refusal}); start it again with video-r1 serve"
            ) from refusal

    # ---- Completions

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        counts: Sequence[int] | None = None,
        on_token: Callable[[int, int, int], object] | None = None,
    ) -> list[list[Rollout]]:
        """As VLLMEngine.generate. Raises VideoR1Error when the server stays away or keeps failing.

        on_token: is given each token as it is sampled, with the numbers of its prompt and completion; then a
        failure is not tried again.
        """
        asks = asks_of(prompts, sampling, counts, self.max_model_len, self._stop_ids)

        def answer(ask: Ask) -> list[Rollout]:
            dtype = getattr(torch, self.served["dtype"])
            request = server_request(prompts[ask.place], ask.parameters, dtype)
            if on_token is None:
                choices = self._completions(request, ask.parameters["n"])
            else:
                choices = self._heard(request, ask.parameters["n"], partial(on_token, ask.place))
            return ask.answered([self._rollout(choice) for choice in choices])

        self._lost = None
        results: list[list[Rollout]] = [[] for _ in prompts]
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="rollouts")
        try:
            for ask, rollouts in zip(asks, pool.map(answer, asks), strict=True):
                results[ask.place] = rollouts
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return results

    def _completions(self, body: dict[str, Any], count: int) -> list[dict[str, Any]]:
        """The answer to one request, whole and of the present weights, however often it takes."""
        failure: ServerFailure | None = None
        for _ in range(ATTEMPTS):
            recoveries = self._recoveries
            try:
                with self._failover.asking() as address:
                    if address.failures:
                        self._longest(address.url)  # still the same model
                    url = f"{address.url}/inference/v1/generate"
                    choices = post(url, self._key, body, self.timeout)["choices"]
                    self._check(choices, count)
                return sorted(choices, key=lambda choice: choice["index"])
            except ServerFailure as error:
                failure = error
                if self._failover.any_ready():
                    continue
                if recoveries == self._recoveries:
                    self._note(error)
                self._recover(recoveries)
            except ServerRefusal as refusal:
                raise VideoR1Error(f"{self.url} refused a request: {refusal}") from refusal
        raise VideoR1Error(f"{self.url} failed {ATTEMPTS} times at one request: {failure}")

    def _heard(
        self, body: dict[str, Any], count: int, hear: Callable[[int, int], object]
    ) -> list[dict[str, Any]]:
        """The answer to one request, its tokens heard as they come: what was heard cannot be taken back."""
        written, said = StreamedTokens(hear), json.dumps({**body, "stream": True}).encode()
        try:
            with self._failover.asking() as address:
                url = f"{address.url}/inference/v1/generate"
                wait_for(request_streamed(url, self._key, self.timeout, said, written.take))
                self._check(choices := written.choices(), count)
        except (ServerFailure, ServerRefusal) as failure:
            raise VideoR1Error(f"{self.url} failed: {failure}") from failure
        return sorted(choices, key=lambda choice: choice["index"])

    def _check(self, choices: Sequence[dict[str, Any]], count: int) -> None:
        """Raises ServerFailure for an answer that is cut short or comes from other weights."""
        if len(choices) != count:
            raise ServerFailure(f"it gave {len(choices)} completions of {count}")
        for choice in choices:
            if choice["finish_reason"] not in ("stop", "length"):
                raise ServerFailure(f"a completion ended with {choice['finish_reason']!r}")
            versions = {span["version"] for span in choice["weight_versions"] or ()}
            if self._version is not None and versions != {self._version}:
                raise ServerFailure("it sampled with other weights than those handed over")

    def _rollout(self, choice: dict[str, Any]) -> Rollout:
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return rollout_of(choice["token_ids"], logprobs, choice["finish_reason"], self.tokenizer)

    # ---- A server that is away

    def _recover(self, recoveries: int) -> None:
        """Waits for the server and hands it the weights, once for all requests that failed together.

        recoveries: how many there had been when the request was sent. Raises VideoR1Error when it stays away.
        """
        with self._recovery:
            if self._lost is not None:
                raise self._lost
            if recoveries != self._recoveries:
                return
            try:
                self._when_there(self._give_weights)
            except ServerFailure as failure:
                self._lost = VideoR1Error(
                    f"{self.url} was lost and did not return within {self.wait:g} s ({failure}); start it "
                    "again and continue the run, or raise vllm_server_timeout"
                )
                raise self._lost from failure
            self._recoveries += 1

    def _when_there(self, work: Callable[[], T]) -> T:
        """What `work` returns as soon as it does not fail. Raises ServerFailure after `wait` seconds."""
        deadline, pause = time.monotonic() + self.wait, 0.1
        while True:
            try:
                result = work()
                self._failures.clear()
                return result
            except ServerFailure as failure:
                self._note(failure)
                if time.monotonic() > deadline:
                    raise ServerFailure(", then ".join(self._failures)) from failure
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _note(self, failure: ServerFailure) -> None:
        """Warns of it, once: of requests that fail together, one may have heard what the others have not."""
        if str(failure) not in self._failures:
            self._failures[str(failure)] = None
            logger.warning("%s: %s; waiting up to %g s for it", self.url, failure, self.wait)

    def _reach(self) -> None:
        """A server is there, and still the same one. Raises as `_longest`."""
        *others, last = self.urls
        for url in others:
            with suppress(ServerFailure):
                self._longest(url)
                return self._failover.is_back(url)
        self._longest(last)
        self._failover.is_back(last)

    def _longest(self, url: str) -> int:
        """The longest sequence in tokens. Raises ServerFailure, and ConfigError for another server."""
        try:
            get(f"{url}/health", self._key, 10.0)
            served = get(f"{url}/v1/models", self._key, 10.0)["data"][0]
        except ServerRefusal as refusal:
            raise ConfigError(
                f"{url}: {refusal}; it has to be a vLLM server, and {KEY_VARIABLE} its key"
            ) from refusal
        names = [name for name in (served.get("root"), served.get("id")) if name]
        if self._model is not None and not any(_same_model(name, self._model) for name in names):
            raise ConfigError(f"{url} serves {names[0]}, not {self._model}")
        return int(served["max_model_len"])

    def _get(self, path: str) -> Any:
        return get(self.url + path, self._key, 10.0)

    def _post(self, path: str, body: Any = None) -> Any:
        return post(self.url + path, self._key, body, self.timeout)

    def rest(self) -> None:
        """The server's memory is its own."""

    def close(self) -> None:
        """Ends the hand-over of weights. The server goes on."""
        self._closed.set()
        if self._hand_over is not None:
            self._hand_over.close()


def describe(url: str, key: str | None, timeout: float) -> dict[str, Any]:
    """What WorkerExtension says of the server there. Raises ServerRefusal where nobody started it with one,
    and ServerFailure."""
    return post(f"{url}/collective_rpc", key, {"method": "served_model"}, timeout)["results"][0]


def _same_model(served: str, wanted: str) -> bool:
    return served == wanted or (Path(wanted).exists() and Path(served).resolve() == Path(wanted).resolve())


class StreamedTokens:
    """Completions of vLLM's token endpoint, assembled from streamed pieces.

    on_token: is called with the index of a completion and each of its tokens.
    """

    def __init__(self, on_token: Callable[[int, int], object]) -> None:
        self._on_token = on_token
        self._choices: dict[int, dict[str, Any]] = {}

    def take(self, event: Any) -> None:
        """Add an event. Raises ServerFailure for one that is no piece of such an answer."""
        try:
            for piece in event["choices"]:
                blank = {"index": piece["index"], "token_ids": [], "logprobs": {"content": []}}
                so_far = self._choices.setdefault(piece["index"], blank)
                so_far["token_ids"] += piece["token_ids"] or []
                so_far["logprobs"]["content"] += (piece["logprobs"] or {"content": []})["content"]
                for name in ("finish_reason", "weight_versions"):
                    so_far[name] = piece.get(name) or so_far.get(name)
        except (KeyError, TypeError) as error:
            raise ServerFailure(f"its answer has no tokens: {json.dumps(event)[:200]}") from error
        for piece in event["choices"]:
            for token in piece["token_ids"] or []:
                self._on_token(piece["index"], token)

    def choices(self) -> list[dict[str, Any]]:
        return list(self._choices.values())
