"""Study of temporal rewards on the lab: arms × shares of marked clips × seeds, each run a run folder.

    python -m research.temporal_credit.study runs/study --arms grpo,likelihood --rates 0.9 --seeds 3

OUT/seed-S/cold-start/        lab and SFT run from which all arms of the seed start
OUT/seed-S/test/              test.json, test-cued.json, test-lying.json
OUT/seed-S/rl-RATE/           training questions in videos.json; a share RATE carries a mark with the answer
OUT/seed-S/RATE-ARM/          a run folder, its evaluations, and result.json once the run is complete
OUT/study.json, .md, .png     all results, their tables and picture

Runs that have a result.json are not repeated, so a study can be interrupted, continued and extended with more
seeds, rates or arms. Each step is a `video-r1` command.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from research.temporal_credit.figure import draw_study
from research.temporal_credit.tables import study_tables
from video_r1.files import claimed, replace_json, replace_text

CONTROL = "grpo"
ARMS: dict[str, dict[str, Any]] = {
    CONTROL: {"temporal_rule": "off"},
    "margin": {"temporal_rule": "margin"},
    "threshold": {"temporal_rule": "threshold"},
    "margin-none": {"temporal_rule": "margin", "scale_rewards": "none"},
    "margin-task": {"temporal_rule": "margin", "scale_rewards": "task"},
    "weight": {"temporal_rule": "weight", "temporal_weight_kappa": 10.0},
    "likelihood": {"temporal_rule": "likelihood"},
    "likelihood-reversed": {"temporal_rule": "likelihood", "temporal_contrast": "reversed"},
    "likelihood-frozen": {"temporal_rule": "likelihood", "temporal_contrast": "frozen"},
    "apart": {"temporal_rule": "likelihood_apart", "temporal_alpha": 1.0},
    "gate": {"temporal_rule": "likelihood_gate", "temporal_alpha": 0.9},
    "gate-frozen": {"temporal_rule": "likelihood_gate", "temporal_alpha": 0.9, "temporal_contrast": "frozen"},
    "tokens": {"temporal_rule": "tokens", "temporal_weight_kappa": 10.0},
    "audit": {"temporal_rule": "off", "keep": "shuffled < 0.3 and frozen < 0.3"},
    "unmarked": {"temporal_rule": "off"},
}
"""Settings of each arm that differ from the recipe lab-tgrpo."""
BOUND = "unmarked"  # plain GRPO on the clips without marks: no rule can know more
HASTY, MARKED, TRUSTING = 0.6, 0.5, 0.5  # settings of `video-r1 lab make` for a cold start
SFT_STEPS = 320
QUESTIONS = 2400  # made for RL; a fifth of them are about images and are not used
QUESTION_SEED_OFFSET = 1000  # RL questions differ from those of the cold start
VIDEOS = "videos.json"
TESTS = {
    "test": ("ordered", "shuffled", "reversed", "frozen"),
    "test-cued": ("ordered",),
    "test-lying": ("ordered",),
}
"""Test manifests, and the frame orders of each."""
HABITS = ("mark", "one look")
"""First words of a chain of thought that does not list what is seen."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study."""

    out: Path
    arms: Sequence[str] = tuple(ARMS)
    rates: Sequence[float] = (0.0, 0.5, 0.9)
    seeds: int = 5
    first_seed: int = 0
    steps: int = 160
    train: int = 3200
    test: int = 400
    workers: int = 2


class Job(NamedTuple):
    """One run of the study."""

    out: Path
    seed: int
    rate: float
    arm: str

    @property
    def seed_folder(self) -> Path:
        return self.out / f"seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.seed_folder / f"{self.rate:g}-{self.arm}"


def run_study(settings: StudySettings) -> int:
    """Make the missing runs, then study.json, its tables and picture. Returns 1 if a run failed."""
    with claimed(settings.out):
        seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
        failed = make_runs(settings, {seed: missing_jobs(settings, seed) for seed in seeds})
        results = [
            json.loads(path.read_text("utf-8")) for path in sorted(settings.out.glob("seed-*/*/result.json"))
        ]
        replace_json(settings.out / "study.json", results)
        replace_text(settings.out / "study.md", study_tables(results, CONTROL))
        if results:
            draw_study(results, CONTROL, settings.out / "study.png")
    return min(failed, 1)


