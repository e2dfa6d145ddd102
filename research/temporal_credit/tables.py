"""Tables of a study: means over seeds, and paired differences to plain GRPO with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

Result = Mapping[str, Any]
"""Content of a run's result.json."""

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
"""Columns of the tables: accuracies over the test videos without marks, unless a name says otherwise."""
MEASURED = ("accuracy", "habits", "training_accuracy", "credit", "step_seconds")
"""Numeric keys of a result."""
COMPARED = ("ordered", "gap", "lost without marks", "lying marks", "in training")


class Difference(NamedTuple):
    """Mean over seeds of (arm − control), with its interval."""

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
    """Return the difference over the seeds whose cold start both have; None if there are fewer than two.

    The interval is Student's. It holds at 95 % for all `compared` arms together (Bonferroni): each arm has
    the level 1 − 0.05 ÷ compared.
    """
    controls = {(run["seed"], run["cold_start"]): run for run in control}
    pairs = [(run, controls.get((run["seed"], run["cold_start"]))) for run in arm]
    values = [(figure(run), figure(other)) for run, other in pairs if other is not None]
    differences = [mine - theirs for mine, theirs in values if mine is not None and theirs is not None]
    if len(differences) < 2:
        return None
    mean, count = fmean(differences), len(differences)
    half = t_quantile(1 - 0.025 / compared, count - 1) * stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


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


def by_rate(results: Sequence[Result]) -> dict[float, dict[str, list[Result]]]:
    """Group runs by share of marked clips (ascending), then by arm."""
    rates: dict[float, dict[str, list[Result]]] = {}
    for run in sorted(results, key=lambda run: run["rate"]):
        rates.setdefault(run["rate"], {}).setdefault(run["arm"], []).append(run)
    return rates


def over_rates(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Average the runs of an arm and a seed over all rates; a seed counts if it has run at every rate.

    All compared figures are linear in these values, so the differences are means over the rates too.
    """
    rates = {run["rate"] for run in results}
    runs: dict[tuple[str, int, str], list[Result]] = {}
    for run in results:
        runs.setdefault((run["arm"], run["seed"], run["cold_start"]), []).append(run)
    arms: dict[str, list[Result]] = {}
    for (arm, seed, cold_start), found in runs.items():
        if {run["rate"] for run in found} == rates:
            measured = [{name: run[name] for name in MEASURED} for run in found]
            run = {"arm": arm, "seed": seed, "cold_start": cold_start}
            arms.setdefault(arm, []).append(run | _mean(measured))
    return arms


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of numbers, of mappings key by key; None if a value is missing."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values]) for key in first}
    return None if None in values else fmean(values)


def differences_of(
    arms: Mapping[str, Sequence[Result]], control: str, names: Sequence[str]
) -> dict[str, dict[str, Difference | None]]:
    """Return the differences in the named figures for each arm except the control."""
    others = {arm: runs for arm, runs in arms.items() if arm != control}
    known = arms.get(control, ())
    return {
        arm: {name: paired_difference(runs, known, FIGURES[name], len(others)) for name in names}
        for arm, runs in others.items()
    }


def study_tables(results: Sequence[Result], control: str) -> str:
    """Return Markdown: for each rate the means of all arms and the differences to the control."""
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
    """Return a Markdown table of the mean figures of each arm at one rate."""
    rows = [["arm", "seeds", *FIGURES]]
    for arm, runs in arms.items():
        cells = []
        for figure in FIGURES.values():
            values = [value for run in runs if (value := figure(run)) is not None]
            cells.append(f"{fmean(values):.3f}" if values else "–")
        rows.append([arm, str(len(runs)), *cells])
    return _markdown(rows)


def differences_table(arms: Mapping[str, Sequence[Result]], control: str) -> str:
    """Return a Markdown table of the differences at one rate; bold if the interval excludes 0."""
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
