"""A judge behind an endpoint: what it is asked, what is remembered, and what happens while it is away."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from judge_endpoint import JudgeEndpoint, free_form_manifest, score
from resume_runs import comparable
from tgrpo_trainers import make_trainer
from tiny_questions import read_lines
from torch.multiprocessing.spawn import spawn

from video_r1 import chat_client as client
from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Question
from video_r1.data.rollouts import Rollout, Rollouts
from video_r1.data.scores import correctness
from video_r1.errors import ConfigError, VideoR1Error
from video_r1.processes import Interrupted
from video_r1.rewards import judge as judge_module
from video_r1.rewards.judge import (
    Judge,
    JudgeAway,
    judge_question,
    load_judge_template,
    read_score,
    recorded_scores,
)
from video_r1.rewards.scoring import reward_terms
from video_r1.settings.training import JudgeSettings, TGRPOSettings
from video_r1.training import step
from video_r1.training.metrics import Meter
from video_r1.training.tgrpo import TGRPOTrainer


@pytest.fixture
def endpoint() -> Iterator[JudgeEndpoint]:
    served = JudgeEndpoint()
    yield served
    served.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.001)
    monkeypatch.setattr(judge_module, "RETRY_SECONDS", 0.2)


def group(*answers: str, kind: Any = "free-form", number: int = 1) -> Any:
    """What a judge sees of a group: completions with these answers, "" for one without tags."""
    sample = Sample(number, "Which way?", "video", kind, "<answer>it moves right</answer>", "/a.mp4")
    texts = [f"<think>so</think><answer>{answer}</answer>" if answer else "so" for answer in answers]
    none = torch.zeros(0)
    return SimpleNamespace(sample=sample, rollouts=[Rollout(none, none, text, "stop") for text in texts])


def open_judge(
    endpoint: JudgeEndpoint, folder: Path, stopped: Callable[[], bool] = lambda: False, **changes: Any
) -> Judge:
    settings = TGRPOSettings(**{"judge_endpoint": endpoint.url, "judge_wait": 0.2, **changes}).judge
    judge = Judge(settings, folder, Meter(), stopped)
    judge.open()
    return judge


def test_scores_of_groups(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    judge = open_judge(endpoint, tmp_path, judge_fields={"max_tokens": None, "top_k": 1})
    scores = judge([group("right", "left", "", "right"), group("B", kind="multiple choice")])
    assert scores[0].tolist() == pytest.approx([score("right"), score("left"), 0.0, score("right")])
    assert scores[1].isnan().all() and [len(one) for one in scores] == [4, 1]
    assert sorted(endpoint.asked()) == ["left", "right"]  # each once; none without an answer
    request = endpoint.requests[-1]
    assert (request["model"], request["temperature"], request["top_k"]) == ("judge", 0, 1)
    assert "max_tokens" not in request
    text = request["messages"][0]["content"]
    assert "<question>\nWhich way?\n</question>" in text and "\nit moves right\n</right_answer>" in text
    series = judge.meter.drain()
    assert (series["judge/remembered"], series["judge/unread"], series["judge/skipped"]) == (0, 0, 0)


def test_what_it_said_is_remembered_beside_the_run(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    first = open_judge(endpoint, tmp_path)([group("right", "left")])
    with (tmp_path / "judge.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')  # as a killed run leaves it
    asked = len(endpoint.requests)
    judge = open_judge(endpoint, tmp_path)
    again = judge([group("left", "right", "up")])
    assert again[0].tolist()[:2] == first[0].tolist()[::-1]
    assert len(endpoint.requests) == asked + 2 and endpoint.asked()[-1] == "up"  # and the trial
    assert judge.meter.drain()["judge/remembered"] == pytest.approx(2 / 3)
    assert len(recorded_scores([tmp_path / "judge.jsonl"])) == 3
    line = read_lines_leniently(tmp_path / "judge.jsonl")[-1]
    assert (line["answer"], line["score"], line["problem_id"]) == ("up", score("up"), 1)
    other = open_judge(endpoint, tmp_path, judge_fields={"top_k": 1})  # another judge, in effect
    other([group("left")])
    assert endpoint.asked()[-1] == "left" and len(endpoint.asked()) == 4


def read_lines_leniently(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@pytest.mark.parametrize("said", ["Score: 1", "<think>1"])
def test_a_reply_that_is_no_number_leaves_the_group_out(
    endpoint: JudgeEndpoint, tmp_path: Path, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.said["left"] = said
    judge = open_judge(endpoint, tmp_path)
    with caplog.at_level(logging.WARNING):
        scores = judge([group("right", "left"), group("right", "up", number=2)])
    assert scores[0].isnan().all() and not scores[1].isnan().any()
    assert endpoint.asked().count("left") == 1  # it is no failure that passes
    series = judge.meter.drain()
    assert series["judge/unread"] == pytest.approx(1 / 3) and series["judge/skipped"] == 0.5
    assert f"said {said!r}" in caplog.text and "its group is not judged" in caplog.text
    assert {line["answer"] for line in read_lines(tmp_path / "judge.jsonl")} == {"right", "up"}
    endpoint.said.clear()
    assert not judge([group("right", "left")])[0].isnan().any()


def test_wait_goes_on_when_it_is_back(
    endpoint: JudgeEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = open_judge(endpoint, tmp_path)
    endpoint.away = True
    found: list[torch.Tensor] = []
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=lambda: found.extend(judge([group("left", "right")])))
        thread.start()
        wait_until(lambda: "waiting for it (Ctrl-C" in caplog.text)
        assert not found
        endpoint.away = False
        thread.join(30)
        assert found[0].tolist() == pytest.approx([score("left"), score("right")])
    assert caplog.text.count("waiting for it (Ctrl-C") == 1 and "is back" in caplog.text


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_judge_that_accepts_requests_and_does_not_answer(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    judge = open_judge(endpoint, tmp_path, judge_down="stop", judge_timeout=0.5)
    endpoint.pause = 60
    with pytest.raises(JudgeAway, match=r"had given no answer after 0\.7 s; .*judge_timeout"):
        judge([group("left")])
    assert len(endpoint.asked()) <= 2


@pytest.mark.parametrize("down", ["wait", "stop"])
def test_a_run_that_is_told_to_stop_does_not_wait_for_an_answer(
    endpoint: JudgeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, down: str
) -> None:
    """Unless it comes at once; what a step learns is not changed by it."""
    told = threading.Event()
    judge = open_judge(endpoint, tmp_path, told.is_set, judge_down=down)
    told.set()
    assert judge([group("left")])[0].tolist() == [pytest.approx(score("left"))]
    told.clear()
    monkeypatch.setattr(judge_module, "LAST_SECONDS", 0.2)
    endpoint.pause = 60
    threading.Timer(0.5, told.set).start()
    with pytest.raises(JudgeAway, match=r"no answer after 0\.2 s"):
        judge([group("right")])
    assert endpoint.asked() == ["left", "right"]


def test_skip_leaves_groups_out_until_it_is_back(
    endpoint: JudgeEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = open_judge(endpoint, tmp_path, judge_down="skip")
    judge([group("left")])
    endpoint.away = True
    with caplog.at_level(logging.WARNING):
        scores = judge([group("left", "right"), group("left", number=2), group("", number=3)])
        assert scores[0].isnan().all()  # "left" is known, but "right" is not: the group is not judged
        assert (scores[1].tolist(), scores[2].tolist()) == ([pytest.approx(score("left"))], [0.0])
        assert judge.meter.drain()["judge/skipped"] == pytest.approx(1 / 4)
        began = time.monotonic()
        assert judge([group("up")])[0].isnan().all()
        assert time.monotonic() - began < 0.15  # it is looked for once, not waited for again
        endpoint.away = False
        assert not judge([group("left", "right")])[0].isnan().any()
    assert caplog.text.count("learn from the other rewards alone") == 1 and "is back" in caplog.text


@pytest.mark.parametrize("down", ["wait", "stop"])
def test_a_refused_key_stops_at_once(endpoint: JudgeEndpoint, tmp_path: Path, down: str) -> None:
    judge = open_judge(endpoint, tmp_path, judge_down=down)
    endpoint.said["left"] = 401
    with pytest.raises(JudgeAway, match="refuses all requests: HTTP 401"):
        judge([group("left")])


# ---- Before the first step


def test_no_endpoint_is_said_before_the_first_step(tmp_path: Path, endpoint: JudgeEndpoint) -> None:
    endpoint.close()
    with pytest.raises(ConfigError, match=r"no endpoint answered within 0.2 s"):
        open_judge(endpoint, tmp_path)


def test_a_judge_that_gives_no_number_is_said_before_the_first_step(
    endpoint: JudgeEndpoint, tmp_path: Path
) -> None:
    endpoint.said["It has 4 legs."] = "Yes, it has."
    with pytest.raises(
        ConfigError,
        match=r"was asked once before the first step and said 'Yes, it has.', no number.*judge_template",
    ):
        open_judge(endpoint, tmp_path)


@pytest.mark.parametrize(("changes", "text"), [
    ({"reward_funcs": ["judge"]}, "judge_endpoint.*is missing"),
    ({"judge_endpoint": "localhost:8000"}, "judge_endpoint.*http://"),
    ({"judge_down": "perhaps"}, "judge_down"),
    ({"judge_use": "accuracy"}, "judge_use.*judge_endpoint is not set"),
])  # fmt: skip
def test_settings_that_contradict(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TGRPOSettings(**changes)


def test_terms_of_the_settings() -> None:
    url = "http://localhost:1/v1"
    assert reward_terms(None, TGRPOSettings(judge=JudgeSettings(endpoint=url))).names[-1] == "judge"
    named = TGRPOSettings(judge=JudgeSettings(endpoint=url), reward_funcs=["judge"], temporal_rule="off")
    assert reward_terms(None, named).names == ("judge",)
    assert "judge" not in reward_terms(None, TGRPOSettings()).names
    with pytest.raises(ConfigError, match="to the trainer and in its settings"):
        reward_terms(["format"], named)
    with pytest.raises(ConfigError, match="judge_endpoint is not set"):
        reward_terms(["judge"], TGRPOSettings())
    with pytest.raises(ConfigError, match="does not name 'judge'"):
        reward_terms(["format"], TGRPOSettings(judge=JudgeSettings(endpoint=url)))
    in_place = TGRPOSettings(judge=JudgeSettings(endpoint=url, use="accuracy"))
    assert "judge" not in reward_terms(None, in_place).names
    with pytest.raises(ConfigError, match="or judge_use is accuracy"):
        reward_terms(["judge"], in_place)


def test_templates(tmp_path: Path) -> None:
    path = tmp_path / "judge.txt"
    path.write_text('{"q": "{question}", "t": "{truth}", "a": "{answer}"} {else}\n')
    text = judge_question(load_judge_template(path), "Why?", " {answer} ", "so {truth}")
    assert text == '{"q": "Why?", "t": "{answer}", "a": "so {truth}"} {else}'
    path.write_text("Is it {truth}?")
    with pytest.raises(ConfigError, match=r"\{answer\} is missing"):
        load_judge_template(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_judge_template(tmp_path / "none.txt")


def test_read_score() -> None:
    said = ["0", "1", "1.0", " 0.25\n", "<think>0.1</think>0.7", ".5", "1.01", "0.5.", "**1**", "0,5"]
    assert [read_score(text) for text in said] == [0, 1, 1, 0.25, 0.7, None, None, None, None, None]


# ---- In place of ROUGE


@pytest.mark.parametrize("said", [None, "no number"])
def test_the_judge_says_what_is_correct(endpoint: JudgeEndpoint, tmp_path: Path, said: str | None) -> None:
    """In order and of the contrast clip; where one has no score, all answers of the question have ROUGE's."""
    settings = TGRPOSettings(
        judge=JudgeSettings(endpoint=endpoint.url, use="accuracy", wait=0.2), temporal_rule="margin"
    )
    answers = {"rolls right": 0.9, "it moves left": 0.1, "goes right": 0.8, "it moves right": 0.2}
    endpoint.said |= {answer: str(score) for answer, score in answers.items()}
    if said is not None:
        endpoint.said["goes right"] = said
    judge = Judge(settings.judge, tmp_path, Meter(), lambda: False)
    judge.open()
    own, choice = group(*answers), group("B", "A", kind="multiple choice", number=2)
    questions = [Question(one.sample, cast(Any, None), None, 0) for one in (own, choice)]
    free, chosen = step.score(
        [Rollouts(questions[0], own.rollouts[:2], own.rollouts[2:]), Rollouts(questions[1], choice.rollouts)],
        reward_terms(None, settings), settings, lambda sample: "", judge,
    )  # fmt: skip
    expected = list(answers.values())
    if said is not None:
        expected = [correctness("free-form", answer, "it moves right") for answer in answers]
        assert expected[1] > 0.5  # ROUGE takes left for right
    found = [*free.terms["accuracy"].tolist(), *free.contrast_terms["accuracy"].tolist()]
    assert found == pytest.approx(expected) and "judge" not in free.terms
    assert (free.correct.p, free.correct.p_contrast) == (0.5, 0.5)
    assert sorted(endpoint.asked()) == sorted(answers)  # each once, none of the other question
    assert chosen.terms["accuracy"].tolist() == [0.0, 0.0]


