"""What a T-GRPO run over many videos needs, and where it breaks first: a flow model, and a simulation of it.

    python -m benchmarks.scale --json [--videos 26000000] [--gpus 64] [--measure]
    python -m benchmarks.scale --table        the tables of docs/scale.md

    clips ──► media ──► samplers ──► update ──► hand-over ──► (checkpoint)
    storage   fetch,    prefill,     forward,   new weights
              decode    tokens       backward   to samplers

A step's questions are read ahead, sampled on GPUs of their own by weights that are one update old, and learnt
meanwhile (`async_rollouts: 1`). While weights are handed over, both sides wait. So a step takes

    max(media, max(sample, update) + hand-over)      with the checkpoint in the update of some steps

CPU costs are measured (the benchmark is named); those of GPUs are a model: operations ÷ rate, bytes ÷
bandwidth. All are options, and stand in the output. `--measure` decodes and fetches made-up clips here.
"""

from __future__ import annotations

import functools
import heapq
import http.server
import json
import math
import random
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks._command import benchmark_parser

DAY = 86_400
FLEETS = [(260_000, 8), (260_000, 64), (26_000_000, 64), (26_000_000, 512)]  # videos, GPUs


def cost(value: float, source: str) -> Any:
    """A field of `Fleet`, an option of this command: its default, and where that is from."""
    return field(default=value, metadata={"from": source})


@dataclass(frozen=True)
class Fleet:
    """A fleet, and what a question costs it. Units are in the names; mb and gb are 10⁶ and 10⁹ bytes."""

    videos: int = 260_000  # questions of an epoch, a clip each
    gpus: int = 64  # samplers and trainers together
    samplers: int = 0  # 0: as many as make the epoch shortest
    machine_gpus: int = cost(8, "assumed: GPUs of a machine")
    machine_cores: int = cost(96, "assumed: cores of a machine")
    questions_per_gpu: int = cost(4, "assumed: questions of a step, for each GPU of the fleet")
    media_threads: int = cost(4, "recipe video-r1-7b-tgrpo, of each trainer")
    clip_mb: float = cost(2.4, "published set: 310 GB less 146,000 images of 0.2 MB, by 116,000 videos")
    decode_ms: float = cost(50, "measured: benchmarks.decode (360p, 46 ms) ÷ benchmarks.workers (0.95)")
    request_ms: float = cost(50, "assumed: until the first byte comes from object storage")
    stream_mb_s: float = cost(50, "assumed: one transfer from object storage")
    frame_mb: float = cost(4.8, "exact: 16 frames of 128 · 28 · 28 pixels, 3 bytes each")
    weights: float = cost(8.29e9, "exact: Qwen2.5-VL-7B with its vision tower")
    kv_bytes: float = cost(57_344, "exact: keys and values of a token, bf16, 28 layers of 4 heads of 128")
    prompt: float = cost(1324, "exact: 1,024 tokens of a clip; assumed: 300 of text")
    tokens: float = cost(400, "assumed: mean length of a completion")
    longest: float = cost(768, "recipe: max_completion_length; a step waits for its longest completion")
    ordered: int = cost(8, "recipe: num_generations")
    shuffled: int = cost(4, "recipe: num_contrast_generations")
    tflops: float = cost(400, "model: bf16 on an H100, 40 % of its peak")
    memory_gb_s: float = cost(2000, "model: an H100's memory, 60 % of its peak")
    link_gb_s: float = cost(300, "model: between two GPUs of a machine")
    network_gb_s: float = cost(40, "model: of a GPU to other machines")
    disk_gb_s: float = cost(2, "assumed: a shared disk, written by all trainers together")
    save_steps: int = cost(100, "recipe video-r1-7b-tgrpo")
    manifest_s: float = cost(34, "measured: benchmarks.manifest (9 s for 263,071 rows), for a million rows")
    manifest_gb: float = cost(1.1, "measured: benchmarks.manifest (0.29 GB), for a million rows")
    spread: float = cost(0.5, "assumed: deviation ÷ mean of the time to read a clip, in the simulation")

    @property
    def questions(self) -> int:
        """Of a step."""
        return self.questions_per_gpu * self.gpus

    @property
    def trainers(self) -> int:
        return self.gpus - self.samplers


