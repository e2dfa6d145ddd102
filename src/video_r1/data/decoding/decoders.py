"""Reading media in processes that can be killed.

Decoders are C code that meets hostile bytes: a file can make them crash, never return or take all memory.
So a read runs in a worker process with limits on its time and memory, and when the worker does not survive,
the file is what cannot be used, not the run. Workers are forked by a server process (`serve`):
to fork this one, with its threads and its GPU, would not be safe, and every fresh interpreter needs seconds
to import torch. They stay for the next read; there are as many as reads have been going on at once.
"""

import json
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av.logging
import torch

from video_r1.data.decoding.media import Media, decode_media
from video_r1.data.sources.archives import TABLE, Part, split_member
from video_r1.data.sources.media_types import ClipRef, ShowsClips, clip_of
from video_r1.data.sources.remote import local_file, open_remote_cache
from video_r1.errors import MediaError, VideoR1Error
from video_r1.processes import OneAProcess
from video_r1.settings.frames import FrameBudget

_START_SECONDS = 300  # of the server: a loaded machine or a slow drive may need long to import torch
_ATTEMPTS = 4  # at one file
_BEGIN_SECONDS = 20.0  # for a worker to take a request; one that hangs over an earlier file never does
COMMAND = struct.Struct("<cq")
START, STOP = b"+", b"-"
_LENGTH = struct.Struct("<I")
_LONGEST_MESSAGE = 1 << 20
# A worker whose reader is gone ends itself this long after its time limit.
_ORPHAN_SECONDS = 30
_STATM = Path("/proc/self/statm")
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from video_r1.data.decoding.decoders import serve
serve(int(sys.argv[2]))
"""


@dataclass(frozen=True, slots=True)
class _Worker:
    number: int  # process id
    channel: socket.socket
    server: subprocess.Popen[bytes]  # that forked it, and alone can end it


class _NotBegun(Exception):
    """The worker did not start on the request. This says nothing about the file."""


class Decoders:
    """Worker processes that decode, and the server that forks them. Thread-safe; they start when needed."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []  # of the server that runs
        self.server: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self.lock = threading.Lock()

    def read(self, clip: ClipRef, budget: FrameBudget, part: Part | list[Part] | None = None) -> Media:
        """Run `decode_media` in a worker.

        The system may kill a worker for want of memory elsewhere, and idle ones with it: a file is what
        cannot be used where a second worker, a new one, does not survive it either. That of a server that has
        ended says nothing of the file, nor does a worker that never begins with it.
        """
        crashed = hung = False
        for _ in range(_ATTEMPTS):
            worker = self._take(new=crashed or hung)
            try:
                answer, last = _exchange(worker.channel, clip, budget, part)
            except _NotBegun:
                self._stop(worker)
                hung = True
                continue
            except TimeoutError:
                self._stop(worker)
                raise MediaError(clip.path, f"takes longer than {budget.seconds:g} s to decode") from None
            except (EOFError, ConnectionError):
                reason = self._stop(worker)
                if reason and crashed:
                    raise MediaError(clip.path, f"makes the decoder crash ({reason})") from None
                crashed = crashed or bool(reason)
                continue
            except BaseException:  # Ctrl-C in the middle of an answer
                self._stop(worker)
                raise
            if last:
                self._stop(worker)
            else:
                self._put_back(worker)
            if isinstance(answer, str):
                raise MediaError(clip.path, answer)
            return answer
        raise VideoR1Error(
            f"{clip.path}: the process that decodes media was ended {_ATTEMPTS - crashed} times meanwhile; "
            "does the machine, or the job, have memory left?"
        )

    def close(self) -> None:
        """End the server and the idle workers."""
        with self.lock:
            if self.server is not None:
                self._forget_server()

    def _take(self, new: bool) -> _Worker:
        """Return an idle worker, or a new one."""
        with self.lock:
            if self.idle and not new:
                return self.idle.pop()
            ours, theirs = socket.socketpair()
            with theirs:
                for _ in range(2):  # a server that was killed meanwhile is started again
                    if self.server is None:
                        self.server = _start_server()
                    process, control = self.server
                    try:
                        socket.send_fds(control, [COMMAND.pack(START, 0)], [theirs.fileno()])
                        return _Worker(receive(control)["worker"], ours, process)
                    except (EOFError, ConnectionError):
                        self._forget_server()
            raise VideoR1Error("the process that decodes media ended as soon as it was used; see above")

    def _put_back(self, worker: _Worker) -> None:
        with self.lock:
            if self._is_ours(worker):
                self.idle.append(worker)
            else:
                worker.channel.close()

    def _is_ours(self, worker: _Worker) -> bool:
        return self.server is not None and self.server[0] is worker.server

    def _stop(self, worker: _Worker) -> str | None:
        """Kill a worker. Return the reason of its end in words; None if its server had ended."""
        worker.channel.close()
        with self.lock:
            if self.server is None or not self._is_ours(worker):
                return None
            control = self.server[1]
            try:
                control.sendall(COMMAND.pack(STOP, worker.number))
                code = receive(control)["exit"]
            except (EOFError, ConnectionError):
                self._forget_server()
                return None
        if code is None or code >= 0:
            return f"exit code {code}"
        return signal.Signals(-code).name

    def _forget_server(self) -> None:
        assert self.server is not None
        process, control = self.server
        self.server = None
        while self.idle:  # nobody could end them any more
            self.idle.pop().channel.close()
        control.close()
        process.kill()
        process.wait()


