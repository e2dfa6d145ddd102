"""Predictions, tables and picture of the experiment on long answers.

    python -m research.long_answers.analysis                        # tables of results.json.gz, picture.webp
    python -m research.long_answers.analysis collect runs/long      # first add all finished runs to it

The model of a figure is y = arm + seed, least squares over the runs of a cold start; intervals hold for all
arms of a table together (Bonferroni).
"""

import gzip
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from research.temporal_credit.analysis import Effect, markdown, pooled

RESULTS = Path(__file__).parent / "results.json.gz"
PICTURE = Path(__file__).parent / "picture.webp"
Run = Mapping[str, Any]

ARMS = {
    "grpo": "GRPO",
    "gate": "the gate",
    "pairs": "GRPO, pairs",
    "gate-follows": "the gate, if the conclusion follows",
    "gate-fifth": "mean of the largest fifth",
    "gate-sum": "Σ d",
    "pairs-gate": "the gate, pairs",
}
COLDS = {"without-z": "without Z", "with-z": "with Z"}
SHARES = {"with-z": (0.4, 0.3, 0.3), "without-z": (0.6, 0.4, 0.0)}
"""T, S and Z in each cold start."""
DECIDING = ("gate", "pairs")
GAIN, HARM = 0.05, -0.02  # least gain with wrong captions of a rule that recipes name; most harm in order


# ---- Predictions

LOOKING, ALPHA, TIME = 0.8, 0.9, 9.0
"""q_T; the gate's α; time in units of one reward, after which GRPO without Z has a sixth of its T : S."""
OPEN = {"gate": 1.0, "gate-follows": 1.0, "gate-fifth": 0.8, "gate-sum": 1.0, "pairs-gate": 1.0}
"""1 − e^−Δ of a described clip (a pilot of the base: Δ = 7); 0 for S, whose chain one frame shows."""


def rewards(arm: str) -> tuple[float, float, float]:
    """Return the mean rewards of T, S and Z in training by the inequalities."""
    right = 0.5 if arm.startswith("pairs") else 1.0  # a caption's accuracy
    gates = (1.0, 1.0, 1.0)
    if arm in OPEN:
        described = 1 - ALPHA * (1 - OPEN[arm])
        gates = (described, 1 - ALPHA, described)
    t, s, z = LOOKING * gates[0], right * gates[1], right * gates[2]
    if arm == "gate-follows":  # Z is paid in full where the description says the same as the caption
        z = LOOKING * gates[2] + (1 - LOOKING) * (1 - ALPHA)
    return t, s, z


def predicted(arm: str, cold: str) -> float:
    """Return the accuracy with wrong captions after RL: q_T times the share of T, each habit's share growing
    by e^(reward · TIME).
    """
    grown = [part * math.exp(reward * TIME) for part, reward in zip(SHARES[cold], rewards(arm), strict=True)]
    return LOOKING * grown[0] / sum(grown)


def predictions() -> str:
    rows = []
    for arm, name in ARMS.items():
        t, s, z = rewards(arm)
        row = [name, *(f"{value:.2f}" for value in (t, s, z)), "+" if t > s else "−", "+" if t > z else "−"]
        for cold in COLDS:
            after, grpo = predicted(arm, cold), predicted("grpo", cold)
            row += [f"{after:.2f}", f"{after - grpo:+.2f}" if arm != "grpo" else ""]
        rows.append(row)
    heads = (part for cold in COLDS.values() for part in (f"{cold}: wrong captions", "− GRPO"))
    return markdown(("arm", "T earns", "S", "Z", "T against S", "T against Z", *heads), rows)


# ---- Tables


def accuracy(view: str) -> Any:
    return lambda run: run["views"][view]["accuracy"]


def share(run: Run, view: str, letters: str) -> float:
    """Return the share of a view's answers that are one of these kinds (`experiment.outcomes`)."""
    what = run["views"][view]["what"]
    return sum(what.count(letter) for letter in letters) / len(what)


def effects(runs: Sequence[Run], view: str) -> dict[str, Effect]:
    """Return the differences of arms to GRPO in the pooled model; none while it has no degree of freedom."""
    arms, seeds = {run["arm"] for run in runs}, {run["seed"] for run in runs}
    if "grpo" not in arms or len(arms) < 2 or len(runs) <= len(arms) - 1 + len(seeds):
        return {}
    return pooled(runs, accuracy(view), "grpo", ("seed",)).effects


