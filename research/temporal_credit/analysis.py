"""Tables and pictures of the experiment, and the pooled model of the first study.

    python -m research.temporal_credit.analysis collect runs/credit     # results.json.gz of all finished runs
    python -m research.temporal_credit.analysis                         # its tables, docs/images/diagram.webp

The model of a figure y is y = arm + block, least squares over all runs together. A block is what runs of
different arms share: seed, and where they differ cue and skill. Intervals hold for all arms of a table
together (Bonferroni).
"""

import gzip
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

RESULTS = Path(__file__).parent / "results.json.gz"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "diagram.webp"
VIEWS = ("lying", "true", "ordered", "shuffled", "twins")
Run = Mapping[str, Any]
Figure = Callable[[Run], float]


class Effect(NamedTuple):
    """Difference of an arm to the control in the pooled model, with its interval. runs: of the arm."""

    mean: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        text = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return f"**{text}**" if self.low > 0 or self.high < 0 else text


class Pooled(NamedTuple):
    effects: dict[str, Effect]
    deviation: float  # residual standard deviation of a run
    freedom: int


def pooled(
    runs: Sequence[Run], figure: Figure, control: str, blocks: Sequence[str], level: float = 0.95
) -> Pooled:
    """Fit arm + block to the runs that share a block with another arm. blocks: keys of a run."""
    arms = [control, *sorted({run["arm"] for run in runs} - {control})]
    places = {key: n for n, key in enumerate(dict.fromkeys(tuple(run[b] for b in blocks) for run in runs))}
    design = np.zeros((len(runs), len(arms) - 1 + len(places)))
    for row, run in zip(design, runs, strict=True):
        if run["arm"] != control:
            row[arms.index(run["arm"]) - 1] = 1
        row[len(arms) - 1 + places[tuple(run[b] for b in blocks)]] = 1
    values = np.array([figure(run) for run in runs])
    found, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(runs) - int(rank)
    deviation = math.sqrt(float(((values - design @ found) ** 2).sum()) / freedom)
    errors = deviation * np.sqrt(np.diag(np.linalg.pinv(design.T @ design)))
    width = t_quantile(1 - (1 - level) / 2 / (len(arms) - 1), freedom)
    count = {arm: sum(run["arm"] == arm for run in runs) for arm in arms}
    effects = {
        arm: Effect(found[i], found[i] - width * errors[i], found[i] + width * errors[i], count[arm])
        for i, arm in enumerate(arms[1:])
    }
    return Pooled(effects, deviation, freedom)


