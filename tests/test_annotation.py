"""Whole annotations: the files, the requests, and an endpoint that fails in every way."""

from __future__ import annotations

import json
import resource
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_endpoint import (
    ChatEndpoint,
    annotate,
    chat_endpoint,
    files,
    images_of,
    lines,
    rationale,
    wait_for,
    write_questions,
)

from video_r1 import chat_client as client
from video_r1.annotation import teachers
from video_r1.annotation.teachers import sample_seed
from video_r1.data import reading
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import ConfigError, VideoR1Error


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with chat_endpoint() as served:
        yield served


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.01)


# ---- What is written


def test_rows_are_the_manifests_with_rationales(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 4, clips=2)
    out = tmp_path / "new" / "cot.json"
    counts = annotate(endpoint.url, manifest, out)
    assert counts.questions == {"kept": 4}
    before = json.loads(manifest.read_text())
    rows = json.loads(out.read_text())
    for row, old in zip(rows, before, strict=True):
        number = int(row["problem_id"][1:])
        seed = sample_seed(42, row["problem_id"])
        assert row["process"] == f"<think>{rationale(number, seed, 0)}</think>"
        assert row["annotation"] == {"answer": "B", "score": 1.0, "passed": 1, "samples": 1}
        assert {**old, "path": old["path"].removeprefix("./")} == {name: row[name] for name in old}
    assert all(sample.process for sample in load_manifest(out, tmp_path))
    assert files(out.parent) == {"cot.json", "cot.rejected.jsonl", "cot.journal.jsonl"}
    assert (out.parent / "cot.rejected.jsonl").read_text() == ""