def compared(runs: Sequence[Run], cold: str) -> str:
    """Tabulate the arms of a cold start."""
    chosen = [run for run in runs if run["cold"] == cold]
    lying, ordered = effects(chosen, "lying"), effects(chosen, "ordered")
    starts = {run["seed"]: run["cold_start"]["before"] for run in chosen}
    rows = []
    before = [{"views": start} for start in starts.values()]
    for arm, name in {"": "before RL", **ARMS}.items():
        own: Sequence[Run] = before if not arm else [run for run in chosen if run["arm"] == arm]
        if not own:
            continue
        figures = [fmean(run["views"][view]["accuracy"] for run in own) for view in ("lying", "ordered")]
        figures += [
            fmean(share(run, "lying", letters) for run in own) for letters in ("F", "f", "Z", "S", "n-")
        ]
        words = fmean(run["views"]["lying"]["words"] for run in own)
        contrast = [each.get(arm, "") for each in (lying, ordered)]
        rows.append((name, len(own), *(f"{figure:.3f}" for figure in figures), f"{words:.0f}", *contrast))
    head = (
        "arm", "seeds", "wrong captions", "no captions", "follows, true", "follows, false", "Z", "S", "other",
        "words", "wrong captions − GRPO", "no captions − GRPO",
    )  # fmt: skip
    return f"{COLDS[cold]}\n\n" + markdown(head, rows)


def missing(runs: Sequence[Run]) -> str:
    """Say what is left to run before anything is claimed."""
    from research.long_answers.experiment import cells

    there = {key(run) for run in runs}
    left = [cell for cell in cells() if (cell.cold, cell.seed, cell.arm) not in there]
    deciding = sum(cell.arm in ("grpo", *DECIDING) for cell in left)
    return f"{len(there)} runs are there, {len(left)} are missing, {deciding} of them decide\n"


def verdict(runs: Sequence[Run]) -> str:
    """Apply the criterion for the recipes; say nothing while runs that decide are missing."""
    lines = []
    for arm in DECIDING:
        holds = True
        for cold in COLDS:
            chosen = [run for run in runs if run["cold"] == cold]
            if (
                sum(run["arm"] == arm for run in chosen) < 5
                or sum(run["arm"] == "grpo" for run in chosen) < 5
            ):
                return "no verdict: runs that decide are missing\n"
            gain, harm = (effects(chosen, view)[arm] for view in ("lying", "ordered"))
            holds = holds and gain.mean >= GAIN and gain.low > 0 and harm.low > HARM
        lines.append(f"{ARMS[arm]}: {'meets' if holds else 'does not meet'} the criterion\n")
    return "".join(lines)


def picture(runs: Sequence[Run], path: Path) -> None:
    """Draw what the answers to clips with wrong captions are, by cold start and arm."""
    from matplotlib import pyplot

    kinds = {
        "F": "description true, conclusion follows",
        "f": "description false, conclusion follows",
        "n-": "other",
        "Z": "Z: describes, answers by the caption",
        "S": "S: reads the caption",
    }
    colours = ("tab:green", "tab:olive", "lightgrey", "tab:purple", "tab:red")
    figure, axes = pyplot.subplots(1, len(COLDS), figsize=(11, 3.4), layout="constrained", sharey=True)
    for axis, (cold, name) in zip(axes, COLDS.items(), strict=True):
        chosen = [run for run in runs if run["cold"] == cold]
        starts = [{"arm": "", "views": run["cold_start"]["before"]} for run in chosen]
        arms = [arm for arm in ("", *ARMS) if any(run["arm"] == arm for run in [*starts, *chosen])]
        for place, arm in enumerate(arms):
            own = [run for run in [*starts, *chosen] if run["arm"] == arm]
            left = 0.0
            for (letters, label), colour in zip(kinds.items(), colours, strict=True):
                width = fmean(share(run, "lying", letters) for run in own)
                axis.barh(place, width, left=left, color=colour, label=label if not place else None)
                left += width
        names = ["before RL" if not arm else ARMS[arm] for arm in arms]
        axis.set(title=name, xlim=(0, 1), xlabel="answers to clips with wrong captions")
        axis.set(yticks=range(len(arms)), yticklabels=names)
        axis.invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- Results


def key(run: Run) -> tuple[Any, ...]:
    """Return what tells a run from all others."""
    return run["cold"], run["seed"], run["arm"]


def kept() -> list[Run]:
    """Return the runs of results.json.gz."""
    return json.loads(gzip.decompress(RESULTS.read_bytes())) if RESULTS.exists() else []


def collect(out: Path) -> list[Run]:
    """Gather the results of all finished runs in results.json.gz, with those that are there already."""
    runs = kept() + [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*/*/result.json"))]
    found = {key(run): run for run in runs}
    runs = [found[place] for place in sorted(found)]
    RESULTS.write_bytes(gzip.compress(json.dumps(runs).encode(), mtime=0))
    return runs


def main() -> None:
    runs = collect(Path(sys.argv[2])) if sys.argv[1:2] == ["collect"] else kept()
    print(predictions())
    for cold in COLDS:
        if any(run["cold"] == cold for run in runs):
            print(compared(runs, cold))
    print(missing(runs) + verdict(runs))
    if all(any(run["cold"] == cold for run in runs) for cold in COLDS):
        picture(runs, PICTURE)


if __name__ == "__main__":
    main()