def detectable(deviation: float, runs: int, freedom: int, arms: int, power: float = 0.8) -> float:
    """Return the difference of two arms of `runs` runs each that is found with this probability.

    At 5 % for all `arms` comparisons together.
    """
    return (
        deviation * math.sqrt(2 / runs) * (t_quantile(1 - 0.025 / arms, freedom) + t_quantile(power, freedom))
    )


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution for a probability above 0.5.

    Found by bisection on the distribution function, which is a finite sum for a whole number of degrees of
    freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Return P(|T| < t)."""
    angle = math.atan(t / math.sqrt(freedom))
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for step in range(2 + freedom % 2, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (step - 1) / step
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def accuracy(view: str) -> Figure:
    return lambda run: run["accuracy"][view]


def pair_accuracy(run: Run) -> float:
    """Return the share of the test questions with a twin of which both halves are right."""
    there = _bits(run["ids"]["twins"]) > 0
    twins = _bits(run["right"]["twins"])[: there.sum()]
    return float((_bits(run["right"]["ordered"])[: len(there)][there] & twins).mean())


def _bits(digits: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


PREDICTED = {
    "grpo": (0.0, False), "apart-0.3": (0.3, False), "apart-1": (1.0, False), "apart-3": (3.0, False),
    "gate": (0.9, True), "gate-frozen": (0.9, True), "gate-apart": (0.9, True),
    "pairs": (0.0, False), "pairs-gate": (0.9, True),
}  # fmt: skip
"""α of each arm of the diagram, and whether it is a gate."""
LABELS = {
    "grpo": "GRPO", "apart-0.3": "likelihood apart, α 0.3", "apart-1": "α 1", "apart-3": "α 3",
    "gate": "gate, shuffled", "gate-frozen": "gate", "gate-apart": "gate, added apart",
    "pairs": "GRPO, pairs", "pairs-gate": "gate, pairs",
}  # fmt: skip
DROP = 0.9  # d of looking; that of reading the mark is 0
CLEAR = 0.2  # a difference of rewards beyond which the sign should not depend on chance


def looking_wins(run: Run, looks: float | None = None) -> float:
    """Return q_T's reward minus q_S's by the inequalities of README.md; above 0: the run learns to look.

    looks: q_T (default: the cold start's accuracy without marks).
    """
    alpha, gated = PREDICTED[run["arm"]]
    cue: float = run["cue"]
    if looks is None:
        looks = float(run["cold_start"]["accurate"])
    if run["arm"].startswith("pairs"):
        cue = cue / 2
    if gated:
        return looks * (1 - alpha * (1 - DROP)) - cue * (1 - alpha)
    return looks * (1 + alpha * DROP) - cue


def moved(run: Run) -> float:
    """Return by how much RL changed the accuracy with lying marks, decoded greedily before and after."""
    return run["accuracy"]["lying"] - run["before"]


def family_points(runs: Sequence[Run], skill: str) -> list[tuple[float, float]]:
    """Return `looking_wins` with the family's q_T, and its change with lying marks, by run and family."""
    return [
        (looking_wins(run, looks), after - before)
        for run in runs
        if (run["part"], run["skill"]) == ("diagram", skill)
        for looks, before, after in run["families"].values()
    ]


def agreement(runs: Sequence[Run]) -> str:
    """Tabulate how often the inequalities have the sign of the change: of whole runs and of families."""
    rows = []
    for skill in ("skilled", "unskilled"):
        chosen = [run for run in runs if (run["part"], run["skill"]) == ("diagram", skill)]
        pairs = {"runs": [(looking_wins(run), moved(run)) for run in chosen]}
        sampled = [(looking_wins(r), r["accuracy"]["lying"] - r["cold_start"]["lying"]) for r in chosen]
        pairs["runs, before: sampled by the gates"] = sampled
        pairs["families"] = family_points(runs, skill)
        clear = [pair for pair in pairs["families"] if abs(pair[0]) >= CLEAR]
        pairs[f"families, beyond ±{CLEAR}"] = clear
        for name, found in pairs.items():
            right = sum((expected > 0) == (change > 0) for expected, change in found)
            rows.append((skill, name, f"{right} of {len(found)}"))
    return markdown(("cold start", "of", "sign as predicted"), rows)


def diagram(runs: Sequence[Run]) -> str:
    """Tabulate the phase diagram: measured change, and the side on which the inequalities put it."""
    cells: dict[tuple[str, float], dict[str, list[Run]]] = {}
    for run in runs:
        if run["part"] == "diagram":
            cells.setdefault((run["skill"], run["cue"]), {}).setdefault(run["arm"], []).append(run)
    rows = []
    for (skill, cue), arms in sorted(cells.items(), reverse=True):
        row = [skill, f"{cue:g}"]
        for arm in PREDICTED:
            found = arms.get(arm, [])
            expected = "+" if found and fmean(map(looking_wins, found)) > 0 else "−"
            row.append(f"{fmean(map(moved, found)):+.2f} ({expected})" if found else "–")
        rows.append(row)
    return markdown(("cold start", "cue", *PREDICTED), rows)


def compared(runs: Sequence[Run], part: str) -> str:
    """Tabulate the means of a part, and the differences to GRPO in the pooled model if seeds repeat it."""
    chosen = [run for run in runs if run["part"] == part]
    views = [view for view in VIEWS if all(view in run["accuracy"] for run in chosen)]
    more: dict[str, Figure] = {"names the mark": lambda run: run["mark_read"]["lying"]}
    if "twins" in views:
        more = {"both twins": pair_accuracy, **more}
    models = {}
    if len({run["seed"] for run in chosen if run["arm"] == "grpo"}) > 1:
        models = {view: pooled(chosen, accuracy(view), "grpo", ("seed",)) for view in ("lying", "ordered")}
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in chosen):
        own = [run for run in chosen if run["arm"] == arm]
        means = [f"{fmean(map(accuracy(view), own)):.3f}" for view in views]
        means += [f"{fmean(map(figure, own)):.3f}" for figure in more.values()]
        effects = [str(model.effects[arm]) if arm != "grpo" else "" for model in models.values()]
        rows.append((arm, len(own), *means, *effects))
    differences = [f"{view} − grpo" for view in models]
    return f"{part}\n\n" + markdown(("arm", "seeds", *views, *more, *differences), rows)