def missing_jobs(settings: StudySettings, seed: int) -> list[Job]:
    """List a seed's runs that have no result yet."""
    jobs = [Job(settings.out, seed, *which) for which in itertools.product(settings.rates, settings.arms)]
    jobs = [job for job in jobs if job.rate or job.arm != BOUND]  # without marks the bound is the control
    return [job for job in jobs if not (job.folder / "result.json").is_file()]


def make_runs(settings: StudySettings, jobs: dict[int, list[Job]]) -> int:
    """Run the jobs of each seed after its cold start; the next cold start is made meanwhile.

    Returns the number of jobs that failed.
    """
    order = [seed for seed, missing in jobs.items() if missing]
    failed: list[Job] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(settings.workers, mp_context=context, max_tasks_per_child=1) as pool,
        killed_on_error(pool),
    ):

        def ended(future: Future[None], its: list[Job]) -> None:
            error = future.exception()
            failed.extend(its if error else [])
            for job in its:
                print(f"{job.folder}: {f'{type(error).__name__}: {error}' if error else 'done'}", flush=True)

        cold_starts: dict[int, Future[None]] = {}
        runs: list[Future[None]] = []
        for place, seed in enumerate(order):
            for near in order[place : place + 2]:
                if near not in cold_starts:
                    folder = settings.out / f"seed-{near}/cold-start"
                    cold_starts[near] = pool.submit(logged, folder, make_cold_start, settings, near)
            if cold_starts[seed].exception():  # waits for it
                ended(cold_starts[seed], jobs[seed])
                continue
            for job in jobs[seed]:
                runs.append(pool.submit(logged, job.folder, make_run, settings, job))
                runs[-1].add_done_callback(partial(ended, its=[job]))
        wait(runs)
    return len(failed)


