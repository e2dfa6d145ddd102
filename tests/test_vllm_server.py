"""A real `vllm serve` on loopback: what it receives, what it samples, new weights, and how it fails.

The tests share one server and stand in an order: the last one kills it and starts it again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import Forced
from server_process import ServerProcess
from test_look import check_follow, check_sampler, sampled
from test_vllm_training import trained
from tgrpo_trainers import first_step, make_trainer
from tiny_models import moving_square, write_clip
from tiny_questions import read_lines, write_manifest
from vllm_prompts import (
    check_weight_sync,
    clip_prompts,
)

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.vllm.server import ServerEngine

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


def test_episodes(engine: ServerEngine, model: Any, processor: Any, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", moving_square(64))
    check_sampler(model, *sampled("qwen2_5_vl", clip, model, engine, processor))
    check_follow(engine, "_stop_ids", clip, processor, "qwen2_5_vl")


def test_a_served_teacher(engine: ServerEngine, server: ServerProcess, model: Any, tmp_path: Path) -> None:
    """Its log-probs of clips, text and episodes are those of the model in this process."""
    rows = json.loads(write_manifest(tmp_path, 2, 1).read_text())
    rows[1] = {**rows[1], "data_type": "text", "path": None}
    teachers: dict[str, Any] = {"local": str(base_folder()), "served": server.url}
    trainers: dict[str, Any] = {
        name: make_trainer(
            base_folder(), rows, tmp_path / name, rewards=None, teacher_model_name_or_path=teacher,
            teacher_frames=8, max_frames=4, fps=4.0, reward_funcs="none", temporal_rule="off", tools="look",
            look_frames=4, media_root=str(tmp_path),
        )
        for name, teacher in teachers.items()
    }  # fmt: skip
    trainers["local"].engine.__class__ = Forced
    batches, _ = first_step(trainers["local"])
    groups = batches[0]["batch"].groups
    assert any(rollout.turns for group in groups for rollout in group.ordered)
    local, served = (trainer.teacher.scores(model, groups) for trainer in trainers.values())
    difference = (local.logprobs - served.logprobs).abs()
    assert float(difference.mean()) < 1e-5 and float(difference.max()) < 1e-4
    assert float((local.likeliest == served.likeliest).float().mean()) > 0.99


def test_training_goes_on_when_the_server_is_killed(
    server: ServerProcess,
    lab: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SIGKILL in the middle of the second step's rollouts, and a new server some seconds later.

    No group has missing or doubled rollouts, and after the restart it is the trained weights that sample.
    """
    sampled: list[tuple[list[int], list[list[Rollout]]]] = []
    answers: list[int] = []
    sample, rollout = ServerEngine.sample, ServerEngine._rollout
    restart, killing = threading.Timer(2.0, server.start), threading.Lock()

    def watched(self: ServerEngine, given: Sequence[Prompt], settings: Any, counts: Any = None) -> Any:
        groups = sample(self, given, settings, counts)
        sampled.append(([settings.n] * len(given) if counts is None else list(counts), groups))
        return groups

    def counted(self: ServerEngine, *given: Any) -> Rollout:
        answers.append(1)
        if len(sampled) == 2 and killing.acquire(blocking=False):  # the first call is the check before all
            server.kill()
            restart.start()
        return rollout(self, *given)

    # Few requests at once, so that some are under way and others not yet sent.
    defaults: Any = ServerEngine.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "concurrency", 2)
    monkeypatch.setattr(ServerEngine, "sample", watched)
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


def in_training(server: ServerProcess) -> dict[str, Any]:
    """The settings of a trainer that samples there."""
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
