"""Whom of several servers a request goes to: by a clock that stands still, and with chat endpoints of which
one is killed."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import annotate, chat_endpoint, wait_for, write_questions
from tiny_questions import read_lines

from video_r1 import chat_client as client
from video_r1.chat_client import Failover, ServerFailure
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.evaluation.evaluate import run_eval
from video_r1.settings.annotation import AnnotateSettings
from video_r1.settings.decoding import EvalSettings, addresses


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(pool: Failover, retry_after: float | None = None) -> str:
    """The address of a request that fails."""
    with pytest.raises(ServerFailure), pool.asking() as address:
        raise ServerFailure("away", retry_after)
    return address.url


def answer(pool: Failover) -> str:
    with pool.asking() as address:
        return address.url


# ---- The rule


def test_the_least_busy_one_is_asked(clock: Clock) -> None:
    pool = Failover(["a", "b", "c"], clock)
    with ExitStack() as under_way:
        first = [under_way.enter_context(pool.asking()).url for _ in range(7)]
        assert sorted(first[:3]) == sorted(first[3:6]) == ["a", "b", "c"]
        short = pool.asking()
        with short as address:
            assert address.url != first[6]
        assert answer(pool) == address.url  # it has one fewer again


def test_one_that_fails_is_left_out_and_tried_by_one_request(clock: Clock) -> None:
    pool = Failover(["a", "b"], clock)
    assert fail(pool) == "a" and pool.any_ready()
    assert {answer(pool) for _ in range(3)} == {"b"}
    clock.now += 1.0
    with pool.asking() as tries, pool.asking() as other:
        assert (tries.url, other.url) == ("a", "b")
        assert answer(pool) == "b"  # busier than a, but a has not answered yet
    assert tries.failures == 0 and answer(pool) == "a"


def test_it_is_left_out_twice_as_long_each_time_until_it_answers(clock: Clock) -> None:
    pool = Failover(["a", "b"], clock)
    for rest in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        assert fail(pool) == "a"
        clock.now += rest - 0.1
        assert answer(pool) == "b"
        clock.now += 0.1
    assert answer(pool) == "a"
    assert fail(pool) == "a"
    clock.now += 1.0
    assert answer(pool) == "a"


def test_requests_that_fail_together_count_once(clock: Clock) -> None:
    pool = Failover(["a", "b"], clock)
    with pytest.raises(ExceptionGroup), ExitStack() as under_way:
        busy = [under_way.enter_context(pool.asking()) for _ in range(8)]
        assert {address.url for address in busy} == {"a", "b"}
        for address in busy:
            pool._failed(address, ServerFailure("away"))
        assert {address.failures for address in busy} == {1}
        raise ExceptionGroup("", [ServerFailure("away")])


def test_when_all_are_left_out_the_one_that_returns_first_is_asked(clock: Clock) -> None:
    pool = Failover(["a", "b"], clock)
    assert fail(pool) == "a"
    clock.now += 0.5
    assert fail(pool) == "b" and not pool.any_ready() and pool.pause() == 0.0
    assert fail(pool) == "a"  # it rests until 101 as before
    pool.is_back("b")
    assert pool.any_ready() and answer(pool) == "b"


def test_a_pause_is_that_of_the_one_who_asks_for_it(clock: Clock) -> None:
    pool = Failover(["a", "b"], clock)
    assert fail(pool, retry_after=60.0) == "a" and pool.pause() == 0.0
    assert fail(pool, retry_after=20.0) == "b" and pool.pause() == 20.0
    clock.now += 20.0
    assert answer(pool) == "b" and pool.pause() == 0.0
    clock.now += 40.0
    assert answer(pool) == "a"


def test_addresses_in_settings() -> None:
    assert addresses("http://a:1/, http://b:2/v1 ,http://a:1") == ("http://a:1", "http://b:2/v1")
    with pytest.raises(ConfigError, match="either all addresses or none"):
        EvalSettings(engine="http://a:1,http://b:2/v1")
    with pytest.raises(ConfigError, match="transformers, vllm or addresses"):
        EvalSettings(engine="http://a:1,vllm")
    with pytest.raises(ConfigError, match="several endpoints"):
        AnnotateSettings(teacher="http://a:1,checkpoint")


# ---- Chat endpoints

SIZES: dict[str, Any] = {"frame_pixels": 56 * 56, "image_pixels": 56 * 56, "model": "teacher"}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def seeds(requests: list[dict[str, Any]]) -> dict[str, set[int]]:
    """Of each question the seeds that it was asked with."""
    found: dict[str, set[int]] = {}
    for request in requests:
        text = request["messages"][0]["content"][-1]["text"]
        found.setdefault(text, set()).add(request["seed"])
    return found


def test_an_annotation_outlives_one_of_its_endpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_questions(tmp_path, 40)
    with chat_endpoint() as alone:
        annotate(alone.url, manifest, tmp_path / "alone.json", concurrency=4)
        expected = seeds(alone.requests)
    with chat_endpoint() as first, chat_endpoint() as second:
        first.pause = second.pause = 0.05

        def kill() -> None:
            wait_for(first, 6)
            with first.changed:
                first.always, asked = "drop", len(first.requests)
                assert first.changed.wait_for(lambda: len(first.requests) > asked, timeout=60)
            first.close()  # the request that came last has no answer

        killing = threading.Thread(target=kill)
        killing.start()
        both = f"{first.url}, {second.url}"
        counts = annotate(both, manifest, tmp_path / "both.json", concurrency=8, wait=60.0)
        killing.join()
        assert counts.questions == {"kept": 40}
        asked_first, asked_second = len(first.requests), len(second.requests)
        assert 6 <= asked_first < 20 and asked_second >= 40 - asked_first
        assert seeds(first.requests).keys() & seeds(second.requests).keys()
        assert seeds(first.requests + second.requests) == expected
    assert (tmp_path / "both.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert f"{first.url}: " in caplog.text and "skipped for 1 s" in caplog.text


def test_an_evaluation_shares_its_requests(tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 8)
    with chat_endpoint() as first, chat_endpoint() as second:
        first.gate = second.gate = 4  # all eight are under way before any is answered
        settings = EvalSettings(
            manifest=str(manifest), engine=f"{first.url},{second.url}", out=str(tmp_path / "out"),
            batch_size=8, **SIZES,
        )  # fmt: skip
        run_eval(settings)
        assert len(first.requests) == len(second.requests) == 4
    assert len(read_lines(tmp_path / "out" / "predictions-16.jsonl")) == 8


def test_all_away_is_waited_for(tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 30)
    with chat_endpoint() as first, chat_endpoint() as second:
        first.pause = second.pause = 0.02

        def kill() -> None:
            wait_for(second, 3)
            first.close()
            second.close()

        killing = threading.Thread(target=kill)
        killing.start()
        with pytest.raises(VideoR1Error, match=r" and http.* has not answered for 0.3 s.*continues"):
            annotate(f"{first.url},{second.url}", manifest, tmp_path / "cot.json", concurrency=4, wait=0.3)
        killing.join()


def test_servers_of_different_models_are_refused(tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 1)
    with chat_endpoint() as first, chat_endpoint(model="student") as second:
        both = f"{first.url},{second.url}"
        with pytest.raises(ConfigError, match=f"{second.url} serves student"):
            annotate(both, manifest, tmp_path / "cot.json")
        with pytest.raises(ConfigError, match=f"{second.url} serves student, not teacher"):
            annotate(both, manifest, tmp_path / "cot.json", model="teacher")
        assert first.requests == second.requests == []
