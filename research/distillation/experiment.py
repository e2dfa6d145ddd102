"""Distillation on the lab: a student with 4 frames, a teacher that was trained longer and sees 8.

Both have a cold start that mostly guesses after one look (docs/demo.md). RL has taught the teacher to look.

    python -m research.distillation.experiment runs/distil --seeds 0,1,2

Each arm trains the same student for the same processor time of one thread. `weighted` is `distil` with each
token's credit weighted by what the teacher loses when its clip is shuffled.

OUT/SEED/{lab,teacher,student}/   clips, cold starts
OUT/SEED/ARM/                     a run; result.json once it is tested. Runs with one are not repeated.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from research.temporal_credit.analysis import markdown
from research.temporal_credit.experiment import made_lab, made_with, video_r1
from video_r1.data.reading import build_question, derived_generator
from video_r1.files import replace_json
from video_r1.recipe import load_recipe
from video_r1.training.runs import run_recipe
from video_r1.training.step import MicroBatch, References
from video_r1.training.tgrpo import TGRPOConfig, TGRPOTrainer

LESSONS, QUESTIONS, TEST = 2500, 1500, 500
RL_SEED, TEST_SEED = 1000, 2000  # added to the seed: other questions than those of the cold starts
STUDENT_FRAMES, TEACHER_FRAMES = 4, 8
SFT_STEPS, TEACHER_STEPS = 480, 60  # of RL, for the teacher
HASTY = 0.6  # share of the rationales that guess
SECONDS = 100.0  # processor time of a run's training
_TAUGHT = {"teacher_frames": TEACHER_FRAMES, "beta": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "rl": {},
    "distil": {**_TAUGHT, "reward_funcs": "none"},
    "both": _TAUGHT,
    "weighted": {**_TAUGHT, "reward_funcs": "none"},
}
"""Settings that differ from the recipe lab-tgrpo without a temporal rule."""


class StopInTime(TrainerCallback):
    """Ends training after SECONDS of this process's own time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= time.process_time() - self.start >= SECONDS


class TimedTrainer(TGRPOTrainer):
    """T-GRPO for a given time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(StopInTime())


class WeightedTrainer(TimedTrainer):
    """Weights the teacher's credits c_t by w_t = max(0, d_t) ÷ its mean over the response, where d_t is the
    log-prob that the teacher's token loses when the teacher's clip is shuffled. w is 1 if no token loses any.
    """

    def reference_logprobs(self, model: nn.Module, batch: MicroBatch, logprobs: Tensor) -> References:
        references, teacher = super().reference_logprobs(model, batch, logprobs), self.teacher
        assert teacher is not None and references.teacher_credits is not None
        assert references.teacher_logprobs is not None
        shuffled = []
        for group in batch.trained:
            generator = derived_generator(self.args.seed, "teacher", group.sample.problem_id)
            media = teacher.reader.media(group.sample)
            question = build_question(group.sample, media, teacher.builder, generator, "shuffled")
            asked = replace(group.rollouts.question, teacher=question.contrast)
            shuffled.append(replace(group, rollouts=replace(group.rollouts, question=asked)))
        without = teacher.scores(model, shuffled).logprobs.cpu()
        lengths = [len(rollout.token_ids) for rollout in batch.rollouts]
        drops = (references.teacher_logprobs.float().cpu() - without).split(lengths)
        weighted = references.teacher_credits * token_weights(drops).to(logprobs)
        return replace(references, teacher_credits=weighted)


def token_weights(drops: Sequence[Tensor]) -> Tensor:
    """Return max(0, d) ÷ its mean over the response for each token, [N]; 1 in a response that loses nothing.

    drops: d [L] of each response, in nats.
    """
    losses = [drop.clamp(min=0.0) for drop in drops]
    return torch.cat([loss / loss.mean() if loss.any() else torch.ones_like(loss) for loss in losses])


def cold_start(folder: Path, name: str, seed: int, frames: int) -> Path:
    run = folder / name
    if not (run / "model.safetensors").exists():
        shutil.rmtree(run, ignore_errors=True)
        video_r1(
            "sft", "lab-sft", train_manifest=folder / "lab/sft.json", output_dir=run, seed=seed,
            max_steps=SFT_STEPS, max_frames=frames, media_cache_mb=2048,
        )  # fmt: skip
    return run


def make_teacher(folder: Path, seed: int) -> Path:
    """Train a cold start with the teacher's frames, then RL."""
    run, start = folder / "teacher", cold_start(folder, "teacher-sft", seed, TEACHER_FRAMES)
    if not (run / "model.safetensors").exists():
        shutil.rmtree(run, ignore_errors=True)
        video_r1(
            "rl", "lab-tgrpo", model_name_or_path=start, train_manifest=folder / "lab/rl.json",
            output_dir=run, seed=seed, max_steps=TEACHER_STEPS, max_frames=TEACHER_FRAMES,
            temporal_rule="off",
        )  # fmt: skip
    return run


