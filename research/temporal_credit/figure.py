"""Picture of a study: each arm's paired differences to plain GRPO with their intervals, one panel a rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from research.temporal_credit.tables import Difference, Result, by_rate, differences_of

DRAWN = {"ordered": "without marks", "lying marks": "with lying marks"}
COLOURS = ("#0072b2", "#d55e00")
WIDEST = 30.0  # percentage points; the interval of three seeds may be wider and is cut at the edge
OFFSETS = (-0.14, 0.14)  # of the two figures of an arm, in rows


def draw_study(results: Sequence[Result], control: str, path: Path) -> None:
    """Write a picture of the differences in accuracy with 95 % intervals (`paired_difference`)."""
    study_figure(results, control).savefig(path, dpi=110)


def study_figure(results: Sequence[Result], control: str) -> Figure:
    """Return one panel a rate; a filled dot has an interval that excludes 0."""
    panels = {rate: differences_of(arms, control, tuple(DRAWN)) for rate, arms in by_rate(results).items()}
    arms = list(dict.fromkeys(arm for panel in panels.values() for arm in panel))
    ends = [
        100 * max(abs(each.low), abs(each.high))
        for panel in panels.values()
        for found in panel.values()
        for each in found.values()
        if each is not None
    ]
    limit = min(WIDEST, 5 * (max([5.0, *ends]) // 5 + 1))
    figure = Figure(figsize=(1.6 + 3.0 * len(panels), 1.4 + 0.36 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (rate, panel) in zip(axes, panels.items(), strict=True):
        axis.set_title(f"{rate:.0%} of the training clips marked", fontsize=10)
        axis.axvline(0, color="#6b7280", linewidth=1)
        axis.grid(axis="x", color="#e3e6ea", linewidth=0.8)
        axis.set(xlim=(-limit, limit), xticks=[-limit, -limit / 2, 0, limit / 2, limit])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        _draw_arms(axis, panel, arms)
    axes[0].set(ylim=(len(arms) - 0.5, -0.5), yticks=range(len(arms)), yticklabels=arms)
    figure.supxlabel(f"accuracy in order minus that of {control}, percentage points", fontsize=10)
    handles = [axes[0].plot([], [], "o-", color=colour)[0] for colour in COLOURS]
    figure.legend(handles, DRAWN.values(), loc="outside upper center", ncols=len(DRAWN), frameon=False)
    return figure


def _draw_arms(axis: Axes, panel: Mapping[str, Mapping[str, Difference | None]], arms: Sequence[str]) -> None:
    for row, arm in enumerate(arms):
        for colour, offset, name in zip(COLOURS, OFFSETS, DRAWN, strict=True):
            if found := panel.get(arm, {}).get(name):
                y, fill = row + offset, colour if found.excludes_zero else "white"
                axis.plot([100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=2)
                axis.plot([100 * found.mean], [y], "o", color=colour, markerfacecolor=fill, markersize=5)
