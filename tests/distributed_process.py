"""Several training processes on CPU with gloo, forked from a server that has imported torch."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ports import free_port

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "accelerate", "video_r1.cli", "video_r1.training.tgrpo"])


def run_processes(
    count: int, work: str, *args: Any, environment: Mapping[str, str] | None = None, limit: float = 240
) -> None:
    """Runs `work` ("module:function") with `args` in `count` processes that can talk to one another.

    Raises AssertionError with what they printed when one fails or is not done in `limit` seconds (a hang).
    """
    processes, logs = start_processes(count, work, *args, environment=environment)
    codes = exit_codes(processes, limit)
    assert codes == [0] * count, f"exit codes {codes} (None: it hung)\n{last_words(logs)}"


def start_processes(
    count: int, work: str, *args: Any, environment: Mapping[str, str] | None = None
) -> tuple[list[Any], list[Path]]:
    """The processes, at work, and what each prints into; the first of `args` is the folder of these files."""
    port = free_port()
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
    return processes, logs


def exit_codes(processes: list[Any], limit: float) -> list[int | None]:
    """Waits for the processes; None stands for one that was not done in `limit` seconds and was killed."""
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def last_words(logs: list[Path]) -> str:
    return "\n".join(log.read_text(errors="replace")[-3000:] for log in logs if log.exists())


def write_into(log: Path | str) -> None:
    """From here on what this process prints goes to the end of a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def one_process(work: str, args: tuple[Any, ...], environment: Mapping[str, str], log: Path) -> None:
    """What each process does: its environment, its log, its work; it ends without a clean-up."""
    write_into(log)
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
