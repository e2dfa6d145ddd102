"""Experiment on temporal credit: when does it turn a shortcut round? Each run is a run folder of the lab.

    python -m research.temporal_credit.experiment runs/credit --part confirmation --workers 2

Parts: confirmation, diagram, gate, second-base.

OUT/data-SEED/                 RL questions by accuracy of the cue, their reversed twins, and the tests
OUT/SKILL-SEED/                cold start and gates.json: is the skill there before any RL?
OUT/SKILL-SEED/PART-ARM-CUE/   a run; result.json with 0 or 1 for each test question once it is complete

Runs with a result.json, or in results.json.gz, are not repeated, so that an experiment can be interrupted,
continued (also on another machine) and extended.
`analysis.py` makes tables and pictures of the results. The design is in README.md.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from research.temporal_credit.analysis import kept, key
from research.temporal_credit.oracle import contrast_answer
from research.temporal_credit.variants import variant
from video_r1.data.answers import LETTERS
from video_r1.files import replace_json
from video_r1.lab.clips import write_clip
from video_r1.lab.model import base_folder
from video_r1.lab.questions import NAMED_FAMILIES
from video_r1.lab.scenes import FPS, MARKS, SECONDS, render
from video_r1.settings.training_record import RECORD, read_record

FAMILIES = (
    "direction", "first_colour", "last_colour", "after", "before", "first_shape", "end_place", "rotation",
    "count_before",
)  # fmt: skip
"""Families whose answer mostly changes when the clip is reversed."""
MARKED = 0.9  # share of the RL clips with a mark
QUESTIONS = 1920  # of RL; with twins, half as many and their twins
STEPS = 160
SFT_STEPS = {"skilled": 960, "unskilled": 240}
LESSONS = 5000  # clips of a cold start: half are marked, half of the marked rationales read the mark
RL_SEED, PLACEBO_SEED = 1000, 2000  # added to the seed, so that RL has other questions than the cold start
ACCURATE, LOOKING = 0.75, 0.3  # gates of a skilled cold start

_SCORED = {"temporal_rule": "likelihood_gate", "temporal_alpha": 0.9, "temporal_contrast": "frozen"}
RULES: dict[str, dict[str, Any]] = {
    "grpo": {"temporal_rule": "off"},
    "margin": {"temporal_rule": "margin"},
    "margin-batch": {"temporal_rule": "margin", "scale_rewards": "batch"},
    "likelihood": {**_SCORED, "temporal_alpha": 0.3, "temporal_contrast": "shuffled"},
    "apart-0.3": {**_SCORED, "temporal_alpha": 0.3, "temporal_contrast": "shuffled"},
    "apart-1": {**_SCORED, "temporal_alpha": 1.0, "temporal_contrast": "shuffled"},
    "apart-3": {**_SCORED, "temporal_alpha": 3.0, "temporal_contrast": "shuffled"},
    "gate": {**_SCORED, "temporal_contrast": "shuffled"},
    "gate-frozen": _SCORED,
    "gate-apart": _SCORED,
    "gate-floor": _SCORED,
    "gate-0.5": {**_SCORED, "temporal_alpha": 0.5},
    "gate-1": {**_SCORED, "temporal_alpha": 1.0},
    "gate-tenth": _SCORED,
    "gate-all": _SCORED,
}
"""Settings that differ from the recipe lab-tgrpo; variants.py has the rules that are not the package's."""
ARMS: dict[str, tuple[str, str]] = {
    **{rule: (rule, "marked") for rule in RULES},
    "pairs": ("grpo", "twins"),
    "pairs-gate": ("gate-frozen", "twins"),
    "placebo": ("grpo", "placebo"),
    "clean": ("grpo", "clean"),
}
"""Rule and questions of each arm."""


