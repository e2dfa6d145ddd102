"""Evaluation and annotation by several processes (gloo, CPU): the files of one, also after kill -9."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_process import exit_codes, last_words, start_processes
from tiny_models import tiny_checkpoint
from tiny_questions import write_manifest

from video_r1.errors import ConfigError
from video_r1.rollout import engine_factory

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SIZES = ["--frame_pixels", "3136", "--image_pixels", "3136", "--media_seconds", "0", "--dtype", "float32"]
SAMPLED = ["--temperature", "1", "--top_p", "1", "--max_new_tokens", "4", "--batch_size", "2"]
# As a launcher sets it by its file; every process has to have a whole model all the same.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
Words = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven questions, the fifth about a file that is no clip."""
    folder = tmp_path_factory.mktemp("data")
    tiny_checkpoint("qwen2_5_vl", folder / "model")
    write_manifest(folder, videos=8, images=3, bad=(4,))
    return folder


def evaluation(data: Path) -> Words:
    return lambda out: [
        "eval", str(data / "model"), str(data / "manifest.json"), "--frames", "4,8", "--order",
        "ordered,shuffled", "--out", str(out), *SIZES, *SAMPLED,
    ]  # fmt: skip


def annotation(data: Path) -> Words:
    return lambda out: [
        "annotate", str(data / "manifest.json"), "--teacher", str(data / "model"), "--samples", "2",
        "--length_range", "3,100", "--out", str(out / "cot.json"), *SIZES, *SAMPLED,
    ]  # fmt: skip


def run(
    folder: Path, words: Words, count: int, lives: tuple[int | None, ...] = (), expected: int = 0
) -> list[str]:
    """The command by `count` processes; what each of them printed. `expected`: exit code of those that end
    by themselves."""
    folder.mkdir(exist_ok=True)
    work = "shared_work:command_line"
    processes, logs = start_processes(count, work, folder, words(folder / "out"), lives, environment=FSDP)
    codes = exit_codes(processes, 200)
    wanted = [expected if life is None else -9 for life in (lives or (None,) * count)]
    assert codes == wanted, last_words(logs)
    return [log.read_text() for log in logs]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in (folder / "out").rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def journal(files: dict[str, bytes]) -> list[bytes]:
    """Takes an annotation's journal out: lines that come as answers do, or as parts are taken up, and one for
    each time that a clip could not be read."""
    return sorted(set(files.pop("out/cot.journal.jsonl", b"").splitlines()))


def calls(folder: Path) -> list[str]:
    """The sizes of the engine's calls, whoever made them."""
    return sorted(line.split()[1] for line in (folder / "calls").read_text().splitlines())


def test_two_processes_write_the_files_of_one(data: Path, tmp_path: Path) -> None:
    command = evaluation
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    (expected,) = run(alone, command(data), 1)
    first, second = run(shared, command(data), 2)
    assert contents(shared) == contents(alone)
    assert calls(shared) == calls(alone)
    ranks = [line.split()[0] for line in (shared / "calls").read_text().splitlines()]
    assert abs(ranks.count("0") - ranks.count("1")) <= 2
    said = [line.replace("alone", "shared") for line in expected.splitlines() if "/s" not in line]
    assert len(said) > 5 and [line for line in said if line not in first] == []
    assert "(process 1 of 2): " in first and "(process" not in second
    assert "manifest for SFT" not in second and "predictions and figures" not in second
    # and once more: nothing is left to do
    run(shared, command(data), 3)
    again, whole = contents(shared), contents(alone)
    assert journal(again) == journal(whole)
    assert again == whole and calls(shared) == calls(alone)


def test_a_killed_run_goes_on_with_another_number_of_processes(data: Path, tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    words: Words = lambda out: [*annotation(data)(out), "--batch_size", "1"]  # noqa: E731
    run(alone, words, 1)
    said = run(killed, words, 3, (None, 1, None), expected=1)
    for log in (said[0], said[2]):
        assert "has lost another process of this run" in log and "Traceback" not in log
        assert f"it goes on from the answers in {killed / 'out'}" in log
    parts = {path.name[:6] for path in (killed / "out").rglob("part-*")}
    assert parts == {"part-0", "part-1", "part-2"}
    run(killed, words, 2)
    finished, whole = contents(killed), contents(alone)
    assert journal(finished) == journal(whole)
    assert finished == whole
    assert calls(killed) == calls(alone)  # nothing was asked twice


def test_an_error_is_that_of_all(data: Path, tmp_path: Path) -> None:
    run(tmp_path, evaluation(data), 1)
    other = lambda out: [*evaluation(data)(out), "--seed", "7"]  # noqa: E731
    before = contents(tmp_path)
    for log in run(tmp_path, other, 2, expected=2):
        assert "holds an evaluation with other settings: seed (" in log
    assert contents(tmp_path) == before


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert engine_factory.own_device() == "cuda"
    monkeypatch.setattr(engine_factory, "process_count", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert engine_factory.own_device() == "cuda:1" and chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU: there are 2"):
        engine_factory.own_device()
