"""Sixteen frames of a clip, resized for the model: this project's reader, decord, and decoding everything.

    python -m benchmarks.decode --json [--rounds 5] [--threads 1]

Clips: ten minutes of 1080p H.264 (ten seconds of made-up scenes, encoded once and repeated), and 20 clips of
360p and four to twelve seconds. Each reader gets the same frame numbers and gives them at the same size;
decord (extra `bench`) reads them with its `get_batch`, and its frames are resized by the same function.
`ratio` is against decord, `ratio_everything` against decoding all frames with PyAV; `cpu_ratio` compares
processor time. `equal`: the frames differ from decord's by rounding at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from benchmarks._command import benchmark_parser
from benchmarks._timing import in_turns, machine, spread
from video_r1.data.decoding import clips
from video_r1.data.decoding.media import decode_media, fitted_size, frame_indices, resize
from video_r1.data.manifests.records import Sample
from video_r1.settings.frames import FrameBudget

BUDGET = FrameBudget(max_frames=16)
FPS = 25
ROUNDING = 3.0  # mean difference of 8-bit values that two conversions from YUV to RGB may have


def write_clip(path: Path, height: int, width: int, frames: int, seed: int, repeats: int = 1) -> Path:
    """Coloured rectangles that move over a gradient with grain; a keyframe every 250 frames."""
    generator = np.random.default_rng(seed)
    down, across = np.mgrid[0:height, 0:width]
    ground = np.stack([down * 255 // height, across * 255 // width, (down + across) % 256], -1)
    grain = generator.integers(0, 12, (height, width, 1))
    ground = (ground * 0.6 + grain).astype(np.uint8)
    boxes = [(generator.integers(0, 256, 3), generator.uniform(0, 1, 4)) for _ in range(6)]
    encoded = path.with_suffix(".short.mp4")
    with av.open(str(encoded), "w") as container:
        stream: Any = container.add_stream("h264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        for number in range(frames):
            picture = ground.copy()
            for colour, (y, x, dy, dx) in boxes:
                top = int((y + dy * number / 100) % 1 * height * 0.8)
                left = int((x + dx * number / 100) % 1 * width * 0.8)
                picture[top : top + height // 5, left : left + width // 5] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    if repeats == 1:
        return encoded.rename(path)
    with av.open(str(encoded)) as source, av.open(str(path), "w") as container:
        video = source.streams.video[0]
        stream = container.add_stream_from_template(video)
        assert video.time_base is not None
        length = round(frames / FPS / video.time_base)
        for repeat in range(repeats):
            source.seek(0)
            for packet in source.demux(video):
                if packet.dts is None or packet.pts is None:
                    continue
                packet.pts += repeat * length
                packet.dts += repeat * length
                packet.stream = stream
                container.mux(packet)
    encoded.unlink()
    return path


def with_ours(path: Path, threads: int) -> Tensor:
    sample = Sample(0, "?", "video", "free-form", "<answer>x</answer>", str(path))
    clips.DECODER_THREADS = threads
    return decode_media(sample, BUDGET).frames


def with_decord(path: Path, threads: int) -> Tensor:
    import decord  # pyright: ignore[reportMissingImports]  (an extra)

    reader = decord.VideoReader(str(path), num_threads=threads)
    wanted = frame_indices(len(reader), float(reader.get_avg_fps()), BUDGET)
    return shrunk(torch.from_numpy(reader.get_batch(wanted).asnumpy()).permute(0, 3, 1, 2))


def with_everything(path: Path, threads: int) -> Tensor:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        wanted = set(frame_indices(stream.frames, float(stream.average_rate or FPS), BUDGET))
        frames = [
            torch.from_numpy(frame.to_ndarray(format="rgb24"))
            for number, frame in enumerate(container.decode(stream))
            if number in wanted
        ]
    return shrunk(torch.stack(frames).permute(0, 3, 1, 2))


def shrunk(frames: Tensor) -> Tensor:
    height, width = frames.shape[-2:]
    return resize(frames, *fitted_size(height, width, BUDGET.frame_pixels, BUDGET.size_multiple))


def timed(read: Callable[[Path, int], Tensor], clips: list[Path], threads: int) -> tuple[float, float]:
    """Wall and processor seconds for all clips."""
    wall, cpu = time.perf_counter(), time.process_time()
    for clip in clips:
        read(clip, threads)
    return time.perf_counter() - wall, time.process_time() - cpu


def compared(clips: list[Path], rounds: int, threads: int, everything_rounds: int) -> dict[str, Any]:
    differences = [
        float((with_ours(clip, threads).float() - with_decord(clip, threads).float()).abs().mean())
        for clip in clips[:4]
    ]
    times = in_turns(
        lambda: timed(with_ours, clips, threads), lambda: timed(with_decord, clips, threads), rounds
    )
    everything = [timed(with_everything, clips, threads) for _ in range(everything_rounds)]
    seconds, cpu = (statistics.median(ours[part] for ours, _ in times) for part in (0, 1))
    return {
        **spread(other[0] / ours[0] for ours, other in times),
        "cpu_ratio": round(statistics.median(other[1] / ours[1] for ours, other in times), 3),
        "ratio_everything": round(statistics.median(wall for wall, _ in everything) / seconds, 3),
        "milliseconds": round(1000 * seconds / len(clips), 2),
        "cpu_milliseconds": round(1000 * cpu / len(clips), 2),
        "equal": max(differences) <= ROUNDING,
        "mean_difference": round(max(differences), 3),
        "clips": len(clips),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        long = write_clip(Path(folder) / "long.mp4", 1080, 1920, 10 * FPS, 0, repeats=60)
        short = [
            write_clip(Path(folder) / f"{seed}.mp4", 360, 640, FPS * (4 + seed % 9), seed)
            for seed in range(20)
        ]
        parts = {
            "10 min 1080p": compared([long], arguments.rounds, arguments.threads, 1),
            "4 to 12 s 360p": compared(short, arguments.rounds, arguments.threads, 2),
        }
    slowest = min(parts.values(), key=lambda part: part["ratio"])
    head = {name: slowest[name] for name in ("ratio", "ratio_min", "ratio_max")}
    sizes = {"frames": BUDGET.max_frames, "threads": arguments.threads, "frame_pixels": BUDGET.frame_pixels}
    return (
        head
        | {"equal": all(part["equal"] for part in parts.values()), "sizes": sizes, "parts": parts}
        | machine(torch.device("cpu"))
    )


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each decoder")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
