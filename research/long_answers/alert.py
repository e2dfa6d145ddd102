"""How often the alert "the run is learning a shortcut" is false, and how early it is true, on the lab.

    python -m research.long_answers.alert false                                 # from the study's outcomes
    python -m research.long_answers.alert run OUT --start runs/demo/sft --lab runs/demo/lab

`false`: in the study the nine trained models of a seed answer clips without a caption equally well, in order
and shuffled (docs/study.md). In any order they are validations of a run that learns no shortcut.

`run`: GRPO from a demo's cold start, on the lab's clips with a right caption (nine in ten), and on those
without any. Every five steps the policy answers held-out clips of the same kind in order and frozen, which
the watch sees, and clips with wrong captions, which it does not. alert.json has the outcomes.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from research.long_answers.analysis import markdown
from research.temporal_credit.analysis import RESULTS as STUDY
from research.temporal_credit.analysis import kept
from research.temporal_credit.experiment import read_rows, video_r1
from video_r1.data.manifests.records import load_manifest
from video_r1.evaluation.validation import Outcomes, ShortcutWatch
from video_r1.files import replace_json
from video_r1.training import tgrpo

FIGURES = Path(__file__).with_name("alert.json")
STEPS, EVERY, PROBE = 60, 5, 150  # of RL, between validations, questions of a validation
VIEWS = ("ordered", "shuffled")


# ---- False alerts


def false_alerts(draws: int = 200, questions: int = 200, seed: int = 0) -> tuple[int, int]:
    """Return the false alerts and the number of runs made of the study's outcomes.

    A run is a seed's arms in an order drawn at random, on `questions` of the 600 with both views.
    """
    rng = np.random.default_rng(seed)
    by_seed: dict[int, list[np.ndarray]] = {}
    for run in kept():
        if run["part"] == "confirmation":
            by_seed.setdefault(run["seed"], []).append(np.stack([_bits(run, view) for view in VIEWS], axis=1))
    alerts = 0
    for arms in by_seed.values():
        for _ in range(draws):
            chosen = rng.permutation(600)[:questions]
            watch = ShortcutWatch()
            drawn = [arms[n][chosen] for n in rng.permutation(len(arms))]
            alerts += any([watch.alerts(_outcomes(each), "shuffled") for each in drawn])
    return alerts, draws * len(by_seed)


def _bits(run: Any, view: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(run["right"][view]), np.uint8))[:600]


def _outcomes(scores: np.ndarray) -> Outcomes:
    return {n: (float(ordered), float(contrast)) for n, (ordered, contrast) in enumerate(scores)}


# ---- True alerts


class Recorder(ShortcutWatch):
    """A watch that keeps what it saw."""

    def alerts(self, now: Outcomes, contrast: str) -> bool:
        self.seen = [*getattr(self, "seen", []), now]
        return super().alerts(now, contrast)


def watched_run(out: Path, start: Path, lab: Path, captions: bool, seed: int) -> dict[str, Any]:
    """Train with GRPO and validate; return the outcomes of each validation as strings of 0 and 1."""
    name = f"{'captions' if captions else 'plain'}-{seed}"
    manifest = out / f"{name}.json"
    rows = [row for row in read_rows(lab / "rl.json") if row["data_type"] == "video"]
    right = [row for row in rows if row["mark"] and row["mark"] == row["solution"][8:-9]]
    plain = [row for row in rows if not row["mark"]]
    out.mkdir(parents=True, exist_ok=True)
    replace_json(manifest, [*right, *plain[: len(right) // 9]] if captions else plain)
    tests = {"probe": "test-cued" if captions else "test", "lying": "test-lying"}
    probes = {view: list(_videos(lab / f"{test}.json", captions)) for view, test in tests.items()}
    watches = {view: Recorder() for view in probes}
    validated = tgrpo.temporal_accuracy

    def validate(engine: Any, samples: Any, reader: Any, builder: Any, settings: Any) -> dict[str, float]:
        validated(engine, probes["lying"], reader, builder, settings, watches["lying"])
        return validated(engine, probes["probe"], reader, builder, settings, watches["probe"])

    with patch.object(tgrpo, "temporal_accuracy", validate):
        video_r1(
            "rl", "lab-tgrpo", model_name_or_path=start, train_manifest=manifest, output_dir=out / name,
            max_steps=STEPS, seed=seed, temporal_rule="off", temporal_contrast="frozen", log_rollouts=0,
            eval_manifest=lab / "test.json", eval_strategy="steps", eval_steps=EVERY, eval_on_start="true",
            report_to="none", media_root=lab,
        )  # fmt: skip
    series = {
        view: [
            ["".join(str(int(pair[k] > 0.5)) for pair in now.values()) for k in (0, 1)] for now in watch.seen
        ]
        for view, watch in watches.items()
    }
    return {"captions": captions, "seed": seed, "every": EVERY, "series": series}


def _videos(path: Path, captions: bool) -> Iterator[Any]:
    """Yield the first PROBE samples of a test on videos whose clips can have a caption, all if none has."""
    able = {str(row["problem_id"]).rpartition("-")[2] for row in read_rows(path.with_name("test-cued.json"))
            if row["mark"] or not captions}  # fmt: skip
    samples = [s for s in load_manifest(str(path)) if s.data_type == "video"]
    yield from [s for s in samples if str(s.problem_id).rpartition("-")[2] in able][:PROBE]


def table(runs: list[dict[str, Any]]) -> str:
    """Tabulate each run: when it alerts, and the figures at the start, at the alert and at the end."""
    rows = []
    for run in runs:
        watch, spoke = ShortcutWatch(), None
        seen = [_strings(pair) for pair in run["series"]["probe"]]
        for number, now in enumerate(seen):
            if watch.alerts(now, "frozen") and spoke is None:
                spoke = number
        lying = [mean(ordered) for ordered, _ in run["series"]["lying"]]
        rows.append((
            "right captions" if run["captions"] else "no captions", run["seed"],
            "no alert" if spoke is None else f"step {spoke * run['every']}",
            *(_trace(run["series"]["probe"], k, spoke) for k in (0, 1)),
            " → ".join(f"{lying[n]:.2f}" for n in _places(lying, spoke)),
        ))  # fmt: skip
    head = ("trained on", "seed", "alert", "probe in order", "probe frozen", "wrong captions")
    return markdown(head, rows)


def mean(digits: str) -> float:
    return digits.count("1") / len(digits)


def _strings(pair: list[str]) -> Outcomes:
    return {n: (float(o), float(c)) for n, (o, c) in enumerate(zip(*pair, strict=True))}


def _places(values: list[Any], spoke: int | None) -> list[int]:
    return sorted({0, len(values) - 1, *([] if spoke is None else [spoke])})


def _trace(series: list[list[str]], k: int, spoke: int | None) -> str:
    return " → ".join(f"{mean(series[n][k]):.2f}" for n in _places(series, spoke))


def main() -> int:
    parser = argparse.ArgumentParser(description="Rates of the shortcut alert on the lab.")
    parser.add_argument("what", choices=("false", "run", "table"))
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--start", type=Path)
    parser.add_argument("--lab", type=Path)
    parser.add_argument("--seeds", default="0")
    given = parser.parse_args()
    found = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else []
    if given.what == "run":
        for seed in map(int, given.seeds.split(",")):
            for captions in (True, False):
                if not any((run["captions"], run["seed"]) == (captions, seed) for run in found):
                    found.append(watched_run(given.out, given.start, given.lab, captions, seed))
                    replace_json(FIGURES, found)
    elif given.what == "false":
        logging.disable(logging.WARNING)
        alerts, runs = false_alerts()
        print(f"{alerts} false alerts in {runs} runs of nine validations of 200 clips ({STUDY.name})")
    if given.what != "false":
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
