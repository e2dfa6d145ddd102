"""Whole annotations against an endpoint that fails, is interrupted, and is asked again."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_endpoint import ChatEndpoint, chat_endpoint, images_of, rationale, write_questions

from video_r1.annotation import endpoint as endpoint_module
from video_r1.annotation.command import run_annotate
from video_r1.annotation.journal import Journal, replaced
from video_r1.annotation.runner import Counts
from video_r1.annotation.settings import AnnotateSettings
from video_r1.annotation.teachers import sample_seed
from video_r1.cli import main
from video_r1.data.records import load_manifest
from video_r1.errors import ConfigError, RequestError, VideoR1Error

SMALL: dict[str, Any] = {
    "frame_pixels": 56 * 56,
    "image_pixels": 56 * 56,
    "max_frames": 4,
    "media_seconds": 0.0,
}


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with chat_endpoint() as served:
        yield served


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 0.01)


def annotate(url: str, manifest: Path, out: Path, **changes: Any) -> Counts:
    settings = {"teacher": url, "manifest": str(manifest), "out": str(out), "wait": 5.0, **SMALL, **changes}
    return run_annotate(AnnotateSettings(**settings))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


def test_nothing_kept_is_a_failure_with_empty_files(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    endpoint.always = "wrong"
    with pytest.raises(VideoR1Error, match="no rationale was kept"):
        annotate(endpoint.url, write_questions(tmp_path, 2), tmp_path / "cot.json")
    assert json.loads((tmp_path / "cot.json").read_text()) == []
    assert len(lines(tmp_path / "cot.rejected.jsonl")) == 2


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
        assert texts[:-1] == [
            "4 frames of a video of 2.0 seconds, in order:",
            "0.0 s",
            "0.5 s",
            "1.2 s",
            "1.8 s",
        ]


def test_a_video_for_an_endpoint_that_takes_none(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    endpoint.takes_video = False
    with pytest.raises(ConfigError, match="start vLLM with --trust-request-mm-kwargs"):
        annotate(endpoint.url, write_questions(tmp_path, 1), tmp_path / "cot.json", frames_as="video")


def test_a_reasoning_that_stands_apart_is_the_rationale() -> None:
    message = {"reasoning_content": " It goes right. ", "content": "\n<answer>B</answer>"}
    (completion,) = endpoint_module.completions_of(
        {"choices": [{"message": message, "finish_reason": "stop"}]}
    )
    assert completion.text == "<think>It goes right.</think>\n<answer>B</answer>"


# ---- An endpoint that fails


@pytest.mark.parametrize(
    "event", [500, 503, 429, 408, "busy", "garbage", "empty", "half", "drop", "slow", "abort"]
)
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


def test_an_answer_that_never_ends_is_given_up(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    endpoint.script[1] = ["trickle"]
    counts = annotate(endpoint.url, write_questions(tmp_path, 3), tmp_path / "cot.json", timeout=0.4)
    assert counts.questions == {"kept": 3}
    assert len(endpoint.requests) == 4


def test_a_pause_that_the_endpoint_asks_for_costs_no_attempt(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    endpoint.script[0] = ["busy"] * (endpoint_module.ATTEMPTS + 4)
    assert annotate(endpoint.url, write_questions(tmp_path, 1), tmp_path / "cot.json").questions == {
        "kept": 1
    }


def test_a_question_that_always_fails_is_given_up_and_asked_again_next_time(
    endpoint: ChatEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, out = write_questions(tmp_path, 4), tmp_path / "cot.json"
    endpoint.script[2] = [500] * 100
    assert annotate(endpoint.url, manifest, out).questions == {"kept": 3, "endpoint": 1}
    assert len(endpoint.requests) == 3 + endpoint_module.ATTEMPTS
    assert "1 questions were not answered; the same command asks them again" in capsys.readouterr().out
    endpoint.script.clear()
    endpoint.requests.clear()
    assert annotate(endpoint.url, manifest, out).questions == {"kept": 4}
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(("status", "said"), [(401, "HTTP 401"), (403, "HTTP 403"), (404, "HTTP 404")])
def test_a_refusal_that_meets_all_requests_stops_at_once(
    endpoint: ChatEndpoint, tmp_path: Path, status: int, said: str
) -> None:
    endpoint.always = status
    with pytest.raises(VideoR1Error, match=f"refuses all requests: {said}"):
        annotate(endpoint.url, write_questions(tmp_path, 30), tmp_path / "cot.json", concurrency=2)
    assert len(endpoint.requests) <= 4
    assert not (tmp_path / "cot.json").exists()


def test_an_endpoint_that_fails_at_everything_stops_the_run(
    endpoint: ChatEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "FAILED_IN_A_ROW", 6)
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


def wait_for(endpoint: ChatEndpoint, answered: int) -> None:
    with endpoint.changed:
        assert endpoint.changed.wait_for(lambda: endpoint.answered >= answered, timeout=60)


@pytest.mark.parametrize(("changes", "said"), [
    ({"model": "other"}, "serves teacher, not other"),
    ({"teacher": "http://127.0.0.1:9", "wait": 0.1}, "no endpoint answered within 0.1 s"),
])  # fmt: skip
def test_no_such_endpoint(endpoint: ChatEndpoint, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        annotate(
            changes.pop("teacher", endpoint.url), write_questions(tmp_path, 1), tmp_path / "c.json", **changes
        )


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


def test_many_requests_wait_with_the_frames_of_a_few_in_memory(
    endpoint: ChatEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, held = 150, 4
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, decoders = 0, set()
    read = endpoint_module.read_cached

    def counted(*arguments: Any) -> Any:
        nonlocal most
        media = read(*arguments)
        alive.add(media.frames)
        decoders.add(threading.get_ident())
        most = max(most, len(alive))
        return media

    monkeypatch.setattr(endpoint_module, "read_cached", counted)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(
        endpoint_module, "OTHER_FILES", at_once + 150
    )  # the endpoint's ends are open here too
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


def test_more_requests_than_the_system_has_files_for(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY:
        pytest.skip("this system sets no limit")
    with pytest.raises(ConfigError, match=rf"this system allows {most}; lower concurrency"):
        annotate(endpoint.url, write_questions(tmp_path, 1), tmp_path / "cot.json", concurrency=most)


# ---- Interrupted and continued


def in_a_process(url: str, manifest: Path, out: Path) -> subprocess.Popen[str]:
    words = ["annotate", str(manifest), "--teacher", url, "--out", str(out), "--concurrency", "4"]
    words += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "video_r1", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_continues_to_the_same_files(
    endpoint: ChatEndpoint, tmp_path: Path, signal_: signal.Signals
) -> None:
    manifest = write_questions(tmp_path, 60, clips=3, bad=(7,))
    endpoint.script |= {5: ["wrong"], 11: ["bare"], 50: ["wrong"]}
    events = {number: list(script) for number, script in endpoint.script.items()}
    whole, out = tmp_path / "whole.json", tmp_path / "cot.json"
    annotate(endpoint.url, manifest, whole, concurrency=4)

    endpoint.requests.clear()
    endpoint.script |= {number: script * 9 for number, script in events.items()}
    endpoint.answered, endpoint.pause = 0, 0.02
    process = in_a_process(endpoint.url, manifest, out)
    wait_for(endpoint, 20)
    process.send_signal(signal_)
    _, errors = process.communicate(timeout=60)
    if signal_ == signal.SIGINT:
        assert process.returncode == 1
        assert "the same command continues" in errors and "Traceback" not in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    asked = len(endpoint.requests)
    journal = (tmp_path / "cot.journal.jsonl").read_bytes()
    done = journal.count(b"\n") - 1
    assert 20 - 4 <= done < 60
    assert asked - done <= 4  # lost: the requests in flight

    endpoint.pause = 0.0
    annotate(endpoint.url, manifest, out, concurrency=4)
    assert (tmp_path / "cot.journal.jsonl").read_bytes().startswith(journal)
    assert out.read_bytes() == whole.read_bytes()
    assert (tmp_path / "cot.rejected.jsonl").read_bytes() == (tmp_path / "whole.rejected.jsonl").read_bytes()


def test_a_finished_annotation_is_filtered_anew_without_asking(
    endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    manifest, out = write_questions(tmp_path, 4), tmp_path / "cot.json"
    annotate(endpoint.url, manifest, out)
    endpoint.requests.clear()
    with pytest.raises(VideoR1Error, match="no rationale was kept"):
        annotate(endpoint.url, manifest, out, length_range=[200, 300])
    assert annotate(endpoint.url, manifest, out).questions == {"kept": 4}
    assert endpoint.requests == []


def test_the_first_questions_and_then_the_others(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    manifest, out = write_questions(tmp_path, 6), tmp_path / "cot.json"
    assert annotate(endpoint.url, manifest, out, limit=2).questions == {"kept": 2}
    assert annotate(endpoint.url, manifest, out).questions == {"kept": 6}
    assert len(endpoint.requests) == 6


@pytest.mark.parametrize(("changes", "said"), [
    ({"samples": 2}, "samples 1 and now 2"),
    ({"temperature": 0.2}, "temperature 0.7 and now 0.2"),
    ({"seed": 1}, "seed 42 and now 1"),
    ({"max_frames": 6}, "max_frames 4 and now 6"),
    ({"request_fields": {"a": 1}}, "request_fields {} and now {'a': 1}"),
])  # fmt: skip
def test_other_settings_are_refused(
    endpoint: ChatEndpoint, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    manifest, out = write_questions(tmp_path, 1), tmp_path / "cot.json"
    annotate(endpoint.url, manifest, out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError) as refused:
        annotate(endpoint.url, manifest, out, **changes)
    assert said in str(refused.value) and "cot.journal.jsonl" in str(refused.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_another_manifest_and_another_model_are_refused(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    manifest, out = write_questions(tmp_path, 2), tmp_path / "cot.json"
    annotate(endpoint.url, manifest, out)
    endpoint.model = "student"
    with pytest.raises(RequestError, match="teacher 'teacher' and now 'student'"):
        annotate(endpoint.url, manifest, out)
    endpoint.model = "teacher"
    manifest.write_text(manifest.read_text().replace("which way", "whither"))
    with pytest.raises(RequestError, match="manifest"):
        annotate(endpoint.url, manifest, out)


def test_no_other_file_is_overwritten(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    manifest = write_questions(tmp_path, 1)
    with pytest.raises(RequestError, match="was not written by an annotation"):
        annotate(endpoint.url, manifest, manifest)
    assert endpoint.requests == []


# ---- The journal


SETTINGS = {"seed": 1}


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS)
    journal.append(
        [{"problem_id": 1, "completions": []}, {"problem_id": "2", "failed": "media", "reason": "r"}]
    )
    journal.close()
    whole = path.read_bytes()
    for cut in (1, 5, len(whole) - whole.rstrip(b"\n").rfind(b"\n") - 2):
        path.write_bytes(whole[:-cut])
        journal = Journal(path, SETTINGS)
        assert journal.is_answered(1) and 2 not in journal
        journal.append([{"problem_id": 2, "completions": [{"text": "ü\ud800", "finish_reason": "stop"}]}])
        assert journal[2]["completions"][0]["text"] == "ü\ud800"
        journal.close()
        journal = Journal(path, SETTINGS)
        assert journal.is_answered(1) and journal.is_answered(2)
        journal.close()
    assert len(path.read_bytes().splitlines()) == 3


def test_a_cut_off_first_line_begins_the_journal_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"settings": {"se')
    Journal(path, SETTINGS).close()
    assert lines(path) == [{"settings": SETTINGS}]


def test_a_later_line_replaces_an_earlier_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", SETTINGS)
    journal.append([{"problem_id": 1, "failed": "endpoint", "reason": "r"}])
    assert 1 in journal and not journal.is_answered(1)
    journal.append([{"problem_id": 1, "completions": []}])
    assert journal.is_answered("1") and journal[1] == {"problem_id": 1, "completions": []}
    journal.close()


@pytest.mark.parametrize("text", ["no json\n", '{"settings": {"seed": 1}}\n[1]\n', '{"problem_id": 1}\n'])
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"line [12] is none of an annotation's journal"):
        Journal(path, SETTINGS)
    assert path.read_text() == text


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path, SETTINGS)
    with pytest.raises(RequestError, match="another process"):
        Journal(path, SETTINGS)
    first.close()
    Journal(path, SETTINGS).close()


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cot.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replaced(path) as file:
        file.write("half a row")
        file.flush()
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and files(tmp_path) == {"cot.json"}
    with replaced(path) as file:
        file.write("new \ud800")
    assert path.read_text() == "new \\ud800"


def test_a_folder_that_cannot_be_written(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        annotate(endpoint.url, write_questions(tmp_path, 1), tmp_path / "file" / "cot.json")


# ---- The command line


@pytest.mark.parametrize(("words", "said"), [
    (["--out", "cot.txt"], "it must end in .json or .jsonl"),
    (["--out", "cot.json", "--samples", "2", "--temperature", "0"], "all 2 samples would be the same"),
    (["--out", "cot.json", "--choose", "majority"], "a majority needs at least 3"),
    (["--out", "cot.json", "--length_range", "9,3"], "two word counts, smaller one first"),
    (["--out", "cot.json", "--threshold", "1"], "threshold (option --threshold) is 1.0"),
    (["--out", "cot.json", "--teacher", "some/model", "--model", "m"], "model is set while the teacher"),
    (["--out", "cot.json", "--engine", "vllm"], "is set while the teacher is an endpoint"),
])  # fmt: skip
def test_wrong_requests(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = [] if "--teacher" in words else ["--teacher", "http://127.0.0.1:9"]
    assert main(["annotate", "m.json", *teacher, *words]) == 2
    assert said in capsys.readouterr().err.replace("model (option --model)", "model")