# ---- Whole runs


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(judge_module, "extract_answer", str.strip)  # random weights give none in tags
    (tmp_path / "data").mkdir()
    return free_form_manifest(tmp_path / "data")


def judged_run(
    checkpoint: Path, questions: Path, folder: Path, endpoint: JudgeEndpoint, **changes: Any
) -> TGRPOTrainer:
    defaults = {"judge_endpoint": endpoint.url, "judge_wait": 0.2, "temporal_rule": "off", "max_steps": 4}
    defaults |= {"reward_funcs": ["format", "judge"], "save_strategy": "steps", "save_steps": 10}
    return make_trainer(checkpoint, str(questions), folder, None, **{**defaults, **changes})


def run(checkpoint: Path, questions: Path, folder: Path, endpoint: JudgeEndpoint, **changes: Any) -> None:
    judged_run(checkpoint, questions, folder, endpoint, **changes).train()


def same(one: Path, other: Path) -> None:
    assert comparable(one, "judge/") == comparable(other, "judge/")
    assert read_lines(one / "rollouts.jsonl") == read_lines(other / "rollouts.jsonl")
    name = "model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
def test_stop_is_continued_exactly(
    checkpoint: Path, questions: Path, tmp_path: Path, endpoint: JudgeEndpoint
) -> None:
    run(checkpoint, questions, tmp_path / "whole", endpoint)
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert all(line["reward/judge"] > 0 and line["reward_std/judge"] > 0 for line in lines)
    assert lines[0]["reward/total"] == pytest.approx(lines[0]["reward/judge"])
    asked = endpoint.asked()
    assert len(set(asked)) > 24

    stopped = tmp_path / "stopped"
    endpoint.away_after = len(asked) + 30  # of 48: within the third step of four
    with pytest.raises(
        VideoR1Error, match=r"before step 3 and is saved \(checkpoint-2\).*start the same command"
    ):
        run(checkpoint, questions, stopped, endpoint, judge_down="stop", judge_concurrency=1)
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-2"]
    endpoint.away, endpoint.away_after = False, None
    run(checkpoint, questions, stopped, endpoint, judge_down="wait")
    same(stopped, tmp_path / "whole")
    asked = endpoint.asked()[len(asked) :]
    assert len(set(asked)) == len(asked)  # no answer twice, before and after


