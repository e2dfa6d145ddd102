"""Several training processes on CPU with gloo, forked from a server that has imported torch."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "accelerate", "video_r1.training.tgrpo"])


def run_processes(
    count: int, work: str, *args: Any, environment: Mapping[str, str] | None = None, limit: float = 240
) -> None:
    """Runs `work` ("module:function") with `args` in `count` processes that can talk to one another.

    Raises AssertionError with what they printed when one fails or is not done in `limit` seconds (a hang).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(args[0])
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes, logs = [], []
    for rank in range(count):
        log = folder / f"process-{rank}.log"
        log.unlink(missing_ok=True)
        logs.append(log)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **group} if count > 1 else {}
        process = SERVER.Process(target=one_process, args=(work, args, {**own, **(environment or {})}, log))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(limit)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs if log.exists())
    assert codes == [0] * count, f"exit codes {codes} (None: it hung)\n{said}"


def one_process(work: str, args: tuple[Any, ...], environment: Mapping[str, str], log: Path) -> None:
    """What each process does: its environment, its log, its work; it ends without a clean-up."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    module, _, function = work.partition(":")
    try:
        getattr(importlib.import_module(module), function)(*args)
    except BaseException:  # whatever it is, the log has to name it
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
