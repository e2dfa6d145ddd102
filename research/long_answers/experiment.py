"""Experiment on long answers: which temporal credit survives them? Each run is a run folder of the lab.

    python -m research.long_answers.experiment runs/long         # all missing runs, the deciding ones first

OUT/base/                  the lab's base after SFT on long rationales about clips without a caption
OUT/data-SEED/             RL questions with their time-reversed copies, and the tests
OUT/COLD-SEED/             cold start; start.json: its criteria and its figures before RL
OUT/COLD-SEED/ARM/         a run; result.json with an outcome for each test question once it is complete

Runs with a result.json, or in results.json.gz, are not repeated, so that an experiment can be interrupted,
continued (also on another machine) and extended. The design is in README.md.
"""

import argparse
import json
import multiprocessing
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from research.long_answers.analysis import kept, key
from research.long_answers.lab import (
    BASE_FAMILIES,
    FAMILIES,
    HABITS,
    answer_of,
    choices_of,
    judged,
    lesson,
    lessons,
    question_of,
)
from research.long_answers.variants import OPENINGS, variant
from research.temporal_credit.experiment import index_of, made_with, predictions, read_rows, video_r1, work
from video_r1.data.answers import LETTERS
from video_r1.files import replace_json

MARKED = 0.9  # share of the RL clips with a caption, which is right in all of them
BATCH, STEPS = 8, 80  # questions of a step of RL, and its steps
QUESTIONS = 640  # of RL; with copies, half as many and their copies
BASE_CLIPS, BASE_STEPS = 2400, 1000
LESSONS, LESSON_STEPS = 800, 320  # clips and steps of a cold start
TEST = 400  # test questions of each view
PILOT = 1  # seed of the base
RL_SEED = 1000  # added to the seed, so that RL has other questions than the cold start
TOKENS = 256  # most of a completion
LONG = {"max_response_length": 320, "per_device_train_batch_size": 8}

GATE = {"temporal_rule": "likelihood_gate", "temporal_alpha": 0.9, "temporal_contrast": "frozen"}
OFF = {"temporal_rule": "off"}
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "grpo": (OFF, "rl.json"),
    "gate": (GATE, "rl.json"),
    "pairs": (OFF, "copies.json"),
    "pairs-gate": (GATE, "copies.json"),
    **{name: (GATE, "rl.json") for name in OPENINGS},
}
"""Settings that differ from the recipe lab-tgrpo, and questions, of each arm."""
DECIDING, OTHERS = ("grpo", "gate", "pairs"), ("gate-follows", "gate-fifth", "gate-sum", "pairs-gate")
CRITERIA = {"accurate": 0.75, "T": 0.3, "Z": 0.2}
"""Entry criteria of a cold start, sampled at temperature 1: least accuracy without captions, and least shares
of T and Z (with-z) of the answers to clips with wrong captions."""
SEEDS = (300, 301, 302, 303, 304)


@dataclass(frozen=True)
class Cell:
    """One run. cold: the cold start, `with-z` or `without-z`."""

    arm: str
    cold: str
    seed: int

    def start(self, out: Path) -> Path:
        return out / f"{self.cold}-{self.seed}"

    def folder(self, out: Path) -> Path:
        return self.start(out) / self.arm


def cells() -> Iterator[Cell]:
    """Yield all runs, those that decide first: seed by seed, and three seeds before the other arms."""
    colds = tuple(HABITS)
    for arms, seeds in ((DECIDING, SEEDS[:3]), (OTHERS, SEEDS[:3]), (DECIDING, SEEDS[3:])):
        for seed, cold, arm in product(seeds, colds, arms):
            yield Cell(arm, cold, seed)


# ---- Data


def made_lab(
    folder: Path, seed: int, families: Sequence[str] = FAMILIES, **settings: object
) -> list[dict[str, Any]]:
    """Make a lab of the families, unless it is there; return its training rows."""
    if not (folder / "test.json").exists():  # written last
        video_r1("lab", "make", folder, seed=seed, families=",".join(families), workers=1, **settings)
    return read_rows(folder / "rl.json")


def make_questions(out: Path, seed: int) -> Path:
    """Make the RL questions of a seed, half of them with their time-reversed copies; return their folder."""
    lab = out / f"data-{seed}/rl"
    rows = made_lab(lab, seed + RL_SEED, train=QUESTIONS, test=0, shortcut=MARKED)
    both: list[dict[str, Any]] = []
    for row in rows:
        if len(both) < QUESTIONS and (copy := reversed_row(row)):
            both += [row, copy]
    replace_json(lab / "copies.json", both)
    return lab