def test_a_run_that_waits_can_be_stopped(
    checkpoint: Path, questions: Path, tmp_path: Path, endpoint: JudgeEndpoint
) -> None:
    endpoint.away_after = 18  # of 12 a step: in the second one
    trainer = judged_run(checkpoint, questions, tmp_path / "run", endpoint)

    def stop() -> None:
        wait_until(lambda: trainer.judge is not None and trainer.judge.is_away, 120)
        trainer.stop.number = signal.SIGTERM

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted, match="checkpoint-1 is the last checkpoint"):
        trainer.train()
    thread.join()


def one_of_two(rank: int, folder: str, url: str) -> None:
    """Judge one answer on rank 0, none on rank 1, and write the scores to a file."""
    client.PAUSE, judge_module.RETRY_SECONDS = 0.01, 0.2
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    settings = JudgeSettings(endpoint=url, wait=0.2)
    judge = Judge(settings, Path(folder), Meter(), lambda: False)
    judge.open()
    began = time.monotonic()
    found = [scores.tolist() for scores in judge([group("left")] if rank == 0 else [])]
    record = {"found": found, "seconds": time.monotonic() - began}
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


@pytest.mark.dist
@pytest.mark.slow
def test_processes_wait_together(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    endpoint.away_after = 0

    def come_back() -> None:
        wait_until(lambda: endpoint.away, 120)
        time.sleep(1.5)
        endpoint.away, endpoint.away_after = False, None

    threading.Thread(target=come_back, daemon=True).start()
    spawn(one_of_two, (str(tmp_path), endpoint.url), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["found"], second["found"]) == ([[pytest.approx(score("left"))]], [])
    assert min(first["seconds"], second["seconds"]) > 1