NAMES = {
    "grpo": "GRPO",
    "margin": "the paper's bonus (`margin`)",
    "margin-batch": "`margin`, `scale_rewards: batch`",
    "placebo": "GRPO, placebo",
    "clean": "GRPO on clips without marks",
    "likelihood": "likelihood",
    "gate-frozen": "the gate",
    "pairs": "GRPO, pairs",
    "pairs-gate": "the gate, pairs",
}


def confirmation(found: Sequence[Any]) -> str:
    """Tabulate the main figures of the confirmation for docs/study.md."""
    chosen = [run for run in found[0] if run["part"] == "confirmation"]
    lying, ordered = (pooled(chosen, accuracy(view), "grpo", ("seed",)) for view in ("lying", "ordered"))
    rows = []
    for arm, name in NAMES.items():
        own = [run for run in chosen if run["arm"] == arm]
        views = [fmean(map(accuracy(view), own)) for view in ("lying", "true", "ordered")]
        means = [*views, fmean(map(pair_accuracy, own)), fmean(run["mark_read"]["lying"] for run in own)]
        effects = [model.effects[arm] if arm != "grpo" else "" for model in (lying, ordered)]
        rows.append((name, *(f"{mean:.3f}" for mean in means), *effects))
    head = (
        "arm", "lying marks", "true marks", "no marks", "both twins", "names the mark",
        "lying marks − GRPO", "no marks − GRPO",
    )  # fmt: skip
    return markdown(head, rows)


SETTINGS = {
    "gate-frozen": "as in the confirmation: α = 0.9, a fifth of the tokens",
    "gate-floor": "0.1 added to the deviation of every group",
    "gate-apart": "added to the advantages",
    "gate-0.5": "α = 0.5",
    "gate-1": "α = 1",
    "gate-tenth": "a tenth of the tokens",
    "gate-all": "all tokens",
}


def settings(found: Sequence[Any]) -> str:
    """Tabulate the gate's settings by seed; where a seed of theirs is the confirmation's, its gate is."""
    chosen = [run for run in found[0] if run["part"] == "gate"]
    seeds = sorted({run["seed"] for run in chosen})
    chosen += [run for run in found[0] if (run["part"], run["arm"]) == ("confirmation", "gate-frozen")]
    by_place = {(run["arm"], run["seed"]): run["accuracy"] for run in chosen}
    rows = []
    for arm, name in SETTINGS.items():
        rights = [by_place.get((arm, seed)) for seed in seeds]
        figures = [right and right[view] for view in ("lying", "ordered") for right in rights]
        rows.append((name, *(f"{figure:.3f}" if figure else "–" for figure in figures)))
    head = [f"{view}: seed {seed}" for view in ("lying marks", "no marks") for seed in seeds]
    return markdown(("setting", *head), rows)


def second_base(found: Sequence[Any]) -> str:
    """Tabulate GRPO and the gate on the second base: by seed, and their difference in the pooled model."""
    chosen = [run for run in found[0] if run["part"] == "second-base"]
    by_place = {(run["seed"], run["arm"]): run for run in chosen}
    views = ("lying", "ordered")
    rows = []
    for seed in sorted({run["seed"] for run in chosen}):
        grpo, gate = (by_place[seed, arm] for arm in ("grpo", "gate-frozen"))
        figures = [grpo["cold_start"][name] for name in ("accurate", "looking", "lying")]
        figures += [run["accuracy"][view] for view in views for run in (grpo, gate)]
        rows.append((seed, *(f"{figure:.3f}" for figure in figures)))
    lying, ordered = (pooled(chosen, accuracy(view), "grpo", ("seed",)).effects for view in views)
    rows.append(("gate − GRPO", "", "", "", "", lying["gate-frozen"], "", ordered["gate-frozen"]))
    head = (
        "seed", "before RL: no marks", "looks", "lying marks", "lying marks: GRPO", "the gate",
        "no marks: GRPO", "the gate",
    )  # fmt: skip
    return markdown(head, rows)