@dataclass(frozen=True)
class Cell:
    """One run. cue: share of the marks in training that give the right answer."""

    arm: str
    cue: float
    skill: Literal["skilled", "unskilled"]
    seed: int
    part: str

    @property
    def test(self) -> int:
        """Number of test questions of each view."""
        return {"confirmation": 2000, "second-base": 1000}.get(self.part, 600)

    @property
    def steps(self) -> int:
        """Optimizer steps of RL."""
        return STEPS // {"diagram": 4, "second-base": 2}.get(self.part, 1)

    @property
    def sft_steps(self) -> int:
        """Optimizer steps of the cold start."""
        return 640 if self.part == "second-base" else SFT_STEPS[self.skill]

    @property
    def views(self) -> list[tuple[str, str, int]]:
        """Name, test and number of questions of each view after RL."""
        views = [("ordered", "test", self.test), ("lying", "test-lying", self.test)]
        if self.part == "confirmation":
            views += [("shuffled", "test", 600), ("true", "test-cued", 600), ("twins", "twins", self.test)]
        return views

    @property
    def base(self) -> Path:
        return base_folder("qwen3_5" if self.part == "second-base" else "qwen2_5_vl")

    @property
    def pixels(self) -> dict[str, int]:
        """Settings of the base's frames."""
        record = read_record(self.base / RECORD)
        return {name: record[name] for name in ("frame_pixels", "image_pixels")}

    def start(self, out: Path) -> Path:
        return out / f"{self.skill}-{self.seed}"

    def folder(self, out: Path) -> Path:
        return self.start(out) / f"{self.part}-{self.arm}-{self.cue:g}"


DIAGRAM_ARMS = (
    "grpo", "gate-frozen", "gate-apart", "gate", "apart-0.3", "apart-1", "apart-3", "pairs", "pairs-gate",
)  # fmt: skip
CONFIRMATION_ARMS = (
    "grpo", "likelihood", "gate-frozen", "pairs", "pairs-gate", "placebo", "clean", "margin", "margin-batch",
)  # fmt: skip
SECOND_BASE_ARMS = ("grpo", "gate-frozen")
GATE_ARMS = (
    "gate-frozen", "gate-apart", "gate-floor", "gate-0.5", "gate-1", "gate-tenth", "gate-all",
)  # fmt: skip


def diagram(seeds: Sequence[int]) -> Iterator[Cell]:
    for seed, skill, cue, arm in product(
        seeds, ("skilled", "unskilled"), (1.0, 0.8, 0.65, 0.5), DIAGRAM_ARMS
    ):
        yield Cell(arm, cue, skill, seed, "diagram")


def confirmation(seeds: Sequence[int]) -> Iterator[Cell]:
    for seed, arm in product(seeds, CONFIRMATION_ARMS):
        yield Cell(arm, 1.0, "skilled", seed, "confirmation")


def second_base(seeds: Sequence[int]) -> Iterator[Cell]:
    for seed, arm in product(seeds, SECOND_BASE_ARMS):
        yield Cell(arm, 1.0, "skilled", seed, "second-base")


def gate(seeds: Sequence[int]) -> Iterator[Cell]:
    for seed, arm in product(seeds, GATE_ARMS):
        yield Cell(arm, 1.0, "skilled", seed, "gate")


MISSED = {101, 103, 104, 105, 106, 111, 112, 114, 116, 117, 119}
"""Seeds whose cold start missed a gate."""
CONFIRMED = [seed for seed in range(100, 130) if seed not in MISSED][:10]

PARTS = {
    "diagram": (diagram, range(1)),
    "confirmation": (confirmation, CONFIRMED),
    "gate": (gate, range(1)),
    "second-base": (second_base, range(200, 205)),
}
"""Cells and default seeds of each part; those of the confirmation are used for nothing else."""


# ---- Data


def video_r1(*words: object, **options: object) -> None:
    """Run a `video-r1` command in this process. Raises RuntimeError if it fails."""
    from video_r1.cli import main

    argv = [*map(str, words)]
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    if code := main(argv):
        raise RuntimeError(f"video-r1 {' '.join(argv)} ended with exit code {code}")


def made_lab(folder: Path, seed: int, **settings: object) -> None:
    """Make a lab of the families that turn round, unless it is there."""
    if not (folder / "test.json").exists():  # written last
        video_r1("lab", "make", folder, seed=seed, families=",".join(FAMILIES), workers=1, **settings)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text("utf-8"))


