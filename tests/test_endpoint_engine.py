"""Evaluation and questions at an OpenAI-compatible endpoint on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_endpoint import chat_endpoint, images_of, write_questions
from tiny_questions import read_lines

from video_r1.data.media import Media
from video_r1.data.prompts import TextPrompts
from video_r1.data.records import Sample
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.evaluation import ask
from video_r1.evaluation.command import run_eval
from video_r1.rollout import endpoint
from video_r1.rollout.choice import is_endpoint, open_engine
from video_r1.settings.decoding import AskSettings, EvalSettings

SIZES: dict[str, Any] = {"frame_pixels": 56 * 56, "image_pixels": 56 * 56, "model": "teacher"}


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


@pytest.mark.parametrize("event", [503, "busy", "garbage", "empty", "half", "drop", "abort"])
def test_failures_that_pass_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: Any
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    with chat_endpoint() as server:
        server.script[0], server.script[2] = [event, event], [event]
        records = evaluated(tmp_path, server.url)
        assert len(server.requests) == 6 + 3
    assert len(records) == 6 and all(record["score"] == 1.0 for record in records)


def test_at_most_so_many_at_once(tmp_path: Path) -> None:
    with chat_endpoint() as server:
        server.pause = 0.05
        evaluated(tmp_path, server.url, concurrency=2)
        assert server.most_under_way == 2


@pytest.mark.parametrize(("event", "message"), [(400, "refused.*this is a 400"), (500, "failed 3 times")])
def test_failures_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: int, message: str
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoint, "ATTEMPTS", 3)
    with chat_endpoint() as server:
        server.always = event
        with pytest.raises(VideoR1Error, match=message):
            evaluated(tmp_path, server.url)
        server.always = None
        assert len(evaluated(tmp_path, server.url)) == 6  # started again, it continues


def test_a_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(tmp_path, count=1)
    with chat_endpoint() as server:
        settings = AskSettings(
            path=str(tmp_path / "clip.mp4"), question=["Question 1: where?"], options=["left", "right"],
            engine=server.url, **SIZES,
        )  # fmt: skip
        assert ask.run_ask(settings) == "B. right"
    assert "In question 1" in capsys.readouterr().out


def test_prompts_promise_what_they_can_do() -> None:
    prompts = TextPrompts()
    assert {name for name in dir(prompts) if name[0] != "_"} == {"template", "tokenizer", "question", "build"}
    sample = Sample("q", "Where?", "video", "free-form", "<answer>left</answer>", "clip.mp4")
    media = Media(
        torch.tensor([0, 255], dtype=torch.uint8).expand(3, 28, 28, 2).permute(3, 0, 1, 2),
        torch.tensor([0.0, 0.5]),
        1.0,
        "video",
    )
    prompt = prompts.build(sample, media, torch.tensor([1, 0]))
    assert prompt.media.frames.equal(media.frames.flip(0)) and len(prompt.input_ids) == 0
    assert prompt.messages[0]["content"][1]["text"] == prompts.question(sample)


def test_it_cannot_be_trained_with() -> None:
    with chat_endpoint() as server:
        engine = open_engine(EvalSettings(engine=server.url, **SIZES), None)
        with pytest.raises(VideoR1Error, match="cannot sample for training"):
            engine.update_weights(torch.nn.Linear(1, 1))
        with pytest.raises(ConfigError, match="serves teacher, not other"):
            open_engine(EvalSettings(engine=server.url, **{**SIZES, "model": "other"}), None)


@pytest.mark.parametrize(("engine", "expected"), [
    ("http://host:8000", False), ("http://host:8000/", False), ("http://host:8000/v1", True),
    ("https://host/api/v1/", True), ("vllm", False), ("transformers", False),
])  # fmt: skip
def test_an_address_with_a_path_is_an_endpoint(engine: str, expected: bool) -> None:
    assert is_endpoint(engine) == expected