def still_clips(found: Sequence[Any]) -> str:
    """Tabulate static.json: mean accuracy on moving and on still clips, and the range over seeds."""
    names = {"cold-start": "before RL", **NAMES, "gate-apart": "added apart", "gate-floor": "with the floor"}
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in found[0]):
        own = [run for run in found[0] if run["arm"] == arm]
        kinds = [sorted(run[kind] for run in own) for kind in ("moving", "still")]
        rows.append((names[arm], *(f"{fmean(each):.3f} ({each[0]:.3f} to {each[-1]:.3f})" for each in kinds)))
    return markdown(("arm", "moving clips", "still clips"), rows)


CLAIMS = (
    ("gate-frozen", "grpo"), ("likelihood", "grpo"), ("pairs", "grpo"), ("pairs", "placebo"),
    ("pairs-gate", "gate-frozen"), ("margin", "grpo"), ("margin-batch", "grpo"),
)  # fmt: skip
"""Contrasts that were declared before the runs; of the last two the theory says 0."""
GAIN, HARM = 0.05, -0.02  # least gain of a default with lying marks; most harm in order


def claims(runs: Sequence[Run]) -> str:
    """Tabulate the declared contrasts with lying marks, and each arm's harm in order, with intervals for all
    arms together. A difference that the experiment would find with probability 0.8 stands below.
    """
    chosen = [run for run in runs if run["part"] == "confirmation"]
    controls = {control for _, control in CLAIMS}
    models = {control: pooled(chosen, accuracy("lying"), control, ("seed",)) for control in controls}
    ordered = pooled(chosen, accuracy("ordered"), "grpo", ("seed",))
    rows = [(f"{arm} − {control}", models[control].effects[arm]) for arm, control in CLAIMS]
    lines = [markdown(("lying marks", "difference"), rows)]
    safe = [arm for arm, effect in ordered.effects.items() if effect.low > HARM]
    lines.append(f"no harm in order (the interval lies above {HARM}): {', '.join(safe)}\n")
    model, seeds = models["grpo"], len({run["seed"] for run in chosen})
    arms = len(model.effects)
    found = detectable(model.deviation, seeds, model.freedom, arms)
    lines.append(f"{seeds} seeds; detectable with lying marks: {found:.3f}\n")
    gains = {arm: model.effects[arm] for arm in ("likelihood", "gate-frozen", "margin", "margin-batch")}
    able = {arm: gain.mean for arm, gain in gains.items() if gain.mean >= GAIN and gain.low > 0}
    able = {arm: gain for arm, gain in able.items() if arm in safe}
    lines.append(
        f"default by the criterion, its cost aside: {max(able, key=able.__getitem__, default='off')}\n"
    )
    return "\n".join(lines)


