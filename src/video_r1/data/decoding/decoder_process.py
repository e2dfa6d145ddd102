"""The processes that decode: started by decoders.py, one request at a time, over a socket.

    decoders.py ── control ──► server (this module, imports once) ── fork ──► worker, worker, …
         └────────────────────── one socket each ─────────────────────────────┘

The server has no threads and no GPU, so that it may fork; a worker is ready in milliseconds. A message is a
JSON object behind its length; frames follow a reply as plain bytes. Nothing is pickled: a decoder that a
file has taken over can send wrong pictures, but no code.
"""

import json
import os
import resource
import signal
import socket
import struct
import time
import warnings
from pathlib import Path
from typing import Any

COMMAND = struct.Struct("<cq")
START, STOP = b"+", b"-"
_LENGTH = struct.Struct("<I")
_LONGEST_MESSAGE = 1 << 20
# A worker whose reader is gone ends itself this long after its time limit.
_ORPHAN_SECONDS = 30
_STATM = Path("/proc/self/statm")


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    channel.sendall(_LENGTH.pack(len(text)) + text)


def receive(channel: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """The next message. Raises EOFError when the other side is gone, TimeoutError after `deadline`."""
    head = bytearray(_LENGTH.size)
    receive_into(channel, memoryview(head), deadline)
    (length,) = _LENGTH.unpack(head)
    if length > _LONGEST_MESSAGE:
        raise EOFError(f"a message of {length} bytes")
    text = bytearray(length)
    receive_into(channel, memoryview(text), deadline)
    return json.loads(text)


def receive_into(channel: socket.socket, buffer: memoryview, deadline: float | None = None) -> None:
    """Fills the buffer; raises as `receive` does. `deadline` is a time of `time.monotonic`."""
    while buffer:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        count = channel.recv_into(buffer)
        if count == 0:
            raise EOFError
        buffer = buffer[count:]


def serve(control_number: int) -> None:
    """Forks a worker for each socket that arrives on the control socket, and ends workers, until it closes.

    A command is START with a socket, answered by the worker's process id, or STOP with a process id, answered
    by the exit code (negative: the signal that ended it; null: it cannot be ended).
    """
    import av.logging
    import torch

    import video_r1.data.decoding.media  # noqa: F401  before forking

    # Reaches all processes of a job that is to stop; the reader may read on, and ends these when it does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)  # workers, not their threads, fill the cores
    av.logging.set_level(None)  # silent, without the Python callback that deadlocks with FFmpeg's threads
    warnings.simplefilter("ignore")  # what is wrong with a file is told in the answer
    control = socket.socket(fileno=control_number)
    send(control, {"ready": os.getpid()})
    while True:
        command, numbers, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        if len(command) < COMMAND.size:  # the reader is gone
            return
        kind, number = COMMAND.unpack(command)
        if kind == START:
            worker = os.fork()
            if worker == 0:
                control.close()
                _work(socket.socket(fileno=numbers[0]))
            os.close(numbers[0])
            send(control, {"worker": worker})
        else:
            send(control, {"exit": _stop(number)})


def _stop(worker: int) -> int | None:
    os.kill(worker, signal.SIGKILL)  # the id is still its own: nobody else waits for it
    for _ in range(400):
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None  # it hangs inside the kernel, on a lost network drive for example


def _work(channel: socket.socket) -> None:
    """Answers requests until the reader is gone or too much memory has stayed behind. Never returns."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limited = _STATM.exists()  # systems without it do not keep to the limit either
        at_start, last = _address_space() if limited else 0, False
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        while not last:
            request = receive(channel)
            send(channel, {"begun": True})
            # no handler: the kernel ends the process even where no Python runs
            signal.setitimer(signal.ITIMER_REAL, request["budget"]["seconds"] + _ORPHAN_SECONDS)
            if limited:
                last = _address_space() - at_start > request["budget"]["memory"] // 2
                allowed = at_start + request["budget"]["memory"]
                resource.setrlimit(resource.RLIMIT_AS, (min(allowed, most) if most > 0 else allowed, most))
            _answer(channel, request, last)
            signal.setitimer(signal.ITIMER_REAL, 0)
        code = 0
    except (EOFError, OSError):  # the reader is gone
        code = 0
    finally:
        os._exit(code)


def _answer(channel: socket.socket, request: dict[str, Any], last: bool) -> None:
    from video_r1.data.decoding.media import decode_media
    from video_r1.data.manifests.records import Sample
    from video_r1.data.sources.tar_index import Part
    from video_r1.errors import MediaError
    from video_r1.settings.frames import FrameBudget

    question = {"problem_id": 0, "problem": "", "problem_type": "free-form", "solution": ""}
    sample = Sample(**question, **request["sample"])
    part = request["part"]
    if part is not None:
        part = [Part(*one) for one in part] if isinstance(part[0], list) else Part(*part)
    try:
        media = decode_media(sample, FrameBudget(**request["budget"]), part)
    except MediaError as error:
        send(channel, {"reason": error.reason, "last": last})
        return
    frames = media.frames.contiguous()
    shape, times = list(frames.shape), media.timestamps.tolist()
    send(channel, {"shape": shape, "times": times, "duration": media.duration, "last": last})
    channel.sendall(frames.numpy().data.cast("B"))


def _address_space() -> int:
    """Bytes of address space in use."""
    return int(_STATM.read_text().split()[0]) * resource.getpagesize()
