"""From the results of a study to tables: means over seeds, and paired differences to plain GRPO."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

Result = Mapping[str, Any]
"""What a run's result.json holds."""

FIGURES: dict[str, Callable[[Result], float | None]] = {
    "ordered": lambda run: run["accuracy"]["ordered"],
    "gap": lambda run: run["accuracy"]["ordered"] - run["accuracy"]["shuffled"],
    "shuffled": lambda run: run["accuracy"]["shuffled"],
    "reversed": lambda run: run["accuracy"]["reversed"],
    "frozen": lambda run: run["accuracy"]["frozen"],
    "marked": lambda run: run["accuracy"]["cued"],
    "lost without marks": lambda run: run["accuracy"]["cued"] - run["accuracy"]["ordered"],
    "lying marks": lambda run: run["accuracy"]["lying"],
    "one look": lambda run: run["habits"]["ordered"]["one look"],
    "mark read": lambda run: run["habits"]["cued"]["mark"],
    "in training": lambda run: run["training_accuracy"],
    "credit": lambda run: run["credit"],
    "s a step": lambda run: run["step_seconds"],
}
"""The columns: accuracies over the test videos without marks, unless a name says otherwise."""
MEASURED = ("accuracy", "habits", "training_accuracy", "credit", "step_seconds")
"""Keys of a result that hold numbers."""
COMPARED = ("ordered", "gap", "lost without marks", "lying marks", "in training")


class Difference(NamedTuple):
    """A mean over seeds of (arm − control), with its interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(
    arm: Sequence[Result], control: Sequence[Result], figure: Callable[[Result], float | None], compared: int
) -> Difference | None:
    """Over the seeds that both have with the same cold start; None for fewer than two.

    The interval is Student's, at 95 % for all of the `compared` arms together (Bonferroni): each of them
    has the level 1 − 0.05 ÷ compared.
    """
    begun = {(run["seed"], run["cold_start"]): run for run in control}
    pairs = [
        (run, begun[run["seed"], run["cold_start"]])
        for run in arm
        if (run["seed"], run["cold_start"]) in begun
    ]
    values = [(figure(run), figure(other)) for run, other in pairs]
    differences = [mine - theirs for mine, theirs in values if mine is not None and theirs is not None]
    if len(differences) < 2:
        return None
    mean, count = fmean(differences), len(differences)
    half = t_quantile(1 - 0.025 / compared, count - 1) * stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def t_quantile(probability: float, freedom: int) -> float:
    """The value that a variable with Student's t distribution stays below with this probability, above 0.5.

    By bisection on the distribution function, which is a finite sum for a whole number of degrees of freedom
    (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(freedom))
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for step in range(2 + freedom % 2, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (step - 1) / step
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def by_rate(results: Sequence[Result]) -> dict[float, dict[str, list[Result]]]:
    """The runs of each share of marked clips, by arm."""
    rates: dict[float, dict[str, list[Result]]] = {
        rate: {} for rate in sorted({run["rate"] for run in results})
    }
    for run in results:
        rates.setdefault(run["rate"], {}).setdefault(run["arm"], []).append(run)
    return rates


def over_rates(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By arm the means over all rates of a study, one for each seed that has run at every rate. What is
    compared is linear in them, so the differences are means over the rates too.
    """
    rates = {run["rate"] for run in results}
    runs: dict[tuple[str, int, str], list[Result]] = {}
    for run in results:
        runs.setdefault((run["arm"], run["seed"], run["cold_start"]), []).append(run)
    arms: dict[str, list[Result]] = {}
    for (arm, seed, cold_start), found in runs.items():
        if {run["rate"] for run in found} == rates:
            measured = [{name: run[name] for name in MEASURED} for run in found]
            begun = {"arm": arm, "seed": seed, "cold_start": cold_start}
            arms.setdefault(arm, []).append(begun | _mean(measured))
    return arms


def _mean(values: Sequence[Any]) -> Any:
    """Of numbers; of mappings key by key; None where there is nothing."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values]) for key in first}
    return None if None in values else fmean(values)


def differences_of(
    arms: Mapping[str, Sequence[Result]], control: str, names: Sequence[str]
) -> dict[str, dict[str, Difference | None]]:
    """Of each arm but the control, the differences in these figures."""
    others = {arm: runs for arm, runs in arms.items() if arm != control}
    known = arms.get(control, ())
    return {
        arm: {name: paired_difference(runs, known, FIGURES[name], len(others)) for name in names}
        for arm, runs in others.items()
    }


def study_tables(results: Sequence[Result], control: str) -> str:
    """Markdown: for each share of marked clips the means of all arms, and the differences to the control."""
    lines: list[str] = []
    for rate, arms in by_rate(results).items():
        lines += [f"## {rate:.0%} of the training clips marked", "", means_table(arms)]
        if len(arms) > 1:
            lines += [
                f"Differences to {control}, paired by cold start:",
                "",
                differences_table(arms, control),
            ]
    if len(by_rate(results)) > 1 and len(arms := over_rates(results)) > 1:
        lines += ["## Differences over all rates together", "", differences_table(arms, control)]
    return "\n".join(lines)


def means_table(arms: Mapping[str, Sequence[Result]]) -> str:
    """Of the arms of one rate."""
    rows = [["arm", "seeds", *FIGURES]]
    for arm, runs in arms.items():
        cells = []
        for figure in FIGURES.values():
            values = [value for run in runs if (value := figure(run)) is not None]
            cells.append(f"{fmean(values):.3f}" if values else "–")
        rows.append([arm, str(len(runs)), *cells])
    return _markdown(rows)


def differences_table(arms: Mapping[str, Sequence[Result]], control: str) -> str:
    """Of the arms of one rate; bold where the interval excludes 0."""
    rows = [["arm", "seeds", *COMPARED]]
    for arm, found in differences_of(arms, control, COMPARED).items():
        seeds = max((each.seeds for each in found.values() if each is not None), default=0)
        rows.append([arm, str(seeds), *map(_cell, found.values())])
    return _markdown(rows)


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    text = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"**{text}**" if difference.excludes_zero else text


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([head, "|" + "---|" * len(rows[0]) + "\n", *body])