def picture(runs: Sequence[Run], path: Path) -> None:
    """Draw the phase diagram: change of the accuracy with lying marks by skill, cue and arm. A ring marks a
    cell on whose sign the inequalities are wrong. Beside it: each family's change by the prediction.
    """
    from matplotlib import pyplot

    skills, cues = ("skilled", "unskilled"), (1.0, 0.8, 0.65, 0.5)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained", width_ratios=(3, 3, 4))
    image: Any = None
    for axis, skill in zip(axes, skills, strict=False):
        values = np.full((len(PREDICTED), len(cues)), np.nan)
        for (row, arm), (column, cue) in product(enumerate(PREDICTED), enumerate(cues)):
            own = [
                r for r in runs if (r["part"], r["skill"], r["cue"], r["arm"]) == ("diagram", skill, cue, arm)
            ]
            if not own:
                continue
            values[row, column] = change = fmean(map(moved, own))
            axis.text(column, row, f"{change:+.2f}", ha="center", va="center", fontsize=8)
            if (change > 0) != (fmean(map(looking_wins, own)) > 0):
                axis.plot(column, row, "o", markersize=26, fillstyle="none", color="black")
        image = axis.imshow(values, cmap="RdBu", vmin=-0.5, vmax=0.5, aspect="auto")
        axis.set(
            title=skill, xlabel="accuracy of the mark in training", xticks=range(len(cues)), xticklabels=cues,
            yticks=range(len(PREDICTED)), yticklabels=map(LABELS.get, PREDICTED) if axis is axes[0] else [],
        )  # fmt: skip
    figure.colorbar(image, ax=axes[1], label="change with lying marks")
    for skill, colour in zip(skills, ("tab:blue", "tab:orange"), strict=True):
        points = zip(*family_points(runs, skill), strict=True)
        axes[2].plot(*points, "o", color=colour, alpha=0.4, ms=4, mew=0, label=skill)
    axes[2].axhline(0, color="grey", lw=0.8)
    axes[2].axvline(0, color="grey", lw=0.8)
    axes[2].set(
        title="each family of questions", xlabel="predicted: looking's reward minus the mark's",
        ylabel="measured: change with lying marks",
    )  # fmt: skip
    axes[2].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def first_study(found: Sequence[Any]) -> str:
    """Tabulate the pooled differences to GRPO of first_study.json over its rates of marked clips."""
    ordered, lying = _first_models(found[0])
    rows = [(arm, effect.runs, effect, lying.effects[arm]) for arm, effect in ordered.effects.items()]
    return markdown(("arm", "runs", "in order, no marks", "lying marks (rates 0.5 and 0.9)"), rows)


def first_study_power(found: Sequence[Any]) -> str:
    """Tabulate the differences that the first study would have found with probability 0.8."""
    names = ("in order, no marks", "lying marks (rates 0.5 and 0.9)")
    rows = [
        (name, f"{model.deviation:.3f}")
        + tuple(f"{detectable(model.deviation, n, model.freedom, 11):.3f}" for n in (3, 5, 9, 15))
        for name, model in zip(names, _first_models(found[0]), strict=True)
    ]
    return markdown(("", "deviation of a run", "3 runs an arm", "5", "9", "15"), rows)


def _first_models(runs: Sequence[Run]) -> tuple[Pooled, Pooled]:
    runs = [run for run in runs if run["arm"] != "unmarked"]
    marked = [run for run in runs if run["rate"] > 0]
    fitted = (runs, "ordered"), (marked, "lying")
    one, two = (pooled(chosen, accuracy(view), "grpo", ("seed", "rate")) for chosen, view in fitted)
    return one, two


def collect(out: Path) -> list[Run]:
    """Gather the results of all finished runs in results.json.gz, with those that are there already."""
    runs = kept() + [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*/*/result.json"))]
    found = {key(run): run for run in runs}
    runs = [found[place] for place in sorted(found)]
    packed = gzip.compress(json.dumps(runs).encode(), mtime=0)
    RESULTS.write_bytes(packed)
    print(f"{RESULTS.name}: {len(runs)} runs, {len(packed):,} bytes")
    return runs


def key(run: Run) -> tuple[Any, ...]:
    """Return what tells a run from all others."""
    return run["part"], run["skill"], run["seed"], run["arm"], run["cue"]


def kept() -> list[Run]:
    """Return the runs of results.json.gz."""
    return json.loads(gzip.decompress(RESULTS.read_bytes())) if RESULTS.exists() else []


def main() -> None:
    runs = collect(Path(sys.argv[2])) if sys.argv[1:2] == ["collect"] else kept()
    parts = [compared(runs, part) for part in ("confirmation", "gate", "second-base")]
    print("\n".join((diagram(runs), agreement(runs), claims(runs), *parts)))
    if any(run["part"] == "diagram" for run in runs):
        picture(runs, PICTURE)


if __name__ == "__main__":
    main()
