"""The demo: lab data with marks that give answers away, SFT, GRPO and T-GRPO, evaluation and a report, on two
cores.

OUT/lab/                           media and manifests
OUT/frames/                        cache of decoded frames for all stages
OUT/sft/, OUT/grpo/, OUT/tgrpo/    run folders; both kinds of RL begin from sft/
OUT/eval-sft/, eval-sft-lying/ …   predictions and figures of the three, without marks and with lying ones
OUT/summary.json, OUT/report.html
"""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from video_r1.console import tidy_output
from video_r1.errors import RequestError, VideoR1Error
from video_r1.files import claimed, replace_json
from video_r1.processes import Interrupted
from video_r1.recipe import load_recipe
from video_r1.settings.commands import LabSettings
from video_r1.settings.decoding import BenchmarkSettings, EvalSettings
from video_r1.settings.training_record import RECORD, read_record


class Size(NamedTuple):
    """Training and test questions, and steps of SFT and of each RL run of a demo."""

    train: int
    test: int
    sft: int
    rl: int


FULL = Size(train=2400, test=320, sft=440, rl=65)
QUICK = Size(train=400, test=80, sft=120, rl=8)
PROCESSES = 2  # training ranks of one thread each; for a small model they are faster than threads
HABITS: dict[str, Any] = {"shortcut": 0.6, "trusting": 0.7, "hasty": 0.3}
"""Habits that RL has to overcome, as shares: of questions with a mark that names an answer, of marks that are
true (the cold start reads these), and of other cold-start rationales that guess after one look."""
RULES: dict[str, dict[str, str]] = {
    "grpo": {"temporal_rule": "off"},
    "tgrpo": {"temporal_rule": "likelihood_gate"},
}
RECIPES = {"sft": "lab-sft", "rl": "lab-tgrpo", "eval": "lab-eval"}
STAGES = ("sft", *RULES)
TESTS = {"": "ordered,shuffled", "-lying": "ordered"}
"""By suffix of the test's manifest and of the evaluation's folder: orders of the frames."""
MARK = ".demo"
"""Empty file in each folder of a demo; the next demo replaces only folders with this file."""
CACHE = "frames"
FOLDERS = ("lab", CACHE, *STAGES, *(f"eval-{stage}{test}" for test in TESTS for stage in STAGES))


def run_demo(
    out: str | Path, seed: int = 0, quick: bool = False, family: str = "qwen2_5_vl"
) -> dict[str, Any]:
    """Run all stages below `out`, replacing an earlier demo; return the content of `summary.json`.

    Everything runs on the CPU, even on a machine with a GPU: two ranks cannot share one GPU, and such a small
    model gains nothing. All figures are over the test questions on videos: frames in order and shuffled, and
    in order with marks that lie.
    quick: a few steps, which show that every stage runs and prove nothing. family: of the base. Raises
    RequestError if a folder to be replaced is not an earlier demo's, and VideoR1Error if training fails.
    """
    from video_r1.lab.model import base_folder

    out = Path(out)
    with claimed(out):
        empty_folders(out)
        return _run_stages(out, seed, QUICK if quick else FULL, base_folder(family))


def empty_folders(out: Path) -> None:
    """Make empty folders for all stages, as existing runs would be continued.

    Raises RequestError, and removes nothing, if one of the folders is not an earlier demo's.
    """
    folders = [out / name for name in FOLDERS]
    marked = [path for path in out.iterdir() if (path / MARK).is_file() and not path.is_symlink()]
    foreign = [path for path in folders if os.path.lexists(path) and path not in marked]
    if foreign:
        raise RequestError(
            f"{', '.join(map(str, foreign))} would be replaced but was not written by a demo; choose another "
            "--out, or remove it first"
        )
    for path in marked:
        shutil.rmtree(path)
    for path in folders:
        path.mkdir()
        (path / MARK).touch()


