"""Rollouts on vLLM servers, on other GPUs or other machines.

    Prompt: tokens, processed pixels ─► POST /inference/v1/generate, one request a prompt ─► Rollouts
    trained model ─► checkpoint_weights ─► a folder, or vLLM's weight transfer ─► the server, caches emptied

A failed request is sent again with the same seed, so no completion is counted twice. Every answer names the
weights that sampled it. A server that comes back with other weights gets the present ones before its answers
are used.
"""

import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from video_r1.chat_client import (
    Failover,
    ServerFailure,
    ServerRefusal,
    get,
    integer,
    number,
    post,
    request,
    shape_of,
    wait_for,
    word,
)
from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.errors import ConfigError, RequestError, VideoR1Error
from video_r1.fingerprint import model_stamps
from video_r1.models.group_forward import vision_language_model
from video_r1.processes import gather, process_count, process_index, wait_for_everyone
from video_r1.rollout.engine import Asking, ContinuingEngine, Then, stop_token_ids
from video_r1.rollout.vllm.requests import PromptRequest, prompt_requests, rollout_of, server_request
from video_r1.rollout.vllm.serve import WANTED, shape
from video_r1.rollout.vllm.weight_sync import FolderSync, NCCLSync, WeightSync, checkpoint_weights

T = TypeVar("T")
Hear = Callable[[int, Rollout], object]
logger = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"
FIRST_WEIGHTS = "default"  # vLLM's version of the weights that a server starts with
WATCH_SECONDS = 2.0
TRANSFER_SECONDS = 600.0  # from GPU to GPU
ATTEMPTS = 5  # of one request, each after the server has answered its health check
NATS = (-1e4, 0.01)  # of a log-prob: vLLM writes -9999 for what has no probability, and rounds
TOKEN_BYTES = 512  # of a token with its log-prob in an answer, at most