def twin_row(row: dict[str, Any], split: int) -> dict[str, Any] | None:
    """Return a lab row about the reversed clip with the oracle's answer; None if it has none."""
    _, seed, _, index = (
        row["problem_id"].replace("test-lying", "test").replace("test-cued", "test").split("-")
    )
    rng = np.random.default_rng((int(seed), split, int(index)))
    family = str(rng.choice(FAMILIES))
    question = NAMED_FAMILIES[family](rng)
    assert (question.problem, f"lab/{family}") == (row["problem"], row["data_source"]), row["problem_id"]
    answer = contrast_answer(family, question, "reversed")
    if answer is None or (question.choices and answer not in question.choices):
        return None
    said = LETTERS[question.choices.index(answer)] if question.choices else answer
    pairs = {"pairs": {"pair accuracy": [row["problem_id"], 2]}}
    row.update(pairs)
    twin = {**row, "problem_id": f"{row['problem_id']}-reversed", "play": "reversed", **pairs}
    del twin["key_frames"]
    return {**twin, "solution": f"<answer>{said}</answer>", "timeline": question.timeline}


def make_tests(out: Path, seed: int, test: int) -> None:
    """Make the tests of a seed."""
    tests = out / f"data-{seed}" / "test"
    made_lab(tests, seed, train=0, test=test, shortcut=1.0)
    if not (tests / "twins.json").exists():
        twins = [twin for row in read_rows(tests / "test.json") if (twin := twin_row(row, 1))]
        for twin in twins:
            del twin["timeline"]
        replace_json(tests / "twins.json", twins)


def make_questions(out: Path, cell: Cell) -> None:
    """Make the RL questions of a cell's seed and cue, with those that its part needs besides."""
    folder, confirms = out / f"data-{cell.seed}", cell.part == "confirmation"
    if confirms:
        made_lab(folder / "clean", cell.seed + RL_SEED, train=QUESTIONS, test=0)
    lab = folder / f"cue-{cell.cue:g}"
    trusting = 0.0 if cell.cue == 1 else cell.cue  # 0: every mark is true
    made_lab(lab, cell.seed + RL_SEED, train=QUESTIONS, test=0, shortcut=MARKED, trusting=trusting)
    if not (lab / "twins.json").exists():  # written last
        add_twins(lab, cell.seed, with_placebo=confirms)


def add_twins(lab: Path, seed: int, with_placebo: bool) -> None:
    """Write twins.json, half of the questions with their twins behind them. with_placebo: write placebo.json
    too, the same with the marks of the twins redrawn so that they are true: other clips of these timelines.
    """
    rows = read_rows(lab / "rl.json")
    mixed: dict[str, list[dict[str, Any]]] = {"placebo": [], "twins": []}
    for index, row in enumerate(rows):
        if len(mixed["twins"]) >= QUESTIONS:
            break
        if (twin := twin_row(row, 0)) is None:
            continue
        timeline, answer = twin.pop("timeline"), twin["solution"][8:-9]
        mixed["twins"] += [row, twin]
        if row["mark"] and with_placebo:
            path = f"./videos/placebo-{index:06d}.mp4"
            times = (np.arange(int(SECONDS * FPS)) / FPS).tolist()
            mark = answer if answer in MARKS else ""
            rng = np.random.default_rng((seed + PLACEBO_SEED, index))
            write_clip(lab / path, render(timeline, times, rng, mark), FPS)
            twin = {**twin, "path": path, "mark": mark}
        mixed["placebo"] += [row, twin]
    if not with_placebo:
        del mixed["placebo"]
    for name, chosen in mixed.items():
        replace_json(lab / f"{name}.json", chosen)


