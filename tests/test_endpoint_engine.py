"""Evaluation and questions at an OpenAI-compatible endpoint on loopback."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_endpoint import chat_endpoint, images_of, write_questions
from tiny_questions import read_lines

from video_r1 import chat_client
from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import TextPrompts
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.evaluation import ask
from video_r1.evaluation.evaluate import run_eval
from video_r1.evaluation.session import ModelSession, View, sampling_of
from video_r1.rollout import endpoint_engine
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.engine_factory import is_endpoint, open_engine
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


def test_failures_that_pass_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.01)
    with chat_endpoint() as server:
        server.script[0] = [503, "busy", "garbage", "empty"]
        server.script[2] = ["half", "drop", "abort"]
        records = evaluated(tmp_path, server.url)
        assert len(server.requests) == 6 + 7
    assert len(records) == 6 and all(record["score"] == 1.0 for record in records)


@pytest.mark.parametrize(("event", "message"), [(400, "refused.*this is a 400"), (500, "failed 3 times")])
def test_failures_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: int, message: str
) -> None:
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.01)
    for module in (chat_client, endpoint_engine):
        monkeypatch.setattr(module, "ATTEMPTS", 3)
    with chat_endpoint() as server:
        server.always = event
        with pytest.raises(VideoR1Error, match=message):
            evaluated(tmp_path, server.url)
        server.always = None
        assert len(evaluated(tmp_path, server.url)) == 6  # started again, it continues


def asked_aloud(folder: Path, url: str, samples: int = 2) -> tuple[list[View], list[list[str]]]:
    """The views of question 1 in order and shuffled, and the pieces that were heard of each."""
    write_questions(folder, count=1)
    settings = AskSettings(
        path=str(folder / "clip.mp4"), question=["Question 1: where?"], options=["left", "right"], engine=url,
        samples=samples, **SIZES,
    )  # fmt: skip
    heard: list[list[str]] = [[], []]
    sample = ask.question_sample(settings, "Question 1: where?")
    with closing(ModelSession(settings)) as interview:
        prompts = interview.prompts(sample, ["ordered", "shuffled"])
        sampling = sampling_of(settings)
        return interview.ask(sample, prompts, samples, sampling, lambda i, t: heard[i].append(t)), heard


@pytest.mark.parametrize("event", [None, "apart", "one"])
def test_an_answer_is_heard_as_it_is_written(tmp_path: Path, event: Any) -> None:
    with chat_endpoint() as server:
        server.always = event
        views, heard = asked_aloud(tmp_path, server.url)
        assert all(request["stream"] for request in server.requests)
        assert len(server.requests) == (4 if event == "one" else 2)
    for view, pieces in zip(views, heard, strict=True):
        said = [piece for piece in pieces if piece]
        assert len(said) > 20 and len(pieces) > len(said)  # the second one was noticed as it grew
        assert "".join(said).split() == view.rollouts[0].text.split()
        assert view.rollouts[0].text.startswith("<think>In question 1") and view.answers == ["B", "B"]
        assert view.rollouts[0].text != view.rollouts[1].text
        assert [len(rollout.token_ids) for rollout in view.rollouts] == [20, 20]


@pytest.mark.parametrize("event", ["whole", "unstreamable"])
def test_an_endpoint_that_does_not_stream_is_heard_at_its_end(tmp_path: Path, event: str) -> None:
    with chat_endpoint() as server:
        server.always = event
        views, heard = asked_aloud(tmp_path, server.url)
    assert [pieces for pieces in heard] == [[view.rollouts[0].text] for view in views]


@pytest.mark.parametrize(("event", "message"), [
    ("dies", "broke off after 6 pieces"), ("fails", "the engine is out of memory"),
    ("stalls", "not a word within 0.5 s"), (401, "refused a request"), (503, "failed: HTTP 503"),
])  # fmt: skip
def test_an_endpoint_that_breaks_while_it_writes_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: Any, message: str
) -> None:
    monkeypatch.setitem(SIZES, "timeout", 0.5)
    with chat_endpoint() as server:
        server.always = event
        began = time.monotonic()
        with pytest.raises(VideoR1Error, match=message):
            asked_aloud(tmp_path, server.url)
        assert time.monotonic() - began < 20  # the pause of one that stalls is longer
        assert len(server.requests) <= 2  # nothing is tried again: what was heard cannot be taken back
        server.always = None
        assert asked_aloud(tmp_path, server.url)[0][0].answers == ["B", "B"]


def test_an_answer_that_nobody_hears_any_more_is_given_up(tmp_path: Path) -> None:
    with chat_endpoint() as server:
        server.beat = 0.05
        engine = open_engine(EvalSettings(engine=server.url, **SIZES), None)
        media = Media(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.zeros(1), 0.0, "image")
        sample = Sample("q", "Question 1: where?", "image", "free-form", "<answer>B</answer>", "image.png")
        pieces: list[str] = []

        def hear(prompt: int, completion: int, piece: str) -> None:
            pieces.append(piece)
            if len(pieces) == 3:
                raise KeyError("stop")

        began = time.monotonic()
        generate: Any = engine.generate
        with pytest.raises(KeyError, match="stop"):
            generate([TextPrompts().build(sample, media)], SamplingSettings(max_tokens=64), on_text=hear)
        assert time.monotonic() - began < 1.5 and len(pieces) == 3
        engine.close()


def test_it_cannot_be_trained_with() -> None:
    with chat_endpoint() as server:
        engine = open_engine(EvalSettings(engine=server.url, **SIZES), None)
        with pytest.raises(VideoR1Error, match="cannot sample for training"):
            engine.update_weights(torch.nn.Linear(1, 1))
        with pytest.raises(ConfigError, match="serves teacher, not other"):
            open_engine(EvalSettings(engine=server.url, **{**SIZES, "model": "other"}), None)


@pytest.mark.parametrize(("engine", "expected"), [
    ("http://host:8000/", False), ("https://host/api/v1/", True), ("vllm", False),
])  # fmt: skip
def test_an_address_with_a_path_is_an_endpoint(engine: str, expected: bool) -> None:
    assert is_endpoint(engine) == expected