COSTS = [cost for cost in fields(Fleet) if cost.metadata]


@dataclass(frozen=True)
class Stage:
    """Equal workers that share a step's questions: one takes `fixed` + its questions × `unit` seconds."""

    name: str
    workers: int
    unit: float
    fixed: float = 0.0
    ahead: bool = False  # it works on later steps meanwhile, so that a share need not be whole

    def seconds(self, questions: int) -> float:
        """For the questions of one step."""
        share = questions / self.workers
        return self.fixed + (share if self.ahead else math.ceil(share)) * self.unit


@dataclass(frozen=True)
class Flow:
    """The stages of a step, and what stops them, in seconds."""

    media: Stage
    sample: Stage
    update: Stage
    hand_over: float
    checkpoint: float
    save_steps: int


def flow_of(fleet: Fleet) -> Flow:
    """Stages of a fleet, from what a question costs."""
    f = fleet
    all_weights = 2 * f.weights  # bytes in bf16
    between = f.network_gb_s if f.gpus > f.machine_gpus else f.link_gb_s
    completions = f.ordered + f.shuffled
    fetch = f.request_ms / 1e3 + f.clip_mb / f.stream_mb_s
    cores = f.machine_cores * math.ceil(f.trainers / f.machine_gpus)
    readers = min(f.media_threads * f.trainers, cores)
    # Two prefills, one of each frame order. Then the longest completion's tokens one by one: each reads all
    # weights once, and the keys and values of what is still being written.
    prefill = 2 * 2 * f.weights * f.prompt / (f.tflops * 1e12)
    cached = f.prompt + f.tokens / 2
    tokens = completions * f.tokens * cached * f.kv_bytes / (f.memory_gb_s * 1e9)
    each_token = f.longest * all_weights / (f.memory_gb_s * 1e9)
    # The row of a question: the prompt once, then its ordered completions. Forward, once more for the
    # checkpointed activations, twice as much backward, and the reference: ten operations a weight and token.
    # Meanwhile FSDP gathers the weights twice and scatters the gradients once.
    row = f.prompt + f.ordered * f.tokens
    compute = 10 * f.weights * row / (f.tflops * 1e12)
    gather = 3 * all_weights / (between * 1e9) if f.trainers > 1 else 0.0
    optimizer = 16 * f.weights / f.trainers * 2 / (f.memory_gb_s * 1e9)
    return Flow(
        Stage("media", readers, fetch + f.decode_ms / 1e3, ahead=True),
        Stage("sample", f.samplers, prefill + tokens, each_token),
        Stage("update", f.trainers, max(compute, gather), optimizer),
        all_weights / (between * 1e9),
        12 * f.weights / (f.disk_gb_s * 1e9),
        f.save_steps,
    )


def step_seconds(flow: Flow, questions: int) -> float:
    """The closed form: mean seconds of a step once the pipeline is full."""
    sample, update = flow.sample.seconds(questions), flow.update.seconds(questions)
    plain = max(sample, update) + flow.hand_over
    saving = max(sample, update + flow.checkpoint) + flow.hand_over
    mean = (plain * (flow.save_steps - 1) + saving) / flow.save_steps
    return max(flow.media.seconds(questions), mean)


def bottleneck(flow: Flow, questions: int) -> str:
    """The stage that all others wait for."""
    waits = {stage.name: stage.seconds(questions) for stage in (flow.sample, flow.update)}
    slower = max(waits, key=waits.__getitem__)
    media = flow.media.seconds(questions)
    return slower if media < step_seconds(flow, questions) else flow.media.name