def tested(model: Path, manifest: Path, out: Path, frames: int) -> dict[str, float]:
    """Return accuracy in order, and its gap to shuffled frames."""
    video_r1("eval", "lab-eval", model=model, manifest=manifest, out=out, max_frames=frames)
    (file,) = out.glob("predictions-*.jsonl")
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    means = {
        order: fmean(record["score"] for record in records if record["order"] == order)
        for order in ("ordered", "shuffled")
    }
    return {"accuracy": means["ordered"], "gap": means["ordered"] - means["shuffled"]}


def run_seed(out: Path, seed: int, arms: list[str]) -> list[dict[str, Any]]:
    """Make what is missing of a seed; return the results of its checkpoints."""
    folder = out / str(seed)
    made_lab(folder / "lab", seed, train=LESSONS, test=0, hasty=HASTY)
    made_lab(folder / "questions", seed + RL_SEED, train=QUESTIONS, test=0)
    made_lab(folder / "test", seed + TEST_SEED, train=0, test=TEST)
    starts = {
        "teacher": make_teacher(folder, seed),
        "student": cold_start(folder, "student", seed, STUDENT_FRAMES),
    }
    results = []
    for name in (*starts, *arms):
        run, result = folder / name, folder / name / "result.json"
        if not result.exists():
            facts: dict[str, Any] = {"seed": seed, "arm": name}
            if name in ARMS:
                facts |= train(run, name, starts, folder / "questions/rl.json", seed)
            frames = TEACHER_FRAMES if name == "teacher" else STUDENT_FRAMES
            facts |= tested(run, folder / "test/test.json", run / "test", frames)
            replace_json(result, {**facts, "made_with": made_with()})
        results.append(json.loads(result.read_text("utf-8")))
        print(results[-1], flush=True)
    return results


def train(run: Path, arm: str, starts: dict[str, Path], manifest: Path, seed: int) -> dict[str, Any]:
    """Train an arm; return its number of steps and its seconds."""
    shutil.rmtree(run, ignore_errors=True)
    settings = {
        "model_name_or_path": starts["student"], "train_manifest": manifest, "output_dir": run, "seed": seed,
        "max_frames": STUDENT_FRAMES, "temporal_rule": "off", "lr_scheduler_type": "constant_with_warmup",
        "max_steps": 100_000, "media_cache_mb": 2048, **ARMS[arm],
    }  # fmt: skip
    if arm != "rl":
        settings["teacher_model_name_or_path"] = starts["teacher"]
    recipe = load_recipe("rl", "lab-tgrpo", {name: str(value) for name, value in settings.items()})
    began, kind = time.process_time(), WeightedTrainer if arm == "weighted" else TimedTrainer
    run_recipe(recipe, cast(Any, kind), TGRPOConfig)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {"steps": max(line["step"] for line in lines), "seconds": round(time.process_time() - began)}


def table(results: list[dict[str, Any]]) -> str:
    """Return each arm's accuracies and gaps, a column a seed, and the mean difference to the student."""
    seeds = sorted({result["seed"] for result in results})
    found = {(result["arm"], result["seed"]): result for result in results}
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results):
        own = [found[arm, seed] for seed in seeds if (arm, seed) in found]
        gains = [run["accuracy"] - found["student", run["seed"]]["accuracy"] for run in own]
        shown = ("accuracy", "gap")
        cells = [" ".join(f"{run[figure]:.3f}" for run in own) for figure in shown]
        steps = " ".join(str(run["steps"]) for run in own if "steps" in run)
        rows.append((arm, *cells, f"{fmean(gains):+.3f}", steps))
    return markdown(("arm", "accuracy in order", "temporal gap", "gain over the student", "steps"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="A teacher that sees more, on the lab.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    results = [found for seed in seeds for found in run_seed(given.out, seed, given.arms.split(","))]
    replace_json(given.out / "results.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
