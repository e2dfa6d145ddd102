"""What temporal rewards give on the lab: arms, shares of marked clips and seeds, each run a run folder.

OUT/seed-S/cold-start/        lab and SFT run from which all arms of the seed begin
OUT/seed-S/test/              test.json, test-cued.json, test-lying.json
OUT/seed-S/rl-RATE/           training questions, of which RATE carry a mark that says the answer: videos.json
OUT/seed-S/RATE-ARM/          a run folder, its evaluations, and result.json once all of it is there
OUT/study.json, .md, .svg     all results, and the tables and the picture made of them

A run that has its result.json is not made again, so that an ended study goes on where it was, with more
seeds, rates or arms.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from video_r1.errors import RequestError
from video_r1.files import claimed, replace_json, replace_text
from video_r1.lab.study_figure import study_svg
from video_r1.lab.study_tables import study_tables
from video_r1.progress import Progress
from video_r1.recipe import load_recipe
from video_r1.settings.commands import LabSettings, StudySettings
from video_r1.settings.decoding import AuditSettings, EvalSettings

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
"""What each arm sets beside the recipe lab-tgrpo."""
BOUND = "unmarked"  # plain GRPO that is told which clips are marked, and leaves them out: no rule knows more
HASTY, MARKED, TRUSTING = 0.6, 0.5, 0.5  # of a cold start: see LabSettings
SFT_STEPS = 320
QUESTIONS = 2400  # made for RL; those about images, one of five, are left out
OTHER_QUESTIONS = 1000  # added to a seed for the training questions, which no cold start has seen
VIDEOS = "videos.json"
TESTS = {
    "test": ("ordered", "shuffled", "reversed", "frozen"),
    "test-cued": ("ordered",),
    "test-lying": ("ordered",),
}
"""Manifests that a run is tested on, and the frame orders of each."""
BEGINNINGS = {"mark": "mark", "one look": "one look"}
"""How an answer is had, by the first words of its chain; anything else lists what is seen."""


class Job(NamedTuple):
    """A run of the study."""

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
    """Makes the runs that are missing, then study.json with tables and picture. Returns 1 if a run failed.

    Raises RequestError for an arm that there is none of.
    """
    if unknown := [arm for arm in settings.arms if arm not in ARMS]:
        raise RequestError(f"arms: {', '.join(unknown)} is none of {', '.join(ARMS)}")
    assert settings.out is not None
    out = Path(settings.out)
    with claimed(out):
        seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
        failed = _make_runs(settings, {seed: _missing(settings, seed) for seed in seeds})
        write_tables(out)
    return min(failed, 1)


def _missing(settings: StudySettings, seed: int) -> list[Job]:
    every = itertools.product(settings.rates, settings.arms or ARMS)
    jobs = [Job(Path(str(settings.out)), seed, rate, arm) for rate, arm in every]
    jobs = [job for job in jobs if job.rate or job.arm != BOUND]  # without marks it is the control
    return [job for job in jobs if not (job.folder / "result.json").is_file()]


def _make_runs(settings: StudySettings, jobs: dict[int, list[Job]]) -> int:
    """Runs a seed's jobs once its cold start is there, which is made while the seed before it runs. Returns
    the number of jobs that failed."""
    order = [seed for seed, missing in jobs.items() if missing]
    failed: list[Job] = []
    context = multiprocessing.get_context("spawn")
    with (
        Progress(sum(map(len, jobs.values())), "study", "runs") as bar,
        ProcessPoolExecutor(settings.workers, mp_context=context, max_tasks_per_child=1) as pool,
        _ended_with_us(pool),
    ):

        def ended(future: Future[None], its: list[Job]) -> None:
            if error := future.exception():
                failed.extend(its)
                print(f"{its[0].folder}: {type(error).__name__}: {error}", flush=True)
            bar.update(len(its))

        cold_starts: dict[int, Future[None]] = {}
        runs: list[Future[None]] = []
        for place, seed in enumerate(order):
            for near in order[place : place + 2]:
                if near not in cold_starts:
                    cold_starts[near] = pool.submit(_logged, make_cold_start, settings, near)
            if cold_starts[seed].exception():  # waits for it
                ended(cold_starts[seed], jobs[seed])
                continue
            for job in jobs[seed]:
                runs.append(pool.submit(_logged, make_run, settings, job))
                runs[-1].add_done_callback(partial(ended, its=[job]))
        wait(runs)
    return len(failed)


@contextmanager
def _ended_with_us(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Where something is raised inside, Ctrl-C above all, the pool's work ends at once, begun or not."""
    try:
        yield
    except BaseException:  # whatever ends us, Ctrl-C above all: it is raised again when the runs are ended
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            assert process.pid
            with suppress(ProcessLookupError):  # one that has only just been started leads no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        raise


