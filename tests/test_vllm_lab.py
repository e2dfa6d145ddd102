"""The lab's own recipe with vLLM, by the commands of docs/vllm.md: a whole step of sixteen questions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ports import free_port
from test_docs import ROOT, command_lines, request
from tiny_questions import read_lines

from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.settings.commands import LabSettings

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PORT = "8000"  # in the document


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are run: less data than they ask for, and the base in place of the cold start."""
    folder = tmp_path_factory.mktemp("place")
    write_lab(LabSettings(folder=str(folder / "data" / "lab"), train=48, test=1, workers=1))
    shutil.copytree(base_folder(), folder / "runs" / "lab-sft")
    return folder


def documented(*words: str) -> list[str]:
    """The command of docs/vllm.md that has these words."""
    lines = (request(line) for line in command_lines((ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")))
    (found,) = (line for line in lines if line is not None and set(words) <= set(line))
    return [sys.executable, "-m", "video_r1", *found]


def train(command: list[str], place: Path) -> None:
    """The base earns nothing, which a run says before it starts."""
    command = [*command, "--preflight_questions", "0"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = place / command[command.index("--output_dir") + 1]
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["sampler/logprob_difference"] < 1e-3 for line in lines)


def test_in_the_process(place: Path) -> None:
    train(documented("lab-tgrpo", "runs/in-process"), place)


def test_on_a_server(place: Path) -> None:
    port = str(free_port())
    serve = [port if word == PORT else word for word in documented("serve", "runs/lab-sft", PORT)]
    command = [word.replace(f":{PORT}", f":{port}") for word in documented("lab-tgrpo", "runs/server")]
    with (place / "server.log").open("wb") as log:
        server = subprocess.Popen(
            serve, cwd=place, stdout=log, stderr=log, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}
        )
    try:
        answering = f"http://127.0.0.1:{port}/health"
        deadline = time.monotonic() + 600
        while not _answers(answering):
            assert server.poll() is None and time.monotonic() < deadline, (place / "server.log").read_text()
            time.sleep(0.5)
        train(command, place)
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
