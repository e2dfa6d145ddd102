"""Annotations that are interrupted, continued, filtered again or refused; the journal; the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from chat_endpoint import (
    SMALL,
    ChatEndpoint,
    annotate,
    chat_endpoint,
    wait_for,
    write_questions,
)

from video_r1.annotation.annotate import Journal, drawing
from video_r1.cli import main
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import RequestError, VideoR1Error
from video_r1.settings.decoding import AnnotateSettings


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with chat_endpoint() as served:
        yield served


# ---- Interrupted and continued


def in_a_process(url: str, manifest: Path, out: Path) -> subprocess.Popen[str]:
    words = ["annotate", str(manifest), "--teacher", url, "--out", str(out), "--concurrency", "4"]
    words += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "video_r1", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_continues_to_the_same_files(
    endpoint: ChatEndpoint, tmp_path: Path, signal_: signal.Signals
) -> None:
    manifest = write_questions(tmp_path, 36, clips=3, bad=(7,))
    endpoint.script |= {5: ["wrong"], 11: ["bare"], 30: ["wrong"]}
    events = {number: list(script) for number, script in endpoint.script.items()}
    whole, out = tmp_path / "whole.json", tmp_path / "cot.json"
    annotate(endpoint.url, manifest, whole, concurrency=4)

    endpoint.requests.clear()
    endpoint.script |= {number: script * 9 for number, script in events.items()}
    endpoint.answered, endpoint.pause = 0, 0.1  # two thirds are still to come when the signal does
    process = in_a_process(endpoint.url, manifest, out)
    wait_for(endpoint, 12)
    process.send_signal(signal_)
    _, errors = process.communicate(timeout=60)
    if signal_ == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command continues with the remaining questions: video-r1 annotate" in errors
        assert "the answers so far are in " in errors and "Traceback" not in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    asked = len(endpoint.requests)
    journal = (tmp_path / "cot.journal.jsonl").read_bytes()
    done = journal.count(b"\n") - 1
    assert 12 - 4 <= done < 36
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


def test_other_settings_are_refused(endpoint: ChatEndpoint, tmp_path: Path) -> None:
    manifest, out = write_questions(tmp_path, 2), tmp_path / "cot.json"
    annotate(endpoint.url, manifest, out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError) as refused:
        annotate(endpoint.url, manifest, out, samples=2, seed=1, request_fields={"a": 1})
    said = "cot.journal.jsonl holds an annotation with other settings: request_fields.a (None → 1), "
    assert f"{said}samples (1 → 2), seed (42 → 1). Continue" in str(refused.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    endpoint.model = "student"
    with pytest.raises(RequestError, match=r"teacher .'teacher' → 'student'"):
        annotate(endpoint.url, manifest, out)
    endpoint.model = "teacher"
    manifest.write_text(manifest.read_text().replace("which way", "whither"))
    with pytest.raises(RequestError, match="manifest"):
        annotate(endpoint.url, manifest, out)


def test_earlier_turns_belong_to_the_fingerprint(tmp_path: Path) -> None:
    settings = AnnotateSettings(manifest="m.json", teacher="http://localhost:1/v1", out="cot.json")
    sample = load_manifest(write_questions(tmp_path, 1))[0]
    asked = {"role": "user", "content": sample.problem}
    chats = [replace(sample, messages=({"role": "system", "content": said}, asked)) for said in ("A", "B")]
    first, again, other = (drawing(settings, [chat])["manifest"] for chat in (chats[0], *chats))
    assert first == again != other


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


@pytest.mark.parametrize("text", ['{"settings": {"seed": 1}}\n[1]\n', '{"problem_id": 1}\n'])
def test_other_files_are_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"line [12] does not belong to an annotation's journal"):
        Journal(path, SETTINGS)
    assert path.read_text() == text


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path, SETTINGS)
    with pytest.raises(RequestError, match="another process"):
        Journal(path, SETTINGS)
    first.close()
    Journal(path, SETTINGS).close()


# ---- The command line


@pytest.mark.parametrize(("words", "said"), [
    (["--out", "cot.txt"], "it must end in .json or .jsonl"),
    (["--out", "cot.json", "--samples", "2", "--temperature", "0"], "all 2 samples would be the same"),
    (["--out", "cot.json", "--teacher", "some/model", "--model", "m"], "model is set while the teacher"),
    (["--out", "cot.json", "--engine", "vllm"], "is set while the teacher is an endpoint"),
])  # fmt: skip
def test_wrong_requests(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = [] if "--teacher" in words else ["--teacher", "http://127.0.0.1:9"]
    assert main(["annotate", "m.json", *teacher, *words]) == 2
    assert said in capsys.readouterr().err.replace("model (option --model)", "model")