@contextmanager
def killed_on_error(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Kill the pool's processes and their children if an exception or Ctrl-C leaves the block."""
    try:
        yield
    except BaseException:  # Ctrl-C above all; raised again after the runs are killed
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            assert process.pid
            with suppress(ProcessLookupError):  # a process that has only just started leads no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        raise


def logged(folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work` with one thread in its own process group; its output goes to a log beside `folder`."""
    import torch

    os.setpgid(0, 0)
    torch.set_num_threads(1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*arguments)


def video_r1(*words: object, **options: object) -> None:
    """Run a `video-r1` command in this process. Raises RuntimeError if it fails."""
    from video_r1.cli import main

    pairs = [(f"--{name}", str(value)) for name, value in options.items()]
    argv = [*map(str, words), *itertools.chain.from_iterable(pairs)]
    if code := main(argv):
        raise RuntimeError(f"video-r1 {' '.join(argv)} ended with exit code {code}")


def make_cold_start(settings: StudySettings, seed: int) -> None:
    """Make a seed's labs, and a cold start that lists its observations, guesses at once or reads the mark."""
    folder = settings.out / f"seed-{seed}"
    cold = folder / "cold-start"
    lessons = {"hasty": HASTY, "shortcut": MARKED, "trusting": TRUSTING}
    labs = {
        folder / "test": {"train": 0, "test": settings.test, "seed": seed, "shortcut": 1.0},
        cold / "lab": {"train": settings.train, "test": 0, "seed": seed, **lessons},
    }
    for rate in settings.rates:
        questions = {"train": QUESTIONS, "test": 0, "seed": seed + QUESTION_SEED_OFFSET, "shortcut": rate}
        labs[folder / f"rl-{rate:g}"] = questions
    for lab, made in labs.items():
        if not (lab / VIDEOS).is_file():  # written last
            video_r1("lab", "make", lab, workers=1, **made)
            rows = json.loads((lab / "rl.json").read_text("utf-8"))
            # No temporal reward reaches an image, and marked images teach to read marks.
            replace_json(lab / VIDEOS, [row for row in rows if row["data_type"] == "video"])
    if (cold / "weights.json").is_file():
        return
    run = emptied(cold / "run")
    video_r1(
        "sft", "lab-sft", train_manifest=cold / "lab/sft.json", output_dir=run, seed=seed, max_steps=SFT_STEPS
    )
    weights = sha256((run / "model.safetensors").read_bytes()).hexdigest()
    replace_json(cold / "weights.json", {"sha256": weights})


def make_run(settings: StudySettings, job: Job) -> None:
    """Train one arm with RL, evaluate it and write its result.json."""
    folder, cold = emptied(job.folder), job.seed_folder / "cold-start"
    manifest = job.seed_folder / f"rl-{job.rate:g}" / VIDEOS
    if "keep" in ARMS[job.arm]:
        manifest = audited(manifest, cold / "run", job.seed)
    if job.arm == BOUND:
        manifest = unmarked(manifest)
    run = {"model_name_or_path": cold / "run", "train_manifest": manifest, "output_dir": folder}
    video_r1("rl", "lab-tgrpo", max_steps=settings.steps, seed=job.seed, **run, **ARMS[job.arm])
    for name, orders in TESTS.items():
        manifest = job.seed_folder / f"test/{name}.json"
        video_r1(
            "eval", "lab-eval", model=folder, manifest=manifest, out=folder / name, order=",".join(orders)
        )
    replace_json(
        folder / "result.json",
        {
            "seed": job.seed,
            "rate": job.rate,
            "arm": job.arm,
            "settings": ARMS[job.arm],
            "steps": settings.steps,
            "cold_start": json.loads((cold / "weights.json").read_text("utf-8"))["sha256"][:16],
            **test_figures(folder),
            **training_figures(folder),
        },
    )


def emptied(folder: Path) -> Path:
    """Return the folder, empty; an unfinished run in it would be continued otherwise."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def audited(manifest: Path, model: Path, seed: int) -> Path:
    """Write the manifest with the model's pass rates beside it and return its path."""
    out = manifest.with_name(f"{manifest.stem}.audited.json")
    sampling = {"samples": 4, "temperature": 0.7, "batch_size": 64, "max_new_tokens": 64}
    video_r1("data", "audit", manifest, model=model, seed=seed, out=out, **sampling)
    return out


def unmarked(manifest: Path) -> Path:
    """Write the rows without a mark to a manifest beside this one and return its path."""
    rows = [row for row in json.loads(manifest.read_text("utf-8")) if not row["mark"]]
    out = manifest.with_name(f"{manifest.stem}-{BOUND}.json")
    replace_json(out, rows)
    return out


def test_figures(folder: Path) -> dict[str, Any]:
    """Return accuracies over the test videos and shares of answers by habit.

    Keys of both are views: the frame orders of the unmarked test, `cued` and `lying`.
    """
    accuracy, habits = {}, {}
    for name, orders in TESTS.items():
        (file,) = (folder / name).glob("predictions-*.jsonl")
        records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for order in orders:
            view = name.partition("-")[2] or order
            chosen = [r for r in records if r["order"] == order and r["data_type"] == "video"]
            accuracy[view] = fmean(record["score"] for record in chosen)
            chains = [record["output"].removeprefix("<think>") for record in chosen]
            habits[view] = {habit: fmean(chain.startswith(habit) for chain in chains) for habit in HABITS}
    return {"accuracy": accuracy, "habits": habits}


def training_figures(folder: Path) -> dict[str, Any]:
    """Return means over all steps of the videos' accuracy reward and of the temporal credit, and the median
    seconds of a step.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [line["time"] for line in lines]
    credits = [line["temporal/credit"] for line in lines if line.get("temporal/credit") is not None]
    return {
        "training_accuracy": fmean(line["reward/accuracy/video"] for line in lines),
        "step_seconds": median(after - before for before, after in itertools.pairwise(times)),
        "credit": fmean(credits) if credits else None,
    }


def read_settings(words: Sequence[str] | None = None) -> StudySettings:
    """Parse the command line."""
    default = StudySettings(out=Path())
    parser = argparse.ArgumentParser(
        description="Compare temporal rewards on the lab, with seeds and intervals."
    )

    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(each) for each in text.split(",")]

    parser.add_argument("out", type=Path, help="folder for labs, cold starts, runs, study.json and study.md")
    parser.add_argument(
        "--arms", type=several(str), default=default.arms, help="comma-separated (default: all)"
    )
    parser.add_argument("--rates", type=several(float), default=default.rates, help="shares of marked clips")
    parser.add_argument(
        "--seeds", type=int, default=default.seeds, help="cold starts, each with every arm and rate"
    )
    parser.add_argument("--first_seed", type=int, default=default.first_seed)
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps of a run")
    parser.add_argument("--train", type=int, default=default.train, help="questions of a cold start")
    parser.add_argument("--test", type=int, default=default.test, help="questions of a test")
    parser.add_argument(
        "--workers", type=int, default=default.workers, help="runs at a time, one thread each"
    )
    settings = StudySettings(**vars(parser.parse_args(words)))
    if unknown := [arm for arm in settings.arms if arm not in ARMS]:
        parser.error(f"unknown arms {', '.join(unknown)}; choose from {', '.join(ARMS)}")
    return settings


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(run_study(read_settings()))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues with the missing runs")