def test_rejected_ones_stand_beside_with_the_reason(
    endpoint: ChatEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_questions(tmp_path, 7, bad=(5,))
    endpoint.script |= {1: ["wrong"], 2: ["length"], 3: ["bare"], 6: [400]}
    out = tmp_path / "cot.jsonl"
    counts = annotate(endpoint.url, manifest, out)
    assert [row["problem_id"] for row in lines(out)] == ["q0", "q4"]
    rejected = {row["problem_id"]: row for row in lines(tmp_path / "cot.rejected.jsonl")}
    reasons = {name: row["reason"] for name, row in rejected.items()}
    assert reasons == {"q1": "score", "q2": "cut off", "q3": "tags", "q5": "media", "q6": "endpoint"}
    assert rejected["q1"]["rationales"][0]["answer"] == "A"
    assert rejected["q1"]["rationales"][0]["detail"] == "its answer 'A' scores 0.00"
    assert "broken.mp4" in rejected["q5"]["detail"]
    assert "HTTP 400" in rejected["q6"]["detail"] and "this is a 400" in rejected["q6"]["detail"]
    assert counts.questions == Counter(reasons.values()) + Counter(kept=2)
    table = capsys.readouterr().out
    for line in ("kept 2 28.6% 2", "score 1 14.3% 1", "majority 0 0.0% 0", "not asked: media 1 14.3%",
                 "not answered 1 14.3%", "all 7 5"):  # fmt: skip
        assert line in [" ".join(row.split()) for row in table.splitlines()]


def test_k_samples_are_drawn_with_their_own_seeds(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 2)
    endpoint.script[1] = ["one", "one"]  # one at a time at first: it is asked for the others
    counts = annotate(endpoint.url, manifest, tmp_path / "cot.json", samples=4)
    assert counts.rationales == {"kept": 8}
    asked = [(r["n"], r["seed"]) for r in endpoint.requests if "Question 1:" in json.dumps(r)]
    assert asked == [(4 - draw, sample_seed(42, "q1", draw)) for draw in (0, 1, 2)]
    entries = {entry["problem_id"]: entry for entry in lines(tmp_path / "cot.journal.jsonl")[1:]}
    texts = [completion["text"] for completion in entries["q1"]["completions"]]
    seeds = [sample_seed(42, "q1", draw) for draw in (0, 1, 2, 2)]
    expected = [rationale(1, seed, index) for seed, index in zip(seeds, (0, 0, 0, 1), strict=True)]
    assert [text[len("<think>") :].partition("</think>")[0] for text in texts] == expected


# ---- What is sent


@pytest.mark.parametrize(("owner", "frames_as", "media"), [
    ("tests", "auto", ["image_url data:image/jpeg;base64 1"] * 4),
    ("vllm", "auto", ["video_url data:video/jpeg;base64 4"]),
    ("vllm", "images", ["image_url data:image/jpeg;base64 1"] * 4),
    ("vllm without video", "auto", ["image_url data:image/jpeg;base64 1"] * 4),
])  # fmt: skip
def test_a_request(tmp_path: Path, owner: str, frames_as: str, media: list[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    fields = {"max_tokens": None, "max_completion_tokens": 77, "user": "me"}
    changes = {"frames_as": frames_as, "key_variable": "MY_KEY", "request_fields": fields, "temperature": 0.5}
    manifest = write_questions(tmp_path, 2)
    with chat_endpoint(owner=owner.split()[0]) as served:
        served.takes_video = owner != "vllm without video"
        annotate(served.url, manifest, tmp_path / "cot.json", top_p=0.9, concurrency=1, **changes)
    clip, image = served.requests
    assert images_of(clip) == media
    assert images_of(image) == ["image_url data:image/jpeg;base64 1"]
    assert "Question 0: which way" in clip["messages"][0]["content"][-1]["text"]
    assert "A. left" in clip["messages"][0]["content"][-1]["text"]
    sent = {name: clip[name] for name in clip.keys() - {"messages", "seed", "media_io_kwargs"}}
    assert sent == {"model": "teacher", "n": 1, "temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 77,
                    "user": "me"}  # fmt: skip
    assert served.headers[0]["Authorization"] == "Bearer secret"
    if media[0].startswith("video"):  # 8 frames at 4 fps: 2 s, of which 4 are taken
        video = clip["media_io_kwargs"]["video"]
        assert video == {"num_frames": -1, "fps": 1000.0, "frames_indices": [0, 500, 1250, 1750],
                         "total_num_frames": 2000, "duration": 2.0}  # fmt: skip
    else:
        texts = [part["text"] for part in clip["messages"][0]["content"] if part["type"] == "text"]
        shown = "4 frames of a video of 2.0 seconds, in order:"
        assert texts[:-1] == [shown, "0.0 s", "0.5 s", "1.2 s", "1.8 s"]


def test_a_video_for_an_endpoint_that_takes_none(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    endpoint.takes_video = False
    with pytest.raises(ConfigError, match="start vLLM with --trust-request-mm-kwargs"):
        annotate(endpoint.url, write_questions(tmp_path, 1), tmp_path / "cot.json", frames_as="video")


# ---- An endpoint that fails


@pytest.mark.parametrize("event", [503, "busy", "garbage", "drop", "slow", "abort"])
def test_failures_that_pass_leave_no_trace(endpoint: ChatEndpoint, tmp_path: Path, event: Any) -> None:
    manifest = write_questions(tmp_path, 5)
    for number in (0, 2, 3):
        endpoint.script[number] = [event] * (number + 1)
    counts = annotate(endpoint.url, manifest, tmp_path / "cot.json", concurrency=3)
    assert counts.questions == {"kept": 5}
    assert len(endpoint.requests) == (5 if event == "slow" else 5 + 1 + 3 + 4)
    assert {request["seed"] for request in endpoint.requests} == {sample_seed(42, f"q{n}") for n in range(5)}
    entries = [entry["problem_id"] for entry in lines(tmp_path / "cot.journal.jsonl")[1:]]
    assert sorted(entries) == [f"q{number}" for number in range(5)]  # each once


def test_a_pause_that_the_endpoint_asks_for_costs_no_attempt(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    endpoint.script[0] = ["busy"] * (client.ATTEMPTS + 4)
    assert annotate(endpoint.url, write_questions(tmp_path, 1), tmp_path / "cot.json").questions == {
        "kept": 1
    }


def test_a_question_that_always_fails_is_given_up_and_asked_again_next_time(
    endpoint: ChatEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, out = write_questions(tmp_path, 4), tmp_path / "cot.json"
    endpoint.script[2] = [500] * 100
    assert annotate(endpoint.url, manifest, out).questions == {"kept": 3, "endpoint": 1}
    assert len(endpoint.requests) == 3 + client.ATTEMPTS
    assert "1 questions were not answered; run the same command to ask again" in capsys.readouterr().out
    endpoint.script.clear()
    endpoint.requests.clear()
    assert annotate(endpoint.url, manifest, out).questions == {"kept": 4}
    assert len(endpoint.requests) == 1


def test_a_refusal_that_meets_all_requests_stops_at_once(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    endpoint.always = 401
    with pytest.raises(VideoR1Error, match="refuses all requests: HTTP 401"):
        annotate(endpoint.url, write_questions(tmp_path, 30), tmp_path / "cot.json", concurrency=2)
    assert len(endpoint.requests) <= 4
    assert not (tmp_path / "cot.json").exists()


def test_an_endpoint_that_fails_at_everything_stops_the_run(
    endpoint: ChatEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "FAILED_IN_A_ROW", 6)
    endpoint.always = 422
    manifest, out = write_questions(tmp_path, 40), tmp_path / "cot.json"
    with pytest.raises(VideoR1Error, match=r"questions in a row were not answered.*this is a 422"):
        annotate(endpoint.url, manifest, out, concurrency=2)
    assert len(endpoint.requests) < 40
    endpoint.always = None
    assert annotate(endpoint.url, manifest, out).questions == {"kept": 40}


def test_an_endpoint_that_goes_away(tmp_path: Path) -> None:
    manifest, out = write_questions(tmp_path, 30), tmp_path / "cot.json"
    with chat_endpoint() as first:
        first.pause = 0.01
        closing = threading.Thread(target=lambda: (wait_for(first, 8), first.close()))
        closing.start()
        with pytest.raises(VideoR1Error, match=r"has not answered for 0.3 s.*continues"):
            annotate(first.url, manifest, out, concurrency=2, wait=0.3, model="teacher")
        closing.join()
    done = len(lines(tmp_path / "cot.journal.jsonl")) - 1
    assert 8 <= done < 30
    with chat_endpoint() as second:  # the same model at another address
        assert annotate(second.url, manifest, out, model="teacher").questions == {"kept": 30}
        assert len(second.requests) == 30 - done


@pytest.mark.parametrize(("changes", "said"), [
    ({"model": "other"}, "serves teacher, not other"),
    ({"teacher": "http://127.0.0.1:9", "wait": 0.1}, "no endpoint answered within 0.1 s"),
])  # fmt: skip
def test_no_such_endpoint(
    endpoint: ChatEndpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(ConfigError, match=said):
        annotate(
            changes.pop("teacher", endpoint.url), write_questions(tmp_path, 1), tmp_path / "c.json", **changes
        )
    assert caplog.text.count("waiting up to 0.1 s for it") == ("wait" in changes)  # said at once, and once


def test_a_service_without_a_list_of_models_has_to_be_told_the_name(
    endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    endpoint.listed = False
    manifest = write_questions(tmp_path, 1)
    with pytest.raises(ConfigError, match="--model"):
        annotate(endpoint.url, manifest, tmp_path / "cot.json")
    assert annotate(endpoint.url, manifest, tmp_path / "cot.json", model="gpt").questions == {"kept": 1}
    assert endpoint.requests[0]["model"] == "gpt"


# ---- Many at once


@pytest.mark.slow
def test_many_requests_wait_with_the_frames_of_a_few_in_memory(
    endpoint: ChatEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, held, others = 150, 4, set(threading.enumerate())
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, decoders, threads = 0, set(), set()
    read = reading.read_media_at

    def counted(*arguments: Any) -> Any:
        nonlocal most
        (media,) = read(*arguments)
        alive.add(media.frames)
        decoders.add(threading.get_ident())
        threads.update(one for one in threading.enumerate() if "process_request" not in one.name)
        most = max(most, len(alive))
        return [media]

    monkeypatch.setattr(reading, "read_media_at", counted)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The endpoint's ends are open here too.
    monkeypatch.setattr(client, "OTHER_FILES", at_once + 150)
    resource.setrlimit(resource.RLIMIT_NOFILE, (at_once, before[1]))
    endpoint.gate = at_once  # the first answer is given when so many wait for theirs
    manifest = write_questions(tmp_path, 2 * at_once, clips=20)
    try:
        counts = annotate(
            endpoint.url, manifest, tmp_path / "cot.json", concurrency=at_once, workers=held // 2
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert counts.questions == {"kept": 2 * at_once}
    assert endpoint.most_under_way == at_once
    assert 1 <= most <= held
    assert len(decoders) <= held
    # No thread waits for an answer: besides those that decode there are the event loop and its resolvers.
    assert len([one for one in threads - others if not one.name.startswith("asyncio_")]) <= held + 1
    assert len(threads - others) < at_once / 5
