"""Does the gate harm questions that need no order? A lab of which half are still clips.

    python -m research.temporal_credit.static runs/static --seeds 0,1,2

Each seed: a cold start without marks, then each arm on it. Prints accuracy on moving and on still clips
before and after RL; OUT/static.json has it for all complete runs, which are not repeated.
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from research.temporal_credit.analysis import markdown
from research.temporal_credit.experiment import (
    FAMILIES,
    LESSONS,
    QUESTIONS,
    RL_SEED,
    RULES,
    STEPS,
    made_with,
    read_rows,
    video_r1,
)
from research.temporal_credit.variants import variant
from video_r1.files import replace_json
from video_r1.lab.clips import write_clip
from video_r1.lab.questions import IMAGE_FAMILIES
from video_r1.lab.scenes import FPS, SECONDS

ARMS = ("grpo", "gate-frozen", "gate-apart", "gate-floor")
TEST, SFT_STEPS = 1000, 480


def make_lab(folder: Path, seed: int, train: int, test: int) -> None:
    """Make a lab of moving and, as often, still clips: the lab's images, shown for as long as a clip."""
    if (folder / "still").exists():
        return
    families = ",".join((*FAMILIES, *IMAGE_FAMILIES))
    video_r1("lab", "make", folder, seed=seed, families=families, image_share=0.5, train=train, test=test)
    for name in ("sft", "rl", "test"):
        rows = read_rows(folder / f"{name}.json")
        for row in rows:
            if row["data_type"] == "image":
                path = Path(row["path"].replace("images", "videos")).with_suffix(".mp4")
                frame = np.asarray(Image.open(folder / row["path"]))
                write_clip(folder / path, np.repeat(frame[None], int(SECONDS * FPS), 0), FPS)
                row |= {"data_type": "video", "path": f"./{path}"}
                del row["key_frames"]
        replace_json(folder / f"{name}.json", rows)
    (folder / "still").touch()


def accuracy(model: Path, manifest: Path, to: Path) -> dict[str, float]:
    """Evaluate a checkpoint; return its accuracy on still and on moving clips."""
    video_r1("eval", "lab-eval", model=model, manifest=manifest, out=to, order="ordered")
    (file,) = to.glob("predictions-*.jsonl")
    kinds: dict[str, list[float]] = {"still": [], "moving": []}
    for line in file.read_text("utf-8").splitlines():
        record = json.loads(line)
        is_still = record["data_source"].removeprefix("lab/") in IMAGE_FAMILIES
        kinds["still" if is_still else "moving"].append(record["score"])
    return {kind: fmean(scores) for kind, scores in kinds.items()}


def run_seed(out: Path, seed: int) -> list[dict[str, Any]]:
    """Make the cold start and the arms of a seed that are not there; return the results of all."""
    folder = out / f"seed-{seed}"
    cold, lab, lessons = folder / "cold-start", folder / "lab", folder / "lessons"
    make_lab(lab, seed + RL_SEED, QUESTIONS, TEST)
    results = []
    for arm in ("cold-start", *ARMS):
        run = folder / arm
        if not (run / "static.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            if arm == "cold-start":
                make_lab(lessons, seed, LESSONS, 0)
                lesson = lessons / "sft.json"
                video_r1(
                    "sft", "lab-sft", train_manifest=lesson, output_dir=run, seed=seed, max_steps=SFT_STEPS
                )
            else:
                with variant(arm):
                    video_r1(
                        "rl", "lab-tgrpo", model_name_or_path=cold, train_manifest=lab / "rl.json",
                        output_dir=run, max_steps=STEPS, seed=seed, **RULES[arm],
                    )  # fmt: skip
            found = accuracy(run, lab / "test.json", run / "test")
            replace_json(run / "static.json", {"seed": seed, "arm": arm, **found, "made_with": made_with()})
        results.append(json.loads((run / "static.json").read_text("utf-8")))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="The gate on questions that need no order.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    results = [found for seed in given.seeds.split(",") for found in run_seed(given.out, int(seed))]
    replace_json(given.out / "static.json", results)
    kinds = ("moving", "still")
    rows = [(r["seed"], r["arm"], *(f"{r[kind]:.3f}" for kind in kinds)) for r in results]
    print(markdown(("seed", "arm", *kinds), rows))


if __name__ == "__main__":
    main()
