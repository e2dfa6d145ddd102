"""A real `vllm serve` on loopback: what it receives, what it samples, new weights, and how it fails.

The tests share one server and stand in an order: the last one kills it and starts it again.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from server_process import FAILURE, ServerProcess
from test_vllm_training import check_like_curves, trained
from tiny_questions import read_lines
from vllm_prompts import (
    check_weight_sync,
    clip_prompts,
)

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.errors import VideoR1Error
from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.engine_factory import open_engine
from video_r1.rollout.vllm.server import ServerEngine
from video_r1.settings.commands import LabSettings
from video_r1.settings.decoding import EvalSettings

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SETTINGS = SamplingSettings(n=4, max_tokens=24, seed=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path_factory.mktemp("server"))
    process.start()
    try:
        process.wait()
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(base_folder())


@pytest.fixture(scope="module")
def prompts(processor: Any) -> list[Prompt]:
    return clip_prompts(processor)


@pytest.fixture
def model() -> Any:
    return load_model(base_folder(), "float32")


@pytest.fixture
def engine(server: ServerProcess, processor: Any, model: Any) -> Iterator[ServerEngine]:
    """Its server has the model's weights."""
    engine = ServerEngine(server.url, processor, model.generation_config, model=base_folder())
    engine.update_weights(model)
    yield engine
    engine.close()


def test_logprobs_before_and_after_the_weight_sync(
    engine: ServerEngine, model: Any, prompts: list[Prompt]
) -> None:
    check_weight_sync(engine, model, prompts, peft=True)


def test_completions_are_heard_as_they_are_written(
    server: ServerProcess, engine: ServerEngine, prompts: list[Prompt]
) -> None:
    """Token by token, and they are those of an answer that is not streamed; at the address with /v1 text."""
    heard: dict[tuple[int, int], list[int]] = {}
    times: list[float] = []

    def on_token(prompt: int, completion: int, token: int) -> None:
        heard.setdefault((prompt, completion), []).append(token)
        times.append(time.monotonic())

    whole, streamed = (
        engine.generate(prompts, SETTINGS),
        engine.generate(prompts, SETTINGS, on_token=on_token),
    )
    assert len(set(times)) > 20
    for place, (one, two) in enumerate(zip(whole, streamed, strict=True)):
        for number, (a, b) in enumerate(zip(one, two, strict=True)):
            assert heard[place, number] == a.token_ids.tolist() == b.token_ids.tolist()
            assert torch.allclose(a.logprobs, b.logprobs, atol=1e-4) and a.finish_reason == b.finish_reason
    pieces: dict[int, list[str]] = {}
    settings = EvalSettings(engine=f"{server.url}/v1", model=str(base_folder()))
    spoken = open_engine(settings, None)
    generate: Any = spoken.generate
    said = generate(prompts[:1], SETTINGS, on_text=lambda _, n, piece: pieces.setdefault(n, []).append(piece))
    assert len(pieces) == 4 and len(pieces[0]) > 3
    assert ["".join(pieces[n]) for n in range(4)] == [rollout.text for rollout in said[0]]
    spoken.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    write_lab(LabSettings(folder=str(folder), train=16, test=1, workers=1))
    return folder


def test_a_server_that_dies_says_why(
    server: ServerProcess, engine: ServerEngine, prompts: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    """The model fails in the engine's own process; the trainer says so, at once and when it gives up."""
    engine.wait = 2.0
    (server.recorded / "fail").touch()
    try:
        with pytest.raises(VideoR1Error, match=rf"did not return within 2 s .*MemoryError: {FAILURE}"):
            engine.generate(prompts, SETTINGS)
    finally:
        (server.recorded / "fail").unlink()
        server.kill()
        server.start()
    assert f"the server's last error was MemoryError: {FAILURE}; waiting up to 2 s" in caplog.text
    server.wait()


def test_training_goes_on_when_the_server_is_killed(
    server: ServerProcess,
    lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SIGKILL in the middle of the fourth step's rollouts, and a new server some seconds later.

    The learning curve is that of the transformers engine, no group has missing or doubled rollouts, and after
    the restart it is the trained weights that sample.
    """
    sampled: list[tuple[list[int], list[list[Rollout]]]] = []
    answers: list[int] = []
    generate, rollout = ServerEngine.generate, ServerEngine._rollout
    restart, killing = threading.Timer(2.0, server.start), threading.Lock()

    def watched(self: ServerEngine, given: Sequence[Prompt], settings: Any, counts: Any = None) -> Any:
        groups = generate(self, given, settings, counts)
        sampled.append(([settings.n] * len(given) if counts is None else list(counts), groups))
        return groups

    def counted(self: ServerEngine, choice: dict[str, Any]) -> Rollout:
        answers.append(1)
        if len(sampled) == 4 and killing.acquire(blocking=False):  # the first call is the check before all
            server.kill()
            restart.start()
        return rollout(self, choice)

    # Few requests at once, so that some are under way and others not yet sent.
    defaults: Any = ServerEngine.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "concurrency", 2)
    monkeypatch.setattr(ServerEngine, "generate", watched)
    monkeypatch.setattr(ServerEngine, "_rollout", counted)
    with caplog.at_level(logging.WARNING):
        ours = trained(lab, tmp_path / "server", **in_training(server), vllm_server_timeout=300.0)
    restart.join()
    assert "waiting up to 300 s for it" in caplog.text and "log-probs differ" not in caplog.text
    assert len(sampled) == 1 + len(ours)
    for counts, groups in sampled:
        assert [len(group) for group in groups] == counts
    assert killing.locked() and len(answers) >= sum(sum(counts) for counts, _ in sampled)
    for line in ours:
        assert line["sampler/logprob_difference"] < 1e-3
    recorded = read_lines(tmp_path / "server" / "rollouts.jsonl")
    assert {len(group["ordered"]) for group in recorded} == {6}
    theirs = trained(lab, tmp_path / "transformers")
    assert improvement(ours) > 0.1 and improvement(theirs) > 0.1
    curves = [[line["reward/brevity"] for line in lines] for lines in (ours, theirs)]
    check_like_curves(*curves)


def in_training(server: ServerProcess) -> dict[str, Any]:
    """The settings of a trainer that samples there."""
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}


def improvement(lines: list[dict[str, Any]]) -> float:
    """How much higher the reward is in the last two steps than in the first two."""
    rewards = [line["reward/brevity"] for line in lines]
    return statistics.mean(rewards[-2:]) - statistics.mean(rewards[:2])