def simulate(flow: Flow, questions: int, steps: int, spread: float, seed: int = 0, ahead: int = 2) -> float:
    """Mean seconds of a step, of `steps` after the pipeline has filled, event by event.

    Each clip takes a time of its own (gamma-distributed); readers are at most `ahead` steps before samplers.
    """
    draw = random.Random(seed)
    readers = [0.0] * flow.media.workers
    begun: list[float] = []  # when each step's rollouts began
    sampled: list[float] = []
    handed: list[float] = []
    trainer = sampler = 0.0
    for step in range(steps + 10):
        allowed = begun[step - ahead] if step >= ahead else 0.0
        read = 0.0
        for _ in range(questions):
            cost = draw.gammavariate(spread**-2, flow.media.unit * spread**2) if spread else flow.media.unit
            end = max(heapq.heappop(readers), allowed) + cost
            heapq.heappush(readers, end)
            read = max(read, end)
        begun.append(max(read, sampler, handed[step - 2] if step >= 2 else 0.0))
        sampled.append(begun[step] + flow.sample.seconds(questions))
        sampler = sampled[step]
        if step == 0:
            continue
        # The update on the step before, while this step is sampled; both wait for the hand-over.
        update = max(sampled[step - 1], trainer, handed[-1] if handed else 0.0) + flow.update.seconds(
            questions
        )
        if step % flow.save_steps == 0:
            update += flow.checkpoint
        handed.append(max(update, sampled[step]) + flow.hand_over)
        trainer = handed[-1]
    return (handed[-1] - handed[8]) / (len(handed) - 9)


def best_split(fleet: Fleet) -> Fleet:
    """The fleet with the number of samplers that makes the epoch shortest."""
    if fleet.samplers:
        return fleet
    splits = (replace(fleet, samplers=samplers) for samplers in range(1, fleet.gpus))
    return min(splits, key=lambda split: step_seconds(flow_of(split), fleet.questions))


def figures(fleet: Fleet, simulated_steps: int = 200) -> dict[str, Any]:
    """Everything that is said of one fleet."""
    fleet = best_split(fleet)
    flow, questions = flow_of(fleet), fleet.questions
    step, steps = step_seconds(flow, questions), math.ceil(fleet.videos / questions)
    simulated = simulate(flow, questions, simulated_steps, fleet.spread)
    rate = questions / step
    millions = fleet.videos / 1e6
    stages = (flow.media, flow.sample, flow.update)
    return {
        "videos": int(fleet.videos),
        "gpus": fleet.gpus,
        "samplers": fleet.samplers,
        "trainers": fleet.trainers,
        "samplers_per_trainer": round(fleet.samplers / fleet.trainers, 2),
        "questions_per_step": questions,
        "stage_seconds": {stage.name: round(stage.seconds(questions), 3) for stage in stages}
        | {"hand_over": round(flow.hand_over, 3), "checkpoint": round(flow.checkpoint, 1)},
        "question_seconds": {stage.name: round(stage.unit, 4) for stage in stages},
        "readers": flow.media.workers,
        "bottleneck": bottleneck(flow, questions),
        "step_seconds": round(step, 3),
        "step_seconds_simulated": round(simulated, 3),
        "simulated_ratio": round(simulated / step, 3),
        "questions_per_second": round(rate, 2),
        "steps": steps,
        "epoch_days": round(steps * step / DAY, 2),
        "read_mb_per_second": round(rate * fleet.clip_mb, 1),
        "cores_decoding": round(rate * fleet.decode_ms / 1e3, 1),
        "clips_tb": round(fleet.videos * fleet.clip_mb / 1e6, 2),
        "frame_cache_tb": round(fleet.videos * fleet.frame_mb / 1e6, 2),
        "hand_over_gb": round(2 * fleet.weights / 1e9, 1),
        "hand_over_pb_epoch": round(2 * fleet.weights * steps / 1e15, 2),
        "checkpoint_gb": round(12 * fleet.weights / 1e9, 1),
        "checkpoints": steps // fleet.save_steps,
        "manifest_minutes": round(fleet.manifest_s * millions / 60, 1),
        "manifest_gb_machine": round(
            fleet.manifest_gb * millions * min(fleet.machine_gpus, fleet.trainers), 1
        ),
    }


