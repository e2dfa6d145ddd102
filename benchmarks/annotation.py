"""Memory of `video-r1 annotate` while an endpoint holds thousands of requests, and ten times as many in all.

    python -m benchmarks.annotation --json [--requests 2000,20000] [--concurrency 2000]

A local endpoint answers the oldest request only when `concurrency` are under way, as a slow teacher would,
so that there are always as many. Each run is a process of its own, over clips of 360p that it decodes once
(frame cache) and sends as `frames` images a question. `peak_mb`, `threads`, `cpu_seconds`: most resident
memory (Linux), most threads and the processor's time of the run's process; `growth`: the peak of the longest
run ÷ that of the shortest; `frames_mb`, `bodies_mb`: what the frames and the request bodies of all that are
under way would take if they were kept. `bounded`: `growth` is below 1.2, and the longest run's peak is less
above that of a single request than half of `frames_mb`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from benchmarks._command import benchmark_parser
from benchmarks._timing import machine
from benchmarks.decode import write_clip
from video_r1.annotation.annotate import run_annotate
from video_r1.chat_client import allow_open_files
from video_r1.settings.decoding import AnnotateSettings

FRAMES, SIDE, CLIPS = 8, 112, 8
IDLE = 1.0  # seconds without a new request, after which no more come
GROWTH = 1.2
RATIONALE = " ".join(f"then{number} something happens" for number in range(12))
ANSWER = {
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": f"<think>{RATIONALE}</think>\n<answer>B</answer>"},
            "finish_reason": "stop",
        }
    ]
}


class Endpoint:
    """Lets `hold` requests wait, and answers the oldest of more."""

    def __init__(self, hold: int) -> None:
        self.hold = hold
        self.waiting: deque[asyncio.Event] = deque()
        self.most_waiting = 0
        self.last = 0.0
        self.sizes: list[int] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            value: Any = {"data": [{"id": "teacher", "owned_by": "benchmark"}]}
            if head.startswith("post"):
                size = int(head.partition("content-length:")[2].split("\r\n")[0])
                await self.discard(reader, size)
                await self.turn()
                value = ANSWER
            body = json.dumps(value).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):  # the run has ended
            pass
        finally:
            writer.close()

    async def discard(self, reader: asyncio.StreamReader, size: int) -> None:
        self.sizes.append(size)
        while size > 0 and (part := await reader.read(1 << 16)):
            size -= len(part)

    async def turn(self) -> None:
        mine = asyncio.Event()
        self.waiting.append(mine)
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        self.last = time.monotonic()
        if len(self.waiting) >= self.hold:
            self.waiting.popleft().set()
        await mine.wait()

    async def release(self) -> None:
        """Answers all that wait when no more come."""
        while True:
            await asyncio.sleep(IDLE / 4)
            if time.monotonic() - self.last > IDLE:
                while self.waiting:
                    self.waiting.popleft().set()


def write_questions(folder: Path, count: int) -> Path:
    rows = [
        {
            "problem_id": number,
            "problem": f"Question {number}: which way does the box move?",
            "data_type": "video",
            "problem_type": "multiple choice",
            "options": ["A. left", "B. right"],
            "solution": "<answer>B</answer>",
            "path": f"{number % CLIPS}.mp4",
        }
        for number in range(count)
    ]
    path = folder / f"{count}.json"
    path.write_text(json.dumps(rows))
    return path


def annotate(url: str, manifest: Path, concurrency: int) -> dict[str, Any]:
    """The run itself, in its own process."""
    settings = AnnotateSettings(
        manifest=str(manifest),
        teacher=url,
        out=str(manifest.with_suffix(".out.jsonl")),
        concurrency=concurrency,
        max_frames=FRAMES,
        frame_pixels=SIDE * SIDE,
        frame_cache=str(manifest.parent / "cache"),
    )
    threads, done = [0], threading.Event()

    def count_threads() -> None:
        while not done.wait(0.2):
            threads.append(int(own_status()["Threads"]) - 1)  # without this one

    threading.Thread(target=count_threads).start()
    start, used = time.perf_counter(), time.process_time()
    try:
        counts = run_annotate(settings)
    finally:
        done.set()
    return {
        "kept": counts.questions["kept"],
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        # Of this program alone: getrusage counts what the process that started it had, too.
        "peak_mb": round(int(own_status()["VmHWM"].split()[0]) * 1024 / 1e6),
        "threads": max(threads),
    }


def own_status() -> dict[str, str]:
    return dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())


async def measured(folder: Path, requests: int, concurrency: int) -> dict[str, Any]:
    endpoint = Endpoint(min(requests, concurrency))
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0, backlog=concurrency)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    release = asyncio.create_task(endpoint.release())
    words = ["--measure", url, str(write_questions(folder, requests)), "--concurrency", str(concurrency)]
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.annotation", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await run.communicate()
    release.cancel()
    server.close()
    if run.returncode:
        raise SystemExit(errors.decode()[-2000:])
    found = json.loads(output.decode().splitlines()[-1])
    return {
        "requests": requests,
        **found,
        "under_way": endpoint.most_waiting,
        "body_kb": round(statistics.mean(endpoint.sizes) / 1e3, 1),
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    allow_open_files(2 * arguments.concurrency)
    requests = sorted(int(count) for count in arguments.requests.split(","))
    with tempfile.TemporaryDirectory() as name:
        for number in range(CLIPS):
            write_clip(Path(name) / f"{number}.mp4", 360, 640, 100, number)
        one = await measured(Path(name), 1, 1)
        runs = [await measured(Path(name), count, arguments.concurrency) for count in requests]
    last = runs[-1]
    growth = last["peak_mb"] / runs[0]["peak_mb"]
    frames = last["under_way"] * FRAMES * 3 * SIDE * SIDE / 1e6
    return {
        "growth": round(growth, 3),
        "bounded": growth < GROWTH and last["peak_mb"] - one["peak_mb"] < frames / 2,
        "equal": all(each["kept"] == each["requests"] for each in runs),
        "peak_mb": last["peak_mb"],
        "peak_mb_one_request": one["peak_mb"],
        "frames_mb": round(frames),
        "bodies_mb": round(last["under_way"] * last["body_kb"] / 1e3),
        "runs": runs,
        "sizes": {"concurrency": arguments.concurrency, "frames": FRAMES, "frame": SIDE},
        **machine(torch.device("cpu")),
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--requests", default="2000,20000", help="questions of each run")
    parser.add_argument("--concurrency", type=int, default=2000, help="requests under way at once")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        url, manifest = arguments.measure
        print(json.dumps(annotate(url, Path(manifest), arguments.concurrency)))
    else:
        print(json.dumps(asyncio.run(run(arguments))))


if __name__ == "__main__":
    main()
