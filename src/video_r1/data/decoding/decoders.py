"""Reading media in processes that can be killed.

Decoders are C code that meets hostile bytes: a file can make them crash, hang or take all memory. So a file
is decoded in a worker process with limits on time and memory; if the worker does not survive, that file
cannot be used, and the run goes on. Workers are forked by a server process (`serve`): forking this process,
with its threads and its GPU, would not be safe, and a fresh interpreter needs seconds to import torch. They
stay for the next read; there are as many as there were reads at once.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import NamedTuple

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
_LONGEST_REPLY = 1 << 20  # bytes, besides the frames
_ORPHAN_SECONDS = 30  # after its time limit a worker whose reader is gone ends itself
_STATM = Path("/proc/self/statm")
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from video_r1.data.decoding.decoders import serve
serve(int(sys.argv[2]))
"""


class _Worker(NamedTuple):
    number: int  # process id
    channel: Connection
    server: subprocess.Popen[bytes]  # its parent, which alone can end it


class Decoders:
    """Worker processes that decode, and the server that forks them. Thread-safe; they start when needed."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []  # of the current server
        self.server: tuple[subprocess.Popen[bytes], Connection] | None = None
        self.lock = threading.Lock()

    def read(self, clip: ClipRef, budget: FrameBudget, part: Part | list[Part] | None = None) -> Media:
        """Run `decode_media` in a worker.

        A worker may die because the machine lacks memory, and idle ones with it. So a file counts as unusable
        only after it has crashed two workers, the second one new. A server that ended, or a worker that did
        not begin, says nothing about the file.
        """
        crashed = hung = False
        for _ in range(_ATTEMPTS):
            worker = self._take(new=crashed or hung)
            try:
                reply = _exchange(worker.channel, clip, budget, part)
            except TimeoutError:
                self._stop(worker)
                raise MediaError(clip.path, f"takes longer than {budget.seconds:g} s to decode") from None
            except (EOFError, OSError):
                reason = self._stop(worker)
                if reason and crashed:
                    raise MediaError(clip.path, f"makes the decoder crash ({reason})") from None
                crashed = crashed or bool(reason)
                continue
            except BaseException:  # Ctrl-C in the middle of a reply
                self._stop(worker)
                raise
            if reply is None:
                self._stop(worker)
                hung = True
                continue
            answer, is_last = reply
            if is_last:
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
            self._forget_server()

    def _take(self, new: bool) -> _Worker:
        """Return an idle worker, or a new one."""
        with self.lock:
            if self.idle and not new:
                return self.idle.pop()
            ours, theirs = Pipe()
            with theirs:
                for _ in range(2):  # a server that was killed is started again
                    process, control = self.server = self.server or _start_server()
                    try:
                        control.send(None)
                        send_handle(control, theirs.fileno(), process.pid)
                        return _Worker(control.recv(), ours, process)
                    except (EOFError, OSError):
                        self._forget_server()
            raise VideoR1Error("the process that decodes media ended as soon as it was used; see above")

    def _put_back(self, worker: _Worker) -> None:
        with self.lock:
            if self.server is not None and self.server[0] is worker.server:
                self.idle.append(worker)
            else:
                worker.channel.close()

    def _stop(self, worker: _Worker) -> str | None:
        """Kill a worker. Return the reason of its end in words; None if its server had ended."""
        worker.channel.close()
        with self.lock:
            if self.server is None or self.server[0] is not worker.server:
                return None
            try:
                self.server[1].send(worker.number)
                code = self.server[1].recv()
            except (EOFError, OSError):
                self._forget_server()
                return None
        return f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name

    def _forget_server(self) -> None:
        while self.idle:  # nothing else could end them
            self.idle.pop().channel.close()
        if self.server is not None:
            process, control = self.server
            self.server = None
            control.close()
            process.kill()
            process.wait()


def _start_server() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            process_group=0,  # Ctrl-C reaches this process, which then ends that one
        )
    with suppress(EOFError, OSError):
        if ours.poll(_START_SECONDS):
            ours.recv()
            return process, ours
    process.kill()
    process.wait()
    ours.close()
    raise VideoR1Error("the process that decodes media does not start; see the lines above")


def _exchange(
    channel: Connection, clip: ClipRef, budget: FrameBudget, part: Part | list[Part] | None
) -> tuple[Media | str, bool] | None:
    """Send a request. Return the media, or the reason why there are none, and whether the worker ends with
    this file; None if it did not begin. Raise TimeoutError, and EOFError or OSError if the worker is gone.
    """
    channel.send((clip, budget, part))
    if not channel.poll(_BEGIN_SECONDS):
        return None
    channel.recv_bytes(_LONGEST_REPLY)
    if not channel.poll(budget.seconds):
        raise TimeoutError
    reply = json.loads(channel.recv_bytes(_LONGEST_REPLY))  # no pickle: the worker has met hostile bytes
    if "reason" in reply:
        return reply["reason"], reply["last"]
    if math.prod(reply["shape"]) > 3 * max(budget.image_pixels, budget.frame_pixels * budget.max_frames):
        raise EOFError("more frames than were asked for")
    frames = torch.empty(reply["shape"], dtype=torch.uint8)
    pixels = frames.numpy().data.cast("B")
    while pixels:  # straight into place; the worker's own limit ends it if it hangs
        count = os.readv(channel.fileno(), [pixels])
        if count == 0:
            raise EOFError
        pixels = pixels[count:]
    times = torch.tensor(reply["times"], dtype=torch.float64)
    return Media(frames, times, reply["duration"], clip.data_type), reply["last"]


_decoders = OneAProcess(Decoders)


def read_media(source: ShowsClips, budget: FrameBudget) -> Media:
    """Decode and resize one file: an image, or the frames of a clip's window. Thread-safe.

    A remote file is fetched first. A worker process decodes; it is killed after `budget.seconds`.

    Raises:
        MediaError: the file cannot be used; `reason` says why. Nothing else is raised for a bad file.
        ValueError: the sample has several files; read each of `files`.
        VideoR1Error: no worker can be started, or the host of a remote file is out of reach.
        ConfigError: a package for such an address is missing, or the cache folder cannot be written to.
    """
    clip = clip_of(source)
    part = None
    if split_member(clip.path) or local_file(clip.path) is None:
        cache = open_remote_cache(budget.remote_cache, budget.remote_bytes)
        if local_file(clip.path) is None or clip.path.startswith(TABLE):
            with cache.file(clip.path) as path:
                try:
                    return read_media(replace(clip, path=path), budget)
                except MediaError as error:
                    raise MediaError(clip.path, error.reason) from error
        part = cache.part(clip.path)
    if budget.seconds == 0:
        return decode_media(clip, budget, part)
    return _decoders.one.read(clip, budget, part)


def read_media_at(source: ShowsClips, budget: FrameBudget, counts: Sequence[int]) -> list[Media]:
    """Return `read_media` with each of `counts` as max_frames, from one decoding. Raise MediaError."""
    clip = clip_of(source)
    if len(counts) == 1 or clip.data_type == "image":
        return [read_media(clip, replace(budget, max_frames=counts[0]))] * len(counts)
    together = read_media(clip, replace(budget, max_frames=sum(counts), frame_counts=tuple(counts)))
    # Times ascend within the frames of one count and start again with those of the next.
    ends = (together.timestamps.diff() <= 0).nonzero().flatten() + 1
    parts = zip(together.frames.tensor_split(ends), together.timestamps.tensor_split(ends), strict=True)
    return [replace(together, frames=frames.clone(), timestamps=times.clone()) for frames, times in parts]


def serve(control_number: int) -> None:
    """Fork and end workers until the reader is gone.

    None on the control connection, followed by a channel: fork a worker for it, answer with its process id. A
    process id: end that worker, answer with its exit code (negative: a signal; None: it cannot be ended).
    """
    # A job that stops gets SIGTERM in all its processes; the reader reads on, and ends these at its own end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)  # workers, not their threads, fill the cores
    av.logging.set_level(None)  # silent, without the Python callback that deadlocks with FFmpeg's threads
    warnings.simplefilter("ignore")  # the reply says what is wrong with a file
    control = Connection(control_number)
    control.send("ready")
    with suppress(EOFError, ConnectionError):
        while True:
            number = control.recv()
            if number is not None:
                control.send(_kill(number))
                continue
            channel = recv_handle(control)
            number = os.fork()
            if number == 0:
                control.close()
                _work(Connection(channel))
            os.close(channel)
            control.send(number)


def _kill(worker: int) -> int | None:
    os.kill(worker, signal.SIGKILL)  # the id is still its own: nobody else waits for it
    for _ in range(400):
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None  # it hangs inside the kernel, on a lost network drive for example


def _work(channel: Connection) -> None:
    """Answer requests until the reader is gone or too much memory is still in use. Never returns."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limited = _STATM.exists()  # systems without it ignore the limit too
        at_start, is_last = _address_space() if limited else 0, False
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        while not is_last:
            clip, budget, part = channel.recv()
            channel.send_bytes(b"begun")
            # no handler: the kernel ends the process even where no Python runs
            signal.setitimer(signal.ITIMER_REAL, budget.seconds + _ORPHAN_SECONDS)
            if limited:
                is_last = _address_space() - at_start > budget.memory // 2
                allowed = at_start + budget.memory
                resource.setrlimit(resource.RLIMIT_AS, (min(allowed, most) if most > 0 else allowed, most))
            _answer(channel, clip, budget, part, is_last)
            signal.setitimer(signal.ITIMER_REAL, 0)
        code = 0
    except (EOFError, OSError):  # the reader is gone
        code = 0
    finally:
        os._exit(code)


def _answer(
    channel: Connection, clip: ClipRef, budget: FrameBudget, part: Part | list[Part] | None, is_last: bool
) -> None:
    try:
        media = decode_media(clip, budget, part)
    except MediaError as error:
        channel.send_bytes(json.dumps({"reason": error.reason, "last": is_last}).encode())
        return
    times, frames = media.timestamps.tolist(), media.frames.contiguous().numpy()
    reply = {"shape": frames.shape, "times": times, "duration": media.duration, "last": is_last}
    channel.send_bytes(json.dumps(reply).encode())
    pixels = frames.data.cast("B")
    while pixels:
        pixels = pixels[os.write(channel.fileno(), pixels) :]


def _address_space() -> int:
    """Return the bytes of address space in use."""
    return int(_STATM.read_text().split()[0]) * resource.getpagesize()