def fleets_table() -> str:
    """The fleets of docs/scale.md side by side, in Markdown."""
    found = [figures(Fleet(videos, gpus)) for videos, gpus in FLEETS]
    rows = [(name, [f[name] for f in found]) for name in found[0] if not isinstance(found[0][name], dict)]
    rows += [
        (f"seconds of a step: {name}", [f["stage_seconds"][name] for f in found])
        for name in found[0]["stage_seconds"]
    ]
    lines = [
        f"| {name.replace('_', ' ')} | {' | '.join(f'{v:,}' if v != str(v) else v for v in values)} |"
        for name, values in rows
    ]
    return "\n".join([lines[0], "|---" * (1 + len(found)) + "|", *lines[1:]])


def costs_table() -> str:
    """What is put in, in Markdown."""
    lines = ["| option | value | from |", "|---|---|---|"]
    lines += [f"| `--{cost.name}` | {cost.default:,} | {cost.metadata['from']} |" for cost in COSTS]
    return "\n".join(lines)


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def measured() -> dict[str, float]:
    """Milliseconds to decode a clip of 360p and to fetch it from a server on this machine, medians of 12."""
    from benchmarks.decode import FPS, write_clip
    from video_r1.data.decoding.decoders import read_media
    from video_r1.data.manifests.records import Sample
    from video_r1.data.sources.remote import RemoteCache
    from video_r1.settings.frames import FrameBudget

    decoding, fetching, sizes = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        handler = functools.partial(_Files, directory=name)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            cache = RemoteCache(folder / "copies", 10**10)
            for seed in range(13):
                path = write_clip(folder / f"{seed}.mp4", 360, 640, FPS * (4 + seed % 9), seed)
                sizes.append(path.stat().st_size / 1e6)
                start = time.perf_counter()
                with cache.file(f"http://127.0.0.1:{server.server_port}/{path.name}") as copy:
                    fetching.append(time.perf_counter() - start)
                    sample = Sample(0, "?", "video", "free-form", "<answer>x</answer>", copy)
                    start = time.perf_counter()
                    read_media(sample, FrameBudget())
                    decoding.append(time.perf_counter() - start)
            server.shutdown()
    # the first one starts the decoder and the connection
    return {
        "decode_ms": round(1e3 * statistics.median(decoding[1:]), 2),
        "fetch_ms": round(1e3 * statistics.median(fetching[1:]), 2),
        "measured_clip_mb": round(statistics.mean(sizes[1:]), 3),
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--videos", type=int, default=Fleet.videos, help="questions of an epoch, a clip each")
    parser.add_argument("--gpus", type=int, default=Fleet.gpus, help="samplers and trainers together")
    parser.add_argument("--samplers", type=int, default=0, help="of these (default: the best number)")
    parser.add_argument("--measure", action="store_true", help="decode and fetch made-up clips here first")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/scale.md")
    for cost in COSTS:
        said = f"{cost.metadata['from']} [{cost.default:g}]".replace("%", "%%")
        parser.add_argument(f"--{cost.name}", type=type(cost.default), default=cost.default, help=said)
    arguments = vars(parser.parse_args())
    if arguments["table"]:
        print(f"{costs_table()}\n\n{fleets_table()}")
        return
    found = measured() if arguments["measure"] else {}
    put_in = {name.name: arguments[name.name] for name in fields(Fleet)}
    put_in |= {name: value for name, value in found.items() if name == "decode_ms"}
    sources = {cost.name: "measured here" if cost.name in found else cost.metadata["from"] for cost in COSTS}
    assumed = {name: {"value": put_in[name], "from": source} for name, source in sources.items()}
    print(
        json.dumps({"benchmark": "scale", **figures(Fleet(**put_in)), "measured": found, "assumed": assumed})
    )


if __name__ == "__main__":
    main()
