"""The rule of positions after a video: recorded in checkpoints, and warned of where another one answers."""

from __future__ import annotations

import json
import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import chat_endpoint
from tiny_models import FAMILIES, has_timestamps, tiny_checkpoint, tiny_model, tiny_tokenizer

from video_r1.rollout.engine_factory import open_engine, open_prompts
from video_r1.rollout.vllm import serve
from video_r1.rollout.vllm.mrope import POSITIONS_VARIABLE, rule_of_training
from video_r1.settings.decoding import AskSettings
from video_r1.settings.training_record import RECORD
from video_r1.settings.vllm import ServeSettings


def checkpoint_of(folder: Path, rule: str | None) -> Path:
    tiny_checkpoint("qwen2_5_vl", folder)
    (folder / RECORD).write_text(json.dumps({} if rule is None else {"positions": rule}))
    return folder


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_is_recorded_where_there_are_two(family: str) -> None:
    rule = rule_of_training(tiny_model(family, tiny_tokenizer()).config)
    assert rule == (None if has_timestamps(family) else "transformers")


@pytest.mark.parametrize(("trained", "said"), [("transformers", False), ("vllm", True)])
def test_an_engine_in_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: str | None, said: bool
) -> None:
    model = str(checkpoint_of(tmp_path, trained))
    settings = AskSettings(model=model, path="x.mp4", question=["?"])
    processor, _, _ = open_prompts(settings)
    with caplog.at_level(logging.WARNING), closing(open_engine(settings, processor)):
        assert bool(warnings_of(caplog)) == said
    if said:
        assert "trained with the positions of vllm after a video; this engine has those" in caplog.text


@pytest.mark.parametrize(
    ("trained", "served", "said"),
    [("transformers", None, True), ("transformers", "vllm", True), ("transformers", "transformers", False)],
)  # fmt: skip
def test_an_endpoint_of_another_rule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: str | None, served: str | None, said: bool
) -> None:
    """As plain `vllm serve`, which does not say what it has."""
    model = str(checkpoint_of(tmp_path, trained))
    with chat_endpoint(model=model) as server:
        server.positions = served
        settings = AskSettings(model=model, path="x.mp4", question=["?"], engine=server.url)
        with caplog.at_level(logging.WARNING), closing(open_engine(settings, None)):
            assert len(warnings_of(caplog)) == said
    if said:
        has = "has those of vllm" if served else "does not say which it has"
        assert f"{server.url} {has}, and may answer as another policy" in caplog.text


def test_a_server_of_another_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only where the user's own variable asks for it."""
    became: list[Any] = []
    monkeypatch.setattr(serve, "runnable", list)
    monkeypatch.setattr(os, "execve", lambda *given: became.append(given))
    settings = ServeSettings(model=str(checkpoint_of(tmp_path, "transformers")))
    with caplog.at_level(logging.WARNING):
        serve.run_serve(settings)
        assert not warnings_of(caplog)
        monkeypatch.setenv(POSITIONS_VARIABLE, "vllm")
        serve.run_serve(settings)
    assert [given[2][POSITIONS_VARIABLE] for given in became] == ["transformers", "vllm"]
    (said,) = warnings_of(caplog)
    assert "this server has those of vllm" in said
