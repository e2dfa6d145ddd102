"""What reading a clip in a worker process that can be killed costs, against reading it in this process.

    python -m benchmarks.workers --json [--rounds 10]

For made-up clips as small as the lab's, of 360p, and of 1080p, and for 64 frames at the evaluation budget:
`ratio`, the median over rounds of the time in this process ÷ the time with a worker (below 1: the worker is
slower), and the seconds of both. `equal`: both gave the same frames, times and duration.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks._command import benchmark_parser
from benchmarks._timing import in_turns, machine, spread
from benchmarks.decode import write_clip
from video_r1.data.decoding.decoders import read_media
from video_r1.data.decoding.media import Media, decode_media
from video_r1.data.manifests.records import Sample
from video_r1.settings.frames import FrameBudget

Read = Callable[[Sample, FrameBudget], Media]
CLIPS = {
    # height, width, frames of the clip, budget, reads a round
    "lab": (56, 56, 64, FrameBudget(max_frames=8, frame_pixels=56 * 56), 50),
    "360p": (360, 640, 250, FrameBudget(), 4),
    "1080p": (1080, 1920, 250, FrameBudget(), 1),
    "360p, 64 frames": (360, 640, 800, FrameBudget(max_frames=64, frame_pixels=256 * 28 * 28), 1),
}


def timed(read: Read, sample: Sample, budget: FrameBudget, reads: int) -> float:
    """Seconds of one read."""
    start = time.perf_counter()
    for _ in range(reads):
        read(sample, budget)
    return (time.perf_counter() - start) / reads


def run(rounds: int) -> dict[str, object]:
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        for name, (height, width, frames, budget, reads) in CLIPS.items():
            path = write_clip(Path(folder) / f"{name}.mp4", height, width, frames, seed=0)
            sample = Sample(0, "?", "video", "free-form", "<answer>x</answer>", str(path))
            there, here = read_media(sample, budget), decode_media(sample, budget)
            equal &= torch.equal(there.frames, here.frames) and torch.equal(there.timestamps, here.timestamps)
            equal &= there.duration == here.duration
            times = in_turns(
                partial(timed, read_media, sample, budget, reads),
                partial(timed, decode_media, sample, budget, reads),
                rounds,
            )
            results[name] = {
                **spread(b / a for a, b in times),
                "seconds": round(statistics.median(a for a, _ in times), 5),
                "seconds_other": round(statistics.median(b for _, b in times), 5),
            }
    return {
        "benchmark": "workers",
        "clips": results,
        "equal": equal,
        "rounds": rounds,
        **machine(torch.device("cpu")),
    }


if __name__ == "__main__":
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    print(json.dumps(run(parser.parse_args().rounds)))
