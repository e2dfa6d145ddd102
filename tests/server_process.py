"""A real vLLM server on loopback, in processes of its own, which tests may kill, stop and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ports import free_port
from transformers import AutoConfig

from video_r1.lab.model import base_folder
from video_r1.rollout.vllm.serve import cpu_options, runnable, server_command
from video_r1.settings.vllm import ServeSettings

FAILURE = "fails for the test"
RECORDER = '''"""A vLLM plugin: writes down what the model is called with, and fails where a file says so."""
import os
import uuid


def plugin():
    import torch
    from vllm.model_executor.models import qwen2_5_vl, qwen3_vl

    def record(kind):
        embed = kind.embed_multimodal

        def recorded(self, **given):
            if os.path.exists(os.environ["RECORDED"] + "/fail"):
                raise MemoryError("FAILURE")
            name = os.path.join(os.environ["RECORDED"], uuid.uuid4().hex)
            torch.save({name: value.clone() for name, value in given.items()}, name + ".part")
            os.rename(name + ".part", name + ".pt")
            return embed(self, **given)

        kind.embed_multimodal = recorded

    record(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration)
    record(qwen3_vl.Qwen3VLForConditionalGeneration)
'''.replace("FAILURE", FAILURE)


class ServerProcess:
    """Serves a checkpoint (default: the lab's base), up to 1,024 tokens.

    folder: for its log, and for `recorded/`, where each call of the model's encoder leaves what it was given.
    """

    def __init__(self, folder: Path, model: Path | None = None, dtype: Any = "float32") -> None:
        self.log = folder / "server.log"
        self.recorded = folder / "recorded"
        self.recorded.mkdir()
        plugin = folder / "plugins"
        (plugin / "recorder-1.dist-info").mkdir(parents=True)
        (plugin / "recorder.py").write_text(RECORDER)
        (plugin / "recorder-1.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: recorder\nVersion: 1\n"
        )
        (plugin / "recorder-1.dist-info" / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nrecorder = recorder:plugin\n"
        )
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = ServeSettings(
            model=str(model or base_folder()),
            port=self.port,
            dtype=dtype,
            max_model_len=1024,
            vllm_options="--max-num-seqs 64",
        )
        options = cpu_options(AutoConfig.from_pretrained(str(settings.model)), dtype)
        command, variables = server_command(settings, options)
        self.command = runnable(command)
        paths = [str(plugin), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            **variables,
            "PYTHONPATH": os.pathsep.join(paths),
            "RECORDED": str(self.recorded),
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once; `wait` waits until the server answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            assert self.process is not None and self.process.poll() is None, self.last_words()
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, self.last_words()
                time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        """To the server and all of its processes."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, without warning; returns when the processes are gone."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def last_words(self) -> str:
        return f"{sys.executable}: {self.log.read_text(errors='replace')[-3000:]}"