def _logged(work: Callable[..., None], settings: StudySettings, subject: Any) -> None:
    """Calls `work` in a process of one thread, which writes to a file beside its folder and leads a group of
    those that it starts.
    """
    import torch

    os.setpgid(0, 0)

    torch.set_num_threads(1)
    folder = (
        subject.folder
        if isinstance(subject, Job)
        else Path(str(settings.out), f"seed-{subject}", "cold-start")
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(settings, subject)


def make_cold_start(settings: StudySettings, seed: int) -> None:
    """A seed's labs, and a cold start that lists what it sees, guesses after one look or reads the mark."""
    from video_r1.lab.clips import write_lab
    from video_r1.training.sft import run_sft

    folder = Path(str(settings.out), f"seed-{seed}")
    cold = folder / "cold-start"
    lessons = {"hasty": HASTY, "shortcut": MARKED, "trusting": TRUSTING}
    labs = {
        folder / "test": {"train": 0, "test": settings.test, "seed": seed, "shortcut": 1.0},
        cold / "lab": {"train": settings.train, "test": 0, "seed": seed, **lessons},
    }
    for rate in settings.rates:
        asked = {
            "train": QUESTIONS,
            "test": 0,
            "seed": seed + OTHER_QUESTIONS,
            "shortcut": rate,
        }
        labs[folder / f"rl-{rate:g}"] = asked
    for lab, made in labs.items():
        if not (lab / VIDEOS).is_file():  # the last that is written
            write_lab(LabSettings(folder=str(lab), workers=1, **made))
            questions = json.loads((lab / "rl.json").read_text("utf-8"))
            # No temporal reward reaches an image, and marked images teach to read marks.
            replace_json(lab / VIDEOS, [row for row in questions if row["data_type"] == "video"])
    if (cold / "weights.json").is_file():
        return
    run = begun_anew(cold / "run")
    asked = {"train_manifest": cold / "lab/sft.json", "output_dir": run, "seed": seed, "max_steps": SFT_STEPS}
    run_sft(load_recipe("sft", "lab-sft", asked))
    weights = sha256((run / "model.safetensors").read_bytes()).hexdigest()
    replace_json(cold / "weights.json", {"sha256": weights})


def make_run(settings: StudySettings, job: Job) -> None:
    """One run of RL, its evaluations, and its result.json."""
    from video_r1.evaluation.command import run_eval
    from video_r1.training.tgrpo import run_rl

    folder, cold = begun_anew(job.folder), job.seed_folder / "cold-start"
    manifest = job.seed_folder / f"rl-{job.rate:g}" / VIDEOS
    if "keep" in ARMS[job.arm]:
        manifest = audited(manifest, cold / "run", job.seed)
    if job.arm == BOUND:
        manifest = unmarked(manifest)
    overrides = {
        **ARMS[job.arm],
        "model_name_or_path": str(cold / "run"),
        "train_manifest": str(manifest),
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "seed": job.seed,
    }
    run_rl(load_recipe("rl", "lab-tgrpo", overrides))
    for name, orders in TESTS.items():
        test = {"model": folder, "manifest": job.seed_folder / f"test/{name}.json", "out": folder / name}
        values = {key: str(value) for key, value in test.items()}
        recipe = load_recipe("eval", "lab-eval", {**values, "order": list(orders)})
        run_eval(recipe.section(EvalSettings))
    replace_json(
        folder / "result.json",
        {
            "seed": job.seed,
            "rate": job.rate,
            "arm": job.arm,
            "settings": ARMS[job.arm],
            "steps": settings.steps,
            "cold_start": json.loads((cold / "weights.json").read_text("utf-8"))["sha256"][:16],
            **tested(folder),
            **trained(folder),
        },
    )


def begun_anew(folder: Path) -> Path:
    """The folder, empty: what an ended run left there would be continued."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def audited(manifest: Path, model: Path, seed: int) -> Path:
    """The manifest with the pass rates of a model, beside it."""
    from video_r1.evaluation.audit import run_audit

    values = {"manifest": str(manifest), "model": str(model), "seed": seed, "samples": 4, "temperature": 0.7}
    values |= {"batch_size": 64, "max_new_tokens": 64}
    return Path(run_audit(load_recipe("data audit", None, values).section(AuditSettings))["manifest"])


def unmarked(manifest: Path) -> Path:
    """The rows of a lab's manifest whose clip carries no mark, beside it."""
    rows = [row for row in json.loads(manifest.read_text("utf-8")) if not row["mark"]]
    found = manifest.with_name(f"{manifest.stem}-{BOUND}.json")
    replace_json(found, rows)
    return found


def tested(folder: Path) -> dict[str, Any]:
    """Over the test videos: accuracy of each view (`ordered`, its contrasts, `cued` and `lying`, which are in
    order), and the share of answers by how they begin.
    """
    accuracy, habits = {}, {}
    for name, orders in TESTS.items():
        (file,) = (folder / name).glob("predictions-*.jsonl")
        records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for order in orders:
            view = name.partition("-")[2] or order
            chosen = [r for r in records if r["order"] == order and r["data_type"] == "video"]
            accuracy[view] = fmean(record["score"] for record in chosen)
            begins = [record["output"].removeprefix("<think>") for record in chosen]
            habits[view] = {
                habit: fmean(text.startswith(words) for text in begins) for habit, words in BEGINNINGS.items()
            }
    return {"accuracy": accuracy, "habits": habits}


def trained(folder: Path) -> dict[str, Any]:
    """Of the training: the mean accuracy reward of videos over all steps (higher: learnt sooner), a step's
    seconds (the median), and the mean temporal credit.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [line["time"] for line in lines]
    credits = [line["temporal/credit"] for line in lines if line.get("temporal/credit") is not None]
    return {
        "training_accuracy": fmean(line["reward/accuracy/video"] for line in lines),
        "step_seconds": median(after - before for before, after in itertools.pairwise(times)),
        "credit": fmean(credits) if credits else None,
    }


def write_tables(out: Path) -> None:
    """study.json, study.md and study.svg from the results that are there."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("seed-*/*/result.json"))]
    replace_json(out / "study.json", results)
    replace_text(out / "study.md", study_tables(results, CONTROL))
    replace_text(out / "study.svg", study_svg(results, CONTROL))