# ---- Cold starts and runs


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Wait until no other process is inside the block of this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_cold_start(out: Path, cell: Cell) -> dict[str, Any]:
    """Make the cold start of a cell, unless it is there; return its gates.

    Raises RuntimeError if a skilled one does not hold them. The second base is taken as it comes.
    """
    folder = cell.start(out)
    with only_one(folder / "lock"):
        if not (folder / "gates.json").exists():
            lab, run = folder / "lab", folder / "cold-start"
            if not (run / "model.safetensors").exists():
                made_lab(lab, cell.seed, train=LESSONS, test=0, shortcut=0.5, trusting=0.5)
                shutil.rmtree(run, ignore_errors=True)
                video_r1(
                    "sft", "lab-sft", train_manifest=lab / "sft.json", output_dir=run, seed=cell.seed,
                    model_name_or_path=cell.base, max_steps=cell.sft_steps, media_cache_mb=2048,
                    **cell.pixels,
                )  # fmt: skip
            shutil.rmtree(lab, ignore_errors=True)
            replace_json(folder / "gates.json", gates(out, cell, run))
    found = json.loads((folder / "gates.json").read_text("utf-8"))
    held = found["accurate"] >= ACCURATE and found["looking"] >= LOOKING
    if cell.skill == "skilled" and cell.part != "second-base" and not held:
        raise RuntimeError(f"{folder}: the gates are not held: {found}")
    return found


def gates(out: Path, cell: Cell, run: Path) -> dict[str, float]:
    """Measure a cold start, sampled as in RL: accuracy on clips without marks, and the share of completions
    about clips with lying marks that do not begin with the mark.
    """
    sampled = {"temperature": 1.0, "limit": 600, "seed": cell.seed, **cell.pixels}
    plain = answers(run, out, cell.seed, "test", run / "gate", **sampled)["ordered"]
    lying = answers(run, out, cell.seed, "test-lying", run / "gate-lying", **sampled)["ordered"]
    return {
        "accurate": fmean(record["score"] for record in plain),
        "looking": fmean(not reads_mark(record) for record in lying),
        "lying": fmean(record["score"] for record in lying),
    }


def answers(model: Path, out: Path, data: int, test: str, to: Path, **options: Any) -> dict[str, list[dict]]:
    """Evaluate a checkpoint on a test of data-DATA; return the records by order of the frames."""
    options = {"order": "ordered", **options}
    manifest = out / f"data-{data}/test/{test}.json"
    video_r1("eval", "lab-eval", model=model, manifest=manifest, out=to, **options)
    records = predictions(to)
    return {order: [r for r in records if r["order"] == order] for order in options["order"].split(",")}