class ServerEngine(ContinuingEngine):
    """Samples on vLLM servers that were started with `video-r1 serve` (or the command that it prints).

    url: the server's address. Several addresses share the requests; such servers take no new weights.
    processor: builds the prompts. generation: has the end tokens, until `update_weights`.
    model: the checkpoint that the server has to serve; None accepts any.
    folder: parent of the folder for weights, which the server has to see under the same path (default: the
        system's folder for temporary files).
    wait: seconds to wait for a server that does not answer; timeout: seconds for one request;
    concurrency: requests at once, for each address: first turns, and as many later turns.

    A server's key is read from VLLM_API_KEY. Raises ConfigError when nothing answers at an address within
    `wait`, or the server there serves another model or was started in another way.
    """

    has_own_weights = True

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
        self.url = " and ".join(self.urls)  # for messages, and the address if it is the only one
        self._failover = Failover(self.urls)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.wait, self.timeout, self.concurrency = wait, timeout, concurrency * len(self.urls)
        self._key = os.environ.get(KEY_VARIABLE)
        self._model = None if model is None else str(model)
        self._stop_ids = stop_token_ids(generation, self.tokenizer)
        # Absolute: the server may have been started in another folder
        self._folder = Path(tempfile.gettempdir() if folder is None else folder).absolute()
        self._sync: WeightSync | None = None  # None: the server samples with the weights that it started with
        self._version: str | None = None
        self._recovery = threading.Lock()
        self._recoveries = 0
        self._closed = threading.Event()
        self._lost: VideoR1Error | None = None
        self._failures: dict[str, None] = {}  # of the present loss, in their order
        lengths = []
        for one in self.urls:
            try:
                lengths.append(self._when_there(partial(self._max_length, one)))
            except ServerFailure as failure:
                raise ConfigError(
                    f"{one}: no vLLM server answered within {wait:g} s ({failure}); start one with "
                    f"video-r1 serve {self._model or 'MODEL'} --port 8000"
                ) from failure
        self.max_model_len = min(lengths)
        self.served = self._describe(self.urls[0])
        for one in self.urls[1:]:
            for name, value in self._describe(one).items():
                if name != "started" and self.served[name] != value:
                    raise ConfigError(
                        f"{one}: its {name} is {value}, that of {self.urls[0]} is {self.served[name]}; "
                        "requests are shared by servers of one model"
                    )

    def _describe(self, url: str) -> dict[str, Any]:
        """Return the server's description. Raises ConfigError if its log-probs would differ."""
        advice = "start it with video-r1 serve, or with the command that it prints"
        try:
            served = describe(url, self._key, self.timeout)
            with shape_of(served, "description"):
                integer(served["vocab_size"], 1, 1 << 31)
                getattr(torch, word(served["dtype"]))
                word(served["architecture"])
                [served[name] for name in (*WANTED, "hidden_size", "num_hidden_layers", "weight_transfer")]
        except (ServerRefusal, ServerFailure) as error:
            raise ConfigError(f"{url} does not say what it serves ({error}); {advice}") from error
        for name, value in WANTED.items():
            if served[name] != value:
                raise ConfigError(f"{url}: its {name} is {served[name]}, not {value}; {advice}")
        return served

    def require_weights_of(self, model: str) -> None:
        """Raise ConfigError for a server whose weights are no longer, or not yet, the model's files."""
        newest = max((changed for *_, changed in model_stamps(Path(model))), default=0)
        for url in self.urls:
            try:
                served = describe(url, self._key, self.timeout)
                info = get(f"{url}/weight_info", self._key, 10.0)
                with shape_of([served, info], "description"):
                    trained = info["weight_version"] != FIRST_WEIGHTS
                    changed = newest > integer(served.get("started", newest), 0, 1 << 62)
            except (ServerRefusal, ServerFailure) as error:
                raise ConfigError(f"{url} does not say which weights it has: {error}") from error
            if trained or changed:
                why = "a training has sent it others" if trained else "they have changed since it was started"
                raise ConfigError(f"{url} does not serve the weights of {model}: {why}; start it again")

    def _told(self, path: str, read: Callable[[Any], T], body: Any = None) -> T:
        """Return what `read` finds in the answer at a path, after retries. Raises VideoR1Error."""
        try:
            return self._when_there(lambda: self._read(path, read, body))
        except (ServerFailure, ServerRefusal) as error:
            raise VideoR1Error(f"{self.url}: {error}; start it with video-r1 serve") from error

    # ---- Weights

    def update_weights(self, model: Any) -> None:
        """Send the model's weights to the server, adapters merged. Every rank calls it; rank 0 sends.

        Raises ConfigError when the server has another model, and VideoR1Error when it does not take them.
        """
        wait_for_everyone()  # no rank is still sampling
        inner = vision_language_model(model)
        self._stop_ids = stop_token_ids(inner.generation_config, self.tokenizer)
        if self._sync is None:
            for name, value in shape(type(inner).__name__, inner.config).items():
                if self.served[name] != value:
                    raise ConfigError(
                        f"{self.url} serves a model whose {name} is {self.served[name]}, the trained one has "
                        f"{value}; serve the checkpoint that training starts from"
                    )
            self._sync = self._open_sync()
        version = gather(uuid.uuid4().hex)[0]
        dtype = getattr(torch, self.served["dtype"])
        weights = checkpoint_weights(model)  # all ranks gather sharded ones together
        with self._recovery:
            if process_index() == 0:
                self._sync.keep(self._sync.copies.take(weights, dtype), version)
            else:
                deque(weights, maxlen=0)
                self._sync.keep(None, version)
            self._version, self._lost = version, None
        if process_index() == 0:
            self._recover(self._recoveries)
        wait_for_everyone()

    def _keep_supplied(self) -> None:
        """Send weights to a server that comes back while only ranks without weights wait for it."""
        while not self._closed.wait(WATCH_SECONDS):
            try:
                if self._served_version() != self._version:
                    self._recover(self._recoveries)
            except (ServerFailure, ServerRefusal, VideoR1Error):
                pass  # the next request reports it

    def _open_sync(self) -> WeightSync:
        if self.served["weight_transfer"] == "nccl" and torch.cuda.is_available():
            if process_count() > 1 and process_index() == 0:
                threading.Thread(target=self._keep_supplied, daemon=True).start()
            workers = self._told("/get_world_size", lambda reply: integer(reply["world_size"], 1, 1 << 20))
            return NCCLSync(self.url, workers, f"cuda:{torch.cuda.current_device()}", TRANSFER_SECONDS)
        return FolderSync(self._folder / f"server-weights-{gather(uuid.uuid4().hex)[0]}")

    def _send_weights(self) -> None:
        """Send the present weights to the server unless it has them, and empty its caches of old ones."""
        self._reach()
        if self._sync is None or (served := self._served_version()) == self._version:
            return
        if process_index() and isinstance(self._sync, NCCLSync):
            raise ServerFailure("it waits for the weights of rank 0")
        try:
            self._post("/pause?mode=abort")
            self._sync.send(self._post, served)
            for cache in ("encoder", "mm", "prefix"):
                self._post(f"/reset_{cache}_cache")
            self._post("/update_weight_version", {"new_version": self._version})
            self._post("/resume")
        except ServerRefusal as refusal:
            raise VideoR1Error(
                f"{self.url} does not take weights ({refusal}); start it again with video-r1 serve"
            ) from refusal

    # ---- Completions

    def follow(self, asked: Asking, then: Then) -> None:
        """Sample as `ContinuingEngine.follow` says; a prompt's completions are one request with a stream.
        Raises RequestError as VLLMEngine does, and VideoR1Error when the server stays away or fails.
        """
        requests = partial(prompt_requests, limit=self.max_model_len, stop_ids=self._stop_ids)
        dtype = getattr(torch, self.served["dtype"])

        def begin(request: PromptRequest) -> list[Future[Any]]:
            begun: dict[int, list[Future[Any]]] = {}

            def hear(index: int, new: Rollout) -> None:
                if index not in begun:  # a request that was sent again repeats some
                    numbers = request.numbers(index)
                    begun[index] = [turns.submit(go_on, request.index, each, new) for each in numbers]

            fields = {**request.parameters, "stream_interval": request.parameters["max_tokens"]}
            body = {**server_request(asked[0][request.index], fields, dtype), "stream": True}
            self._answer(lambda url: self._streamed(url, body, hear))
            return list(chain(*begun.values()))

        def go_on(index: int, number: int, new: Rollout) -> None:
            while turn := then(index, number, new):
                (request,) = requests([turn[0]], turn[1], None)
                body = server_request(turn[0], request.parameters, dtype)
                new = self._answer(partial(self._completion, body=body))

        self._lost = None
        first, turns = (ThreadPoolExecutor(self.concurrency, name) for name in ("rollouts", "turns"))
        try:
            work: set[Future[Any]] = {first.submit(begin, request) for request in requests(*asked)}
            while work:
                done, work = wait(work, return_when=FIRST_COMPLETED)
                work.update(*(future.result() or () for future in done))
        finally:
            for pool in (turns, first):
                pool.shutdown(cancel_futures=True)

    def score(self, answers: Sequence[tuple[Prompt, Tensor]]) -> list[list[tuple[float, int]]]:
        """Return log-prob, nats at temperature 1, and rank (1: likeliest) of tokens of the server's model.

        answers: all tokens and pixels of a sequence, and the indices [L] of the tokens that are scored.
        Raises VideoR1Error as `follow`.
        """
        dtype = getattr(torch, self.served["dtype"])
        parameters = {"n": 1, "max_tokens": 1, "prompt_logprobs": 0, "ignore_eos": True, "detokenize": False}

        def scored(answer: tuple[Prompt, Tensor]) -> list[tuple[float, int]]:
            prompt, places = answer
            if len(prompt.input_ids) >= self.max_model_len:
                raise RequestError(
                    f"{self.url}: an answer and its prompt have {len(prompt.input_ids)} tokens, the limit is "
                    f"{self.max_model_len}; serve with a larger --max_model_len, or lower teacher_frames"
                )
            body = server_request(prompt, parameters, dtype)

            def read(url: str) -> list[tuple[float, int]]:
                reply = self._generated(url, body)
                with shape_of(reply, "answer with the prompt's log-probs"):
                    found = reply["prompt_logprobs"]
                    entries = [found[place][str(int(prompt.input_ids[place]))] for place in places.tolist()]
                    return [(number(e["logprob"], *NATS), integer(e["rank"], 1, 1 << 31)) for e in entries]

            return self._answer(read)

        self._lost = None
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="scores") as pool:
            return list(pool.map(scored, answers))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text by the served tokenizer. Raises VideoR1Error."""
        body = {"prompt": text, "add_special_tokens": False}
        return self._told("/tokenize", lambda reply: [integer(t, 0, 1 << 31) for t in reply["tokens"]], body)

    def _answer(self, read: Callable[[str], T]) -> T:
        """Return what `read` gets from one request to the address that it is given, after retries."""
        failure: ServerFailure | None = None
        for _ in range(ATTEMPTS):
            recoveries = self._recoveries
            try:
                with self._failover.asking() as address:
                    if address.failed:
                        self._max_length(address.url)  # still the same model
                    return read(f"{address.url}/inference/v1/generate")
            except ServerFailure as error:
                failure = error
                if not self._failover.any_ready():
                    if recoveries == self._recoveries:
                        self._note(error)
                    self._recover(recoveries)
            except ServerRefusal as refusal:
                raise VideoR1Error(f"{self.url} refused a request: {refusal}") from refusal
        raise VideoR1Error(f"{self.url} failed {ATTEMPTS} times at one request: {failure}")

    def _generated(self, url: str, body: dict[str, Any], on_line: Any = None) -> Any:
        sampling, sent = body["sampling_params"], json.dumps(body).encode()
        size = TOKEN_BYTES * (len(body["token_ids"]) + sampling["n"] * sampling["max_tokens"])
        return wait_for(request(url, self._key, self.timeout, sent, on_line=on_line, expected=size))

    def _completion(self, url: str, body: dict[str, Any]) -> Rollout:
        """Return the completion that a request for one gets."""
        reply = self._generated(url, body)
        with shape_of(reply, "completion"):
            (choice,) = reply["choices"]
        return self._rollout(choice, body["sampling_params"]["max_tokens"])

    def _streamed(self, url: str, body: dict[str, Any], hear: Hear) -> None:
        """Give each completion to `hear` as soon as it has ended, again after a retry."""
        count, most = (body["sampling_params"][name] for name in ("n", "max_tokens"))
        parts: dict[int, tuple[list[Any], list[Any]]] = {}
        ended = set()

        def read(line: str) -> None:
            with shape_of(line, "part of completions"):
                event: Any = json.loads(line[6:]) if line.startswith("data: {") else {"choices": ()}
                if "error" in event:
                    raise ServerFailure(f"its answer broke off: {str(event['error']['message'])[:300]}")
                for choice in event["choices"]:
                    index = integer(choice["index"], 0, count - 1)
                    tokens, logprobs = parts.setdefault(index, ([], []))
                    tokens += choice["token_ids"]
                    logprobs += choice["logprobs"]["content"]
                    if choice["finish_reason"] is not None:
                        whole = choice | {"token_ids": tokens, "logprobs": {"content": logprobs}}
                        hear(index, self._rollout(whole, most))
                        ended.add(index)

        self._generated(url, body, read)
        if len(ended) != count:
            raise ServerFailure(f"it gave {len(ended)} completions of {count}")

    def _rollout(self, choice: Any, most: int) -> Rollout:
        """Return a completion. Raises ServerFailure if it is incomplete, wrong, or from other weights."""
        with shape_of(choice, "completion"):
            if (reason := choice["finish_reason"]) not in ("stop", "length"):
                raise ServerFailure(f"a completion ended with {str(reason)[:100]!r}")
            versions = {span["version"] for span in choice["weight_versions"] or ()}
            if self._version is not None and versions != {self._version}:
                raise ServerFailure("it sampled with other weights than the present ones")
            ids = [integer(token, 0, self.served["vocab_size"] - 1) for token in choice["token_ids"]]
            logprobs = [number(entry["logprob"], *NATS) for entry in choice["logprobs"]["content"]]
            if not 0 < len(ids) == len(logprobs) <= most:
                raise ValueError("too short, or too long")
        return rollout_of(ids, logprobs, reason, self.tokenizer)

    # ---- A server that is away

    def _recover(self, recoveries: int) -> None:
        """Wait for the server and send it the weights, once for all requests that failed together.

        recoveries: their number when the request was sent. Raises VideoR1Error when the server stays away.
        """
        with self._recovery:
            if self._lost is not None:
                raise self._lost
            if recoveries != self._recoveries:
                return
            try:
                self._when_there(self._send_weights)
            except ServerFailure as failure:
                self._lost = VideoR1Error(
                    f"{self.url} was lost and did not return within {self.wait:g} s ({failure}); start it "
                    "again and continue the run, or raise vllm_server_timeout"
                )
                raise self._lost from failure
            self._recoveries += 1

    def _when_there(self, work: Callable[[], T]) -> T:
        """Call `work` until it succeeds, and return its result. Raises ServerFailure after `wait` s."""
        deadline, pause = time.monotonic() + self.wait, 0.1
        while True:
            try:
                result = work()
                self._failures.clear()
                return result
            except ServerFailure as failure:
                self._note(failure)
                if time.monotonic() > deadline:
                    raise ServerFailure(", then ".join(list(self._failures)[-3:])) from failure
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _note(self, failure: ServerFailure) -> None:
        """Warn once of each failure: of requests that fail together, only one may know the reason."""
        if str(failure) not in self._failures:
            self._failures[str(failure)] = None
            logger.warning("%s: %s; waiting up to %g s for it", self.url, failure, self.wait)

    def _reach(self) -> None:
        """Check that one of the servers answers and is still the same. Raises as `_max_length` does."""
        for url in self.urls:
            try:
                self._max_length(url)
                return self._failover.is_back(url)
            except ServerFailure:
                if url == self.urls[-1]:
                    raise

    def _max_length(self, url: str) -> int:
        """Return the longest sequence in tokens. Raises ServerFailure, and ConfigError for another server."""
        try:
            get(f"{url}/health", self._key, 10.0)
            reply = get(f"{url}/v1/models", self._key, 10.0)
        except ServerRefusal as refusal:
            raise ConfigError(
                f"{url}: {refusal}; it has to be a vLLM server, and {KEY_VARIABLE} its key"
            ) from refusal
        with shape_of(reply, "list with a model and its max_model_len"):
            served = reply["data"][0]
            names = [word(name) for name in (served.get("root"), served["id"]) if name]
            wanted, paths = self._model, {Path(name).resolve() for name in names}
            if not (wanted in (None, *names) or (Path(wanted).exists() and Path(wanted).resolve() in paths)):
                raise ConfigError(f"{url} serves {names[0]}, not {wanted}")
            return integer(served["max_model_len"], 1, 1 << 40)

    def _served_version(self) -> str:
        return self._read("/weight_info", lambda reply: word(reply["weight_version"]))

    def _read(self, path: str, read: Callable[[Any], T], body: Any = None) -> T:
        reply = get(self.url + path, self._key, 10.0) if body is None else self._post(path, body)
        with shape_of(reply, f"answer at {path}"):
            return read(reply)

    def _post(self, path: str, body: Any = None) -> Any:
        return post(self.url + path, self._key, body, self.timeout)

    def close(self) -> None:
        """Stop sending weights. The server goes on."""
        self._closed.set()
        if self._sync is not None:
            self._sync.close()


def describe(url: str, key: str | None, timeout: float) -> dict[str, Any]:
    """Return WorkerExtension's description. Raises ServerRefusal if there is none, ServerFailure."""
    reply = post(f"{url}/collective_rpc", key, {"method": "served_model"}, timeout)
    with shape_of(reply, "description"):
        kinds = (str, int, type(None))
        return {word(name): value for name, value in reply["results"][0].items() if isinstance(value, kinds)}
