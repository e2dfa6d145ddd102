"""An evaluation that decodes while it generates, against one that decodes and then generates.

    python -m benchmarks.evaluation --json [--questions 40] [--frames 8,16] [--order ordered,shuffled]

Both ask the lab's small model the same questions about the same clips with the same seeds, and must give the
same answers (`equal`). The plain loop does what an evaluation script does: for each frame count and batch it
decodes every clip, makes the prompts of all orders, and generates. The other is `video_r1.evaluation`.
`decoding_share` is the share of the plain loop's time that is spent on decoding.

`ratio` is without a frame cache; `ratio_cached` with one that an earlier run has filled; `ratio_one_count`
with the first frame count and the ordered frames alone, where there is nothing to gain but the overlap.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks._command import benchmark_parser
from benchmarks._timing import compare, in_turns, machine, seconds, spread
from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import PromptBuilder, shuffled_order
from video_r1.data.reading import derived_generator
from video_r1.evaluation.predictions import evaluate
from video_r1.evaluation.question_loop import sampling_seed
from video_r1.lab.clips import write_clip
from video_r1.lab.model import base_folder, frame_side
from video_r1.models.loading import load_model, load_processor
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.settings.decoding import EvalSettings
from video_r1.settings.frames import FrameBudget, Order

SEED = 0
Answers = dict[tuple[str | int, str, int], str]  # problem_id, order, frame count: the output


@dataclass(frozen=True, slots=True)
class Work:
    """What both evaluations are given."""

    samples: Sequence[Sample]
    engine: TransformersEngine
    builder: PromptBuilder
    budget: FrameBudget
    counts: Sequence[int]
    orders: Sequence[Order]
    sampling: SamplingSettings
    batch_size: int


def write_clips(folder: Path, count: int, width: int, height: int, length: float, fps: float) -> list[Sample]:
    """Clips of smooth noise that moves, each with its own question."""
    samples = []
    for number in range(count):
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (height // 8 + 32, width // 8 + 32, 3)).astype(np.uint8)
        picture = torch.from_numpy(small).permute(2, 0, 1)[None].float()
        large = torch.nn.functional.interpolate(picture, scale_factor=8, mode="bilinear")[0]
        texture = large.clamp(0, 255).byte().permute(1, 2, 0).numpy()
        steps = np.arange(int(length * fps)) % 200
        frames = np.stack([texture[step : step + height, step : step + width] for step in steps])
        write_clip(folder / f"{number}.mp4", frames, fps)
        samples.append(
            Sample(
                problem_id=number,
                problem="Which way does the picture move?",
                data_type="video",
                problem_type="multiple choice",
                solution="<answer>A</answer>",
                path=str(folder / f"{number}.mp4"),
                options=("A. up", "B. down"),
            )
        )
    return samples


def plain_loop(work: Work, decoding: list[float]) -> Answers:
    """Decode, build, generate, in turn. The seconds of decoding are added to `decoding`."""
    answers: Answers = {}
    for count in work.counts:
        budget = replace(work.budget, max_frames=count)
        for start in range(0, len(work.samples), work.batch_size):
            asked, prompts, seeds = [], [], []
            for sample in work.samples[start : start + work.batch_size]:
                began = time.perf_counter()
                media = read_media(sample, budget)
                decoding.append(time.perf_counter() - began)
                for order in work.orders:
                    generator = derived_generator(SEED, sample.problem_id)
                    shuffled = shuffled_order(len(media.frames), generator) if order == "shuffled" else None
                    prompts.append(work.builder.build(sample, media, shuffled))
                    asked.append((sample.problem_id, order, count))
                    seeds.append(sampling_seed(SEED, count, sample, order))
            outputs = work.engine.sample(prompts, replace(work.sampling, seed=tuple(seeds)))
            answers |= {key: rollouts[0].text for key, rollouts in zip(asked, outputs, strict=True)}
    return answers


def overlapped(work: Work, cache: Path | None = None) -> Answers:
    """`evaluate`, its predictions files included."""
    with tempfile.TemporaryDirectory() as folder:
        evaluate(
            work.samples,
            work.engine,
            work.builder,
            work.budget,
            EvalSettings(
                order=list(work.orders),
                frames=list(work.counts),
                temperature=work.sampling.temperature,
                top_p=work.sampling.top_p,
                max_new_tokens=work.sampling.max_tokens,
                batch_size=work.batch_size,
                seed=SEED,
                frame_cache=None if cache is None else str(cache),
            ),
            Path(folder),
        )
        lines = [
            line for file in Path(folder).glob("predictions-*") for line in file.read_text().splitlines()
        ]
    records = map(json.loads, lines)
    return {(record["problem_id"], record["order"], record["frames"]): record["output"] for record in records}


def ratio(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """Median of other ÷ ours over rounds in turns."""
    device = torch.device("cpu")
    pairs = in_turns(lambda: seconds(ours, device), lambda: seconds(other, device), rounds)
    return spread(b / a for a, b in pairs)["ratio"]


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    samples = write_clips(
        folder, arguments.questions, arguments.width, arguments.height, arguments.seconds, arguments.clip_fps
    )
    processor = load_processor(str(base_folder()))
    model = load_model(str(base_folder()), "float32", device=str(device))
    model.generation_config.eos_token_id = None  # every output has max_tokens
    decode = processor.tokenizer.batch_decode
    endless = SimpleNamespace(get_vocab=dict, eos_token_id=None, batch_decode=decode)
    engine = TransformersEngine(model, endless)
    clip = f"{arguments.width} x {arguments.height}, {arguments.seconds:g} s at {arguments.clip_fps:g}"
    counts = [int(count) for count in arguments.frames.split(",")]
    orders: list[Order] = arguments.order.split(",")
    pixels = frame_side(processor) ** 2
    budget = FrameBudget(fps=arguments.clip_fps, frame_pixels=pixels, image_pixels=pixels)
    sampling = SamplingSettings(temperature=0.01, top_p=0.001, max_tokens=arguments.max_tokens)
    builder = PromptBuilder(processor)
    work = Work(samples, engine, builder, budget, counts, orders, sampling, arguments.batch_size)
    decoding: list[float] = []
    expected = plain_loop(work, decoding)  # also a warm-up
    decoding.clear()
    whole = seconds(lambda: plain_loop(work, decoding), device)
    cache = folder / "cache"
    equal = overlapped(work, cache) == expected == overlapped(work) == overlapped(work, cache)
    result = compare(lambda: overlapped(work), lambda: plain_loop(work, []), arguments.rounds, device)
    single = replace(work, counts=counts[:1], orders=["ordered"])
    return (
        result
        | {
            "ratio_cached": ratio(
                lambda: overlapped(work, cache), lambda: plain_loop(work, []), arguments.rounds
            ),
            "ratio_one_count": ratio(
                lambda: overlapped(single), lambda: plain_loop(single, []), arguments.rounds
            ),
            "decoding_share": round(sum(decoding) / whole, 3),
            "decoding_share_one_count": decoding_share(single, device),
            "equal": equal,
            "questions_per_second": round(len(expected) / result["seconds"], 2),
            "sizes": {
                "model": "lab",
                "weights": sum(p.numel() for p in model.parameters()),
                "questions": len(samples),
                "frames": counts,
                "orders": orders,
                "completion": arguments.max_tokens,
                "batch": arguments.batch_size,
                "clip": clip,
            },
        }
        | machine(device)
    )


def decoding_share(work: Work, device: torch.device) -> float:
    decoding: list[float] = []
    whole = seconds(lambda: plain_loop(work, decoding), device)
    return round(sum(decoding) / whole, 3)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--frames", default="8,16", help="frame counts")
    parser.add_argument("--order", default="ordered,shuffled")
    parser.add_argument("--max-tokens", type=int, default=24, help="tokens of every output")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--clip-fps", type=float, default=24.0)
    parser.add_argument("--threads", type=int, default=1, help="threads that generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(parser.parse_args(), Path(folder))))


if __name__ == "__main__":
    main()
