"""The rule of positions after a video: recorded in checkpoints, and warned of where another one answers."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from pathlib import Path

import pytest
from chat_endpoint import chat_endpoint
from tiny_models import FAMILIES, has_timestamps, tiny_model, tiny_tokenizer

from video_r1.data.prompts import TextPrompts
from video_r1.rollout.engine_factory import open_engine
from video_r1.rollout.vllm.mrope import rule_of_training
from video_r1.settings.decoding import AskSettings
from video_r1.settings.training_record import RECORD


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "positions" in record.getMessage()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_is_recorded_where_there_are_two(family: str) -> None:
    rule = rule_of_training(tiny_model(family, tiny_tokenizer()).config)
    assert rule == (None if has_timestamps(family) else "transformers")


@pytest.mark.parametrize(
    ("trained", "served", "said"),
    [("transformers", None, True), ("transformers", "vllm", True), ("transformers", "transformers", False),
     (None, None, False)],
)  # fmt: skip
def test_an_endpoint_of_another_rule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: str | None, served: str | None, said: bool
) -> None:
    """A plain `vllm serve` does not say which rule it has."""
    model = str(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps({} if trained is None else {"positions": trained}))
    with chat_endpoint(model=model) as server:
        server.positions = served
        settings = AskSettings(model=model, path="x.mp4", question=["?"], engine=server.url)
        with caplog.at_level(logging.WARNING), closing(open_engine(settings, TextPrompts())):
            assert len(warnings_of(caplog)) == said
    if said:
        has = "has those of vllm" if served else "does not say which it has"
        assert f"{server.url} {has}, and may answer as another policy" in caplog.text