def reversed_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row about the reversed clip with its own answer, the caption as it is; None without one.

    Both rows get the field `pairs`.
    """
    family, question = question_of(row, 0)
    answer, choices = answer_of(family, question.problem, question.timeline[::-1]), choices_of(row)
    if answer not in choices:
        return None
    row["pairs"] = {"pair accuracy": [row["problem_id"], 2]}  # as `data pairs` writes them
    copy = {name: value for name, value in row.items() if name != "key_frames"}
    letter = LETTERS[choices.index(answer)]
    return {
        **copy, "problem_id": f"{row['problem_id']}-reversed", "play": "reversed",
        "solution": f"<answer>{letter}</answer>",
    }  # fmt: skip


# ---- Cold starts


def make_base(out: Path) -> Path:
    """Train the base that all cold starts begin from, unless it is there; return its folder."""
    base, lab = out / "base", out / "base-lab"
    if not (base / "model.safetensors").exists():
        rows = made_lab(lab, PILOT, BASE_FAMILIES, train=BASE_CLIPS, test=0)
        draws = (np.random.default_rng((PILOT, n)) for n in range(len(rows)))
        taught = [lesson(row, "T", rng, 0, BASE_FAMILIES) for row, rng in zip(rows, draws, strict=True)]
        replace_json(lab / "long.json", taught)
        shutil.rmtree(base, ignore_errors=True)
        video_r1(
            "sft", "lab-sft", train_manifest=lab / "long.json", output_dir=base, seed=PILOT,
            model_name_or_path="lab-base", max_steps=BASE_STEPS, media_cache_mb=2048, **LONG,
        )  # fmt: skip
    return base


def make_cold_start(out: Path, cell: Cell) -> dict[str, Any]:
    """Make a cold start, unless it is there; return its figures.

    Raises RuntimeError if it misses a criterion.
    """
    folder, lab = cell.start(out), out / f"lessons-{cell.seed}"
    if not (folder / "start.json").exists():
        run = folder / "cold-start"
        if not (run / "model.safetensors").exists():
            rows = made_lab(lab, cell.seed, train=LESSONS, test=0, shortcut=0.6, trusting=0.5)
            manifest = lab / f"{cell.cold}.json"
            replace_json(manifest, lessons(rows, cell.cold, cell.seed))
            shutil.rmtree(run, ignore_errors=True)
            video_r1(
                "sft", "lab-sft", train_manifest=manifest, output_dir=run, seed=cell.seed,
                model_name_or_path=make_base(out), max_steps=LESSON_STEPS, media_cache_mb=2048, **LONG,
            )  # fmt: skip
        replace_json(folder / "start.json", start_figures(out, cell, run))
    found = json.loads((folder / "start.json").read_text("utf-8"))
    wanted = CRITERIA if cell.cold == "with-z" else {**CRITERIA, "Z": 0.0}
    if missed := {name: found[name] for name, least in wanted.items() if found[name] < least}:
        raise RuntimeError(f"{folder}: the cold start misses its criteria: {missed}")
    return found


def start_figures(out: Path, cell: Cell, run: Path) -> dict[str, Any]:
    """Measure a cold start: sampled, for the criteria, and decoded greedily as its runs are tested."""
    sampled = {"temperature": 1.0, "limit": 200, "seed": cell.seed}
    plain = answers(run, out, cell.seed, "test", run / "plain", **sampled)
    wrong = outcomes(
        out, cell.seed, "test-lying", answers(run, out, cell.seed, "test-lying", run / "wrong", **sampled)
    )
    before = {view: tested(run, out, cell.seed, test, run / view) for view, test in VIEWS.items()}
    return {
        "accurate": fmean(record["score"] for record in plain),
        **{habit: share(wrong, letters) for habit, letters in (("T", "Ff"), ("S", "S"), ("Z", "Z"))},
        "before": before,
    }  # fmt: skip


VIEWS = {"lying": "test-lying", "ordered": "test"}
"""Views after RL and their tests: wrong captions, and none."""


def answers(model: Path, out: Path, data: int, test: str, to: Path, **options: Any) -> list[dict[str, Any]]:
    """Evaluate a checkpoint on a test of data-DATA; return the records in the test's order."""
    options = {"order": "ordered", "max_new_tokens": TOKENS, "limit": TEST, **options}
    video_r1(
        "eval", "lab-eval", model=model, manifest=out / f"data-{data}/test/{test}.json", out=to, **options
    )
    return sorted(predictions(to), key=index_of)