def _run_stages(out: Path, seed: int, size: Size, base: Path) -> dict[str, Any]:
    import torch

    from video_r1.evaluation.evaluate import run_eval
    from video_r1.lab.clips import write_lab
    from video_r1.models.loading import load_model
    from video_r1.report.page import build_report

    torch.set_num_threads(1)  # the figures do not depend on the number of cores
    seconds: dict[str, float] = {}
    lab = out / "lab"
    record = read_record(base / RECORD)
    shared = {name: record[name] for name in ("frame_pixels", "image_pixels")}
    shared |= {"seed": seed, "frame_cache": out / CACHE}
    start = time.perf_counter()
    with _timed(seconds, "lab"):
        write_lab(LabSettings(folder=str(lab), train=size.train, test=size.test, seed=seed, **HABITS))
    with _timed(seconds, "sft"):
        sft = {"train_manifest": lab / "sft.json", "output_dir": out / "sft"}
        train_stage("sft", size.sft, **shared, model_name_or_path=base, **sft)
    for stage, rule in RULES.items():
        rl: dict[str, Any] = {"train_manifest": lab / "rl.json", "output_dir": out / stage, **rule}
        if size == QUICK:  # after a short cold start no answer may be right yet
            rl["preflight_questions"] = 0
        with _timed(seconds, stage):
            train_stage("rl", size.rl, **shared, model_name_or_path=out / "sft", **rl)
    figures: dict[str, dict[str, Any]] = {}
    for (test, orders), stage in product(TESTS.items(), STAGES):
        name = f"eval-{stage}{test}"
        with _timed(seconds, name):
            given = {"model": out / stage, "manifest": lab / f"test{test}.json", "out": out / name}
            given |= {"order": orders, "device": "cpu", **shared}
            recipe = load_recipe("eval", RECIPES["eval"], {key: str(value) for key, value in given.items()})
            run_eval(recipe.section(EvalSettings), recipe.section(BenchmarkSettings))
        evaluation = json.loads((out / name / "summary.json").read_text(encoding="utf-8"))
        (figures[name],) = evaluation["frames"].values()
    videos = {stage: figures[f"eval-{stage}"]["by_modality"]["video"] for stage in STAGES}
    for stage in STAGES:
        videos[stage]["lying"] = figures[f"eval-{stage}-lying"]["by_modality"]["video"]["ordered"]
    seconds["total"] = time.perf_counter() - start
    summary = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "model_parameters": sum(weight.numel() for weight in load_model(out / "tgrpo").parameters()),
        "about": "videos",
        "test_questions": videos["tgrpo"]["temporal_gap"]["questions"],
        "accuracy": _of_stages(videos, "accuracy"),
        "interval95": _of_stages(videos, "interval95"),
        "format_rate": _of_stages(videos, "format_rate"),
        "temporal_gap": {stage: videos[stage]["temporal_gap"] for stage in STAGES},
    }
    replace_json(out / "summary.json", summary)
    page = build_report(out)
    print(json.dumps(summary, indent=1))
    print(f"report: {page}")
    print(f"to explore it, also while it runs: video-r1 studio {out}")
    if size == QUICK:
        print("The quick demo shows that every stage runs; it learns nothing. For training: video-r1 demo")
    return summary


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    print(f"== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def train_stage(command: str, steps: int, **settings: Any) -> None:
    """Run a training command on several ranks, started as by torchrun."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A failed rank prints its own error.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    batch = load_recipe(command, RECIPES[command]).values()["per_device_train_batch_size"]
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch // PROCESSES,
        "use_cpu": True,
    } | settings
    texts = {name: str(value) for name, value in settings.items()}
    config = LaunchConfig(
        1, 1, PROCESSES, run_id=command, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, train_share)(command, texts)
    except SignalException as signal:
        raise Interrupted(signal.sigval) from None
    except ChildFailedError as failed:
        raise VideoR1Error(f"{command}: training failed; its error is printed above") from failed


def train_share(command: str, settings: dict[str, str]) -> None:
    """Train on one rank."""
    import torch

    from video_r1.training.sft import run_sft
    from video_r1.training.tgrpo import run_rl

    torch.set_num_threads(1)
    tidy_output()
    recipe = load_recipe(command, RECIPES[command], settings)
    try:
        run_rl(recipe) if command == "rl" else run_sft(recipe)
    except VideoR1Error as error:
        sys.exit(f"video-r1: {error}")


def _of_stages(videos: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    views = ("ordered", "shuffled", "lying")
    return {stage: {view: videos[stage][view][name] for view in views} for stage in STAGES}