def predictions(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("predictions-*.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def before_rl(out: Path, cell: Cell) -> list[dict[str, Any]]:
    """Test the cold start on lying marks as its runs are tested, unless that is done; return the records."""
    cold = cell.start(out) / "cold-start"
    with only_one(cell.start(out) / "lock"):
        if not (cold / "before" / "summary.json").exists():  # written last
            answers(cold, out, cell.seed, "test-lying", cold / "before", limit=cell.test, **cell.pixels)
    return predictions(cold / "before")


def by_family(*views: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the accuracy of each family of questions in the records of each view."""
    sources = sorted({record["data_source"] for record in views[0]})
    return {
        source.removeprefix("lab/"): [
            round(fmean(r["score"] for r in records if r["data_source"] == source), 4) for records in views
        ]
        for source in sources
    }


def reads_mark(record: dict[str, Any]) -> bool:
    return record["output"].removeprefix("<think>").startswith("mark")


def make_run(out: Path, cell: Cell) -> None:
    """Train one arm, test it and write result.json."""
    lock = out / f"data-{cell.seed}.lock"
    with only_one(lock):
        make_tests(out, cell.seed, cell.test)
    cold = make_cold_start(out, cell)
    with only_one(lock):
        make_questions(out, cell)
    folder, data = cell.folder(out), out / f"data-{cell.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rule, questions = ARMS[cell.arm]
    lab = data / ("clean" if questions == "clean" else f"cue-{cell.cue:g}")
    manifest = lab / {"twins": "twins.json", "placebo": "placebo.json"}.get(questions, "rl.json")
    begun = time.monotonic()
    with variant(rule):
        video_r1(
            "rl", "lab-tgrpo", model_name_or_path=cell.start(out) / "cold-start", train_manifest=manifest,
            output_dir=folder, max_steps=cell.steps, seed=cell.seed, **cell.pixels, **RULES[rule],
        )  # fmt: skip
    seconds = time.monotonic() - begun
    found = {}
    for view, test, limit in cell.views:
        order = "shuffled" if view == "shuffled" else "ordered"
        options = {"order": order, "limit": limit, **cell.pixels}
        found[view] = answers(folder, out, cell.seed, test, folder / view, **options)[order]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    credits = [line["temporal/credit"] for line in lines if line.get("temporal/credit") is not None]
    result = {
        **asdict(cell), "settings": RULES[rule], "cold_start": cold,
        "steps": cell.steps,
        "accuracy": {view: fmean(r["score"] for r in records) for view, records in found.items()},
        "right": {view: packed(records) for view, records in found.items()},
        "ids": {"twins": digits_of(found["twins"])} if "twins" in found else {},
        "mark_read": {view: fmean(map(reads_mark, found[view])) for view in {"lying", "true"} & found.keys()},
        "training_accuracy": fmean(line["reward/accuracy/video"] for line in lines),
        "credit": fmean(credits) if credits else None,
        "seconds": round(seconds), "made_with": made_with(),
    }  # fmt: skip
    if cell.part == "diagram":
        before, gate = before_rl(out, cell), predictions(cell.start(out) / "cold-start" / "gate")
        result["before"] = fmean(record["score"] for record in before)
        result["families"] = by_family(gate, before, found["lying"])  # q_T, lying marks before and after
    for file in folder.rglob("*"):
        if file.suffix in (".safetensors", ".pt", ".bin", ".jsonl") and file.name != "metrics.jsonl":
            file.unlink()
    replace_json(folder / "result.json", result)


def packed(records: Sequence[dict[str, Any]]) -> str:
    """Return 0 or 1 for each record as hexadecimal digits, in the order of the test."""
    bits = np.array([record["score"] > 0.5 for record in sorted(records, key=lambda r: index_of(r))])
    return np.packbits(bits).tobytes().hex()


def digits_of(records: Sequence[dict[str, Any]]) -> str:
    """Return which questions of the test have a record, packed like their answers."""
    there = {index_of(record) for record in records}
    return np.packbits(np.array([index in there for index in range(max(there) + 1)])).tobytes().hex()


def index_of(record: dict[str, Any]) -> int:
    return int(str(record["problem_id"]).removesuffix("-reversed").rpartition("-")[2])


def made_with() -> dict[str, str]:
    """Return commit, processor and versions."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"commit": commit[:12], "cpu": (names or [platform.machine()])[0], **packages}


# ---- The command


def work(make_run: Callable[[Path, Any], None], out: Path, cell: Any) -> str:
    """Make one run in a process of one thread, with a log beside its folder. Return its error, or ""."""
    import torch

    torch.set_num_threads(1)
    log = Path(f"{cell.folder(out)}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        make_run(out, cell)
    except Exception as error:  # of any kind: it is reported, and the other runs go on
        return f"{type(error).__name__}: {error} (see {log})"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Temporal credit against a shortcut, on the lab.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--seeds", help="comma-separated (default: those of README.md)")
    parser.add_argument("--arms", help="comma-separated (default: all of the part)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    cells, seeds = PARTS[given.part]
    seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else list(seeds)
    arms = given.arms.split(",") if given.arms else list(ARMS)
    recorded = {key(run) for run in kept()}
    jobs = [cell for cell in cells(seeds) if cell.arm in arms and key(asdict(cell)) not in recorded]
    jobs = [cell for cell in jobs if not (cell.folder(given.out) / "result.json").exists()]
    failed = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.workers, mp_context=context, max_tasks_per_child=1) as pool:
        for cell, result in [(cell, pool.submit(work, make_run, given.out, cell)) for cell in jobs]:
            error = result.result()
            failed += bool(error)
            print(f"{cell.folder(given.out)}: {error or 'done'}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues with the missing runs")