def outcomes(out: Path, seed: int, test: str, records: Sequence[dict[str, Any]]) -> str:
    """Return a letter for each answer to a test of a seed."""
    rows = read_rows(out / f"data-{seed}/test/{test}.json")
    return outcomes_of_rows([rows[index_of(record)] for record in records], records)


def outcomes_of_rows(rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> str:
    """Return a letter for each answer.

    F: long, its description true, its conclusion follows. f: the same, its description false. Z: long, its
    conclusion is the caption's and does not follow. n: long, another conclusion that does not follow. S: it
    begins with the caption. -: other.
    """
    found = []
    for row, record in zip(rows, records, strict=True):
        given = record["prediction"] or ""
        what = judged(row, record["output"], given)
        if what.kind != "long":
            found.append("S" if what.kind == "short" else "-")
        elif what.follows:
            found.append("F" if what.true else "f")
        else:
            found.append("Z" if given == row["mark"] != "" else "n")
    return "".join(found)


def share(found: str, letters: str) -> float:
    return fmean(letter in letters for letter in found)


def tested(model: Path, out: Path, seed: int, test: str, to: Path) -> dict[str, Any]:
    """Return accuracy, and for each question whether it is right (1 or 0) and what the answer is."""
    records = answers(model, out, seed, test, to)
    return {
        "accuracy": fmean(record["score"] for record in records),
        "right": "".join(str(int(record["score"] > 0.5)) for record in records),
        "what": outcomes(out, seed, test, records),
        "words": fmean(len(record["output"].split()) for record in records),
    }


# ---- Runs


def make_run(out: Path, cell: Cell) -> None:
    made_lab(out / f"data-{cell.seed}/test", cell.seed, train=0, test=TEST, shortcut=1.0)
    cold = make_cold_start(out, cell)
    lab = make_questions(out, cell.seed)
    folder, (settings, manifest) = cell.folder(out), ARMS[cell.arm]
    shutil.rmtree(folder, ignore_errors=True)
    begun, busy = time.monotonic(), time.process_time()
    with variant(cell.arm):
        video_r1(
            "rl", "lab-tgrpo", model_name_or_path=cell.start(out) / "cold-start", output_dir=folder,
            train_manifest=lab / manifest, max_steps=STEPS, seed=cell.seed,
            per_device_train_batch_size=BATCH, max_completion_length=TOKENS, log_rollouts=0, **settings,
        )  # fmt: skip
    seconds = {"wall": round(time.monotonic() - begun), "cpu": round(time.process_time() - busy)}
    views = {view: tested(folder, out, cell.seed, test, folder / view) for view, test in VIEWS.items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = ("reward/accuracy/video", "completion/length", "temporal/drop", "temporal/credit")
    series = {name: [round(x, 4) for line in lines if (x := line.get(name)) is not None] for name in names}
    replace_json(folder / "result.json", {
        **asdict(cell), "settings": settings, "steps": STEPS, "cold_start": cold, "views": views,
        "training": series, "seconds": seconds, "made_with": made_with(),
    })  # fmt: skip
    for file in folder.rglob("*"):
        if file.suffix in (".pt", ".bin", ".jsonl") and file.name != "metrics.jsonl":
            file.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description="Temporal credit in long answers, on the lab.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="COLD-SEED/ARM, comma-separated, or base (default: all)")
    given = parser.parse_args()
    if given.only == "base":
        make_base(given.out)
        return 0
    recorded = {key(run) for run in kept()}
    jobs = [cell for cell in cells() if key(asdict(cell)) not in recorded]
    jobs = [cell for cell in jobs if not (cell.folder(given.out) / "result.json").exists()]
    if given.only:
        jobs = [cell for cell in jobs if f"{cell.cold}-{cell.seed}/{cell.arm}" in given.only.split(",")]
    failed: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for cell in jobs:
            error = pool.submit(work, make_run, given.out, cell).result()
            failed[cell.arm] += bool(error)
            print(f"{cell.folder(given.out)}: {error or 'done'}", flush=True)
    return min(failed.total(), 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues with the missing runs")
