"""Two real vLLM servers that share an evaluation, one of them killed; and vLLM in two processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed_process import exit_codes, last_words, start_processes
from server_process import ServerProcess
from tiny_questions import read_lines, write_manifest

from video_r1.evaluation.evaluate import run_eval
from video_r1.lab.model import base_folder
from video_r1.rollout.vllm.server import ServerEngine
from video_r1.settings.decoding import EvalSettings

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SIZES: dict[str, Any] = {"frame_pixels": 3136, "image_pixels": 3136, "max_frames": 4, "media_seconds": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "max_prompt_length": 512}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    both = [ServerProcess(tmp_path_factory.mktemp("server")) for _ in range(2)]
    try:
        for process in both:
            process.start()
            process.wait()
        yield both
    finally:
        for process in both:
            process.kill()


def evaluated(manifest: Path, out: Path, engine: str, **changes: Any) -> bytes:
    model: Any = str(base_folder())
    order: Any = ["ordered", "shuffled"]
    settings = EvalSettings(
        model=model, manifest=str(manifest), engine=engine, out=str(out), order=order, dtype="float32",
        **SIZES, **SAMPLED, **changes,
    )  # fmt: skip
    run_eval(settings)
    return (out / "predictions-4.jsonl").read_bytes()


def test_one_of_two_servers_is_killed(
    servers: list[ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Every question has its answer, and it is the one that a single server gives."""
    manifest = write_manifest(tmp_path, videos=12, images=4)
    alone = evaluated(manifest, tmp_path / "alone", servers[0].url, batch_size=16)
    rollout, answers, killing = ServerEngine._rollout, [], threading.Lock()

    def counted(self: ServerEngine, choice: dict[str, Any]) -> Any:
        answers.append(1)
        if len(answers) >= 6 and killing.acquire(blocking=False):
            servers[1].kill()
        return rollout(self, choice)

    monkeypatch.setattr(ServerEngine, "_rollout", counted)
    monkeypatch.setitem(ServerEngine.__init__.__kwdefaults__, "concurrency", 3)  # type: ignore
    engines = ",".join(server.url for server in servers)
    both = evaluated(manifest, tmp_path / "both", engines, batch_size=16)
    assert killing.locked() and len(answers) == 28
    assert f"{servers[1].url}: " in caplog.text and "it is left out for 1 s" in caplog.text
    assert both == alone
    assert len(read_lines(tmp_path / "both" / "predictions-4.jsonl")) == 28


@pytest.mark.dist
@pytest.mark.parametrize("command", ["eval", "annotate"])
def test_vllm_in_two_processes(tmp_path: Path, command: str) -> None:
    manifest = write_manifest(tmp_path, videos=6, images=2)
    settings = {**SIZES, **SAMPLED, "engine": "vllm", "dtype": "float32", "batch_size": 2}
    settings |= {"manifest": manifest, "model" if command == "eval" else "teacher": base_folder()}
    words = [command, *(f"--{name}={value}" for name, value in settings.items())]
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        out = folder / ("out" if command == "eval" else "out/cot.json")
        work = "shared_work:command_line"
        processes, logs = start_processes(count, work, folder, [*words, f"--out={out}"])
        codes = exit_codes(processes, 400)
        assert codes == [int(command == "annotate")] * count, last_words(logs)  # none is kept
        assert "Traceback" not in last_words(logs)
        files = (
            path for path in sorted((folder / "out").rglob("*")) if path.is_file() and path.name != ".lock"
        )
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0] == found[1] and len(found[0]) == 3