def _start_server() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            process_group=0,  # Ctrl-C reaches this process, which then ends that one
        )
    try:
        receive(ours, time.monotonic() + _START_SECONDS)
    except (EOFError, ConnectionError, TimeoutError) as error:
        process.kill()
        process.wait()
        ours.close()
        raise VideoR1Error("the process that decodes media does not start; see the lines above") from error
    ours.settimeout(None)
    return process, ours


def _exchange(
    channel: socket.socket, clip: ClipRef, budget: FrameBudget, part: Part | list[Part] | None
) -> tuple[Media | str, bool]:
    """Send a request. Return the answer (media, or a reason) and whether the worker ends with it. Raise as
    `receive`, and _NotBegun.
    """
    channel.settimeout(_BEGIN_SECONDS)
    send(channel, {"clip": asdict(clip), "budget": asdict(budget), "part": part})
    try:
        receive(channel, time.monotonic() + _BEGIN_SECONDS)
    except TimeoutError as error:
        raise _NotBegun from error
    deadline = time.monotonic() + budget.seconds
    reply = receive(channel, deadline)
    if "reason" in reply:
        return reply["reason"], reply["last"]
    if math.prod(reply["shape"]) > 3 * max(budget.image_pixels, budget.frame_pixels * budget.max_frames):
        raise EOFError("more frames than were asked for")
    frames = torch.empty(reply["shape"], dtype=torch.uint8)
    receive_into(channel, frames.numpy().data.cast("B"), deadline)
    times = torch.tensor(reply["times"], dtype=torch.float64)
    return Media(frames, times, reply["duration"], clip.data_type), reply["last"]


_decoders = OneAProcess(Decoders)


def read_media(source: ShowsClips, budget: FrameBudget) -> Media:
    """Decode and resize one file: an image, or the frames of a clip's window.

    It runs in a worker process, which is killed over a file that takes longer than `budget.seconds`; the call
    may be made from many threads at once. What is behind an address is fetched first, unless it has been.

    Raises:
        MediaError: the file cannot be used; `reason` says why in words. Nothing else is raised for a bad
            file.
        ValueError: the sample has several files; read each of `files`.
        VideoR1Error: no worker can be started, or a place that files are fetched from is out of reach.
        ConfigError: a package for such an address is missing, or the folder for copies cannot be written to.
    """
    clip = clip_of(source)
    if local_file(clip.path) is None or clip.path.startswith(TABLE):
        with open_remote_cache(budget.remote_cache, budget.remote_bytes).file(clip.path) as path:
            try:
                return read_media(replace(clip, path=path), budget)
            except MediaError as error:
                raise MediaError(clip.path, error.reason) from error
    part = None
    if split_member(clip.path):
        part = open_remote_cache(budget.remote_cache, budget.remote_bytes).part(clip.path)
    if budget.seconds == 0:
        return decode_media(clip, budget, part)
    return _decoders.one.read(clip, budget, part)


def read_media_at(source: ShowsClips, budget: FrameBudget, counts: Sequence[int]) -> list[Media]:
    """Return `read_media` with each of `counts` as max_frames, from one decoding. Raise MediaError."""
    clip = clip_of(source)
    if len(counts) == 1 or clip.data_type == "image":
        media = read_media(clip, replace(budget, max_frames=counts[0]))
        return [media] * len(counts)
    together = read_media(clip, replace(budget, max_frames=sum(counts), frame_counts=tuple(counts)))
    # Times ascend within the frames of one count and start again with those of the next.
    ends = (together.timestamps.diff() <= 0).nonzero().flatten() + 1
    parts = (tensor.tensor_split(ends) for tensor in (together.frames, together.timestamps))
    return [
        Media(frames.clone(), times.clone(), together.duration, together.kind)
        for frames, times in zip(*parts, strict=True)
    ]


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    channel.sendall(_LENGTH.pack(len(text)) + text)


def receive(channel: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Return the next message. Raise EOFError when the other side is gone, TimeoutError after `deadline`."""
    head = bytearray(_LENGTH.size)
    receive_into(channel, memoryview(head), deadline)
    (length,) = _LENGTH.unpack(head)
    if length > _LONGEST_MESSAGE:
        raise EOFError(f"a message of {length} bytes")
    text = bytearray(length)
    receive_into(channel, memoryview(text), deadline)
    return json.loads(text)


def receive_into(channel: socket.socket, buffer: memoryview, deadline: float | None = None) -> None:
    """Fill the buffer; raise as `receive` does. `deadline` is a time of `time.monotonic`."""
    while buffer:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
        count = channel.recv_into(buffer)
        if count == 0:
            raise EOFError
        buffer = buffer[count:]


def serve(control_number: int) -> None:
    """Fork a worker for each socket that arrives on the control socket, and end workers, until it closes.

    A command is START with a socket, answered by the worker's process id, or STOP with a process id, answered
    by the exit code (negative: the signal that ended it; null: it cannot be ended).
    """
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
    """Answer requests until the reader is gone or too much memory is still in use. Never returns."""
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
    part = request["part"]
    if part is not None:
        part = [Part(*one) for one in part] if isinstance(part[0], list) else Part(*part)
    try:
        media = decode_media(ClipRef(**request["clip"]), FrameBudget(**request["budget"]), part)
    except MediaError as error:
        send(channel, {"reason": error.reason, "last": last})
        return
    frames = media.frames.contiguous()
    shape, times = list(frames.shape), media.timestamps.tolist()
    send(channel, {"shape": shape, "times": times, "duration": media.duration, "last": last})
    channel.sendall(frames.numpy().data.cast("B"))


def _address_space() -> int:
    """Return the bytes of address space in use."""
    return int(_STATM.read_text().split()[0]) * resource.getpagesize()
