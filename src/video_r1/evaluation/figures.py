"""Figures of an evaluation and of an audit: HTML pages without external files, each around a matplotlib SVG.

    temporal-gap.html   temporal gap of each benchmark and task type: which questions need the frame order
    reasoning.html      accuracy with reasoning minus accuracy of direct answers
    audit.html          pass rates of a dataset by source and type

Lines are 95 % intervals; a filled dot's interval does not contain 0. Equal figures give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "petroff6"  # a style of matplotlib: colours that are safe if colour-blind, C0 to C5
INK = "#808080"  # legible on a light and on a dark page
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "video-r1",  # ids that do not change from run to run
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.titlecolor"), INK),
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "ytick.left": False,
}  # fmt: skip
SHOWN: dict[str, str] = {"frozen": "one frame"}  # display names of frame orders, if other than their own
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title><style>
:root {{ color-scheme: light dark; }} body {{ margin: 24px; font: 14px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 18px; margin: 0 0 4px; }} p {{ margin: 0 0 6px; max-width: 78em; opacity: 0.75; }}
svg {{ display: block; max-width: 100%; height: auto; margin: 12px 0; }}
</style></head>
<body><h1>{heading}</h1>{paragraphs}
{figure}
</body></html>
"""

Difference = Literal["gap", "gain"]
_POINTS = "in percentage points, with the paired 95 % interval over questions. Filled: it does not contain 0."
_TEXTS: dict[Difference, tuple[str, str, str]] = {  # heading, explanation, header of the figures at the right
    "gap": (
        "Which questions need the order of the frames",
        "Temporal gap: accuracy with ordered minus accuracy with shuffled frames (or another contrast), "
        + _POINTS,
        "ordered − contrast (questions)",
    ),
    "gain": (
        "Which questions need reasoning",
        "Accuracy with reasoning minus accuracy of direct answers to the same questions, "
        f"{_POINTS} Behind it, the mean length of both in tokens.",
        "reasoned − direct (questions; tokens)",
    ),
}


class Mark(NamedTuple):
    """A difference in [−1, 1] with its 95 % interval and the two accuracies behind it."""

    frames: str  # frame count
    kind: str  # the contrast; of reasoning gains the frame order
    gap: float
    interval: Sequence[float]
    first: float
    other: float
    questions: str  # their number, and mean lengths in tokens


Line = tuple[str, bool, Mark]  # name of its row, "" below the first line; whether it is a benchmark


def difference_page(results: Mapping[str, Mapping[str, Any]], model: str, of: Difference) -> str:
    """Draw temporal gaps or reasoning gains. results: figures of each benchmark, as in summary.json."""
    heading, note, header = _TEXTS[of]
    incomplete = [
        f"{each['title']}: {each['coverage']}." for each in results.values() if not each.get("complete", True)
    ]
    lines = [line for result in results.values() for line in _lines(result, of)]
    drawn = svg(_lines_figure, lines, header) if lines else "<p>No question was asked both ways.</p>"
    return _page(f"{heading}: {model}", [note, *incomplete], drawn)


def audit_page(
    summary: Mapping[str, Any],
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    notes: Sequence[str],
    model: str,
) -> str:
    """Draw an audit. summary: the content of audit.json; rows: groups of questions with their figures."""
    rates = svg(_rates_figure, rows, list(summary["all"]["views"]))
    return _page(f"What the questions can be answered from: {model}", notes, rates)


def _lines(result: Mapping[str, Any], of: Difference) -> Iterator[Line]:
    """Yield the lines of a benchmark: itself, its pair metrics, and its task types, largest gap first.

    A line is a frame count in one contrast or order; the first is that of shuffled frames, if asked.
    """
    figures_of: Mapping[str, Mapping[str, Any]] = result["frames"]

    def groups(grouping: str) -> dict[str, list[Mark]]:
        found: dict[str, list[Mark]] = {}
        for count, figures in figures_of.items():
            for name, group in figures.get(grouping, {}).items():
                found.setdefault(name.replace("_", " "), []).extend(_marks(count, group, of))
        return {name: marks for name, marks in found.items() if marks}

    if own := [mark for count, figures in figures_of.items() for mark in _marks(count, figures, of)]:
        tasks = sorted(groups("by_task").items(), key=lambda group: group[1][0].gap, reverse=True)
        for name, marks in [(result["title"], own), *groups("by_pairs").items(), *tasks]:
            for place, mark in enumerate(marks):
                yield "" if place else name, marks is own, mark


def _marks(frames: str, figures: Mapping[str, Any], of: Difference) -> Iterator[Mark]:
    """Yield a mark for each contrast that was asked, or for each order that was asked in both ways."""
    if of == "gap":
        shuffled = {"shuffled": figures["temporal_gap"]} if "temporal_gap" in figures else {}
        for name, gap in (shuffled | figures.get("temporal_gaps", {})).items():
            count = f"{gap['questions']:,}"
            yield Mark(frames, name, gap["gap"], gap["interval95"], gap["ordered"], gap[name], count)
    else:
        for order, gain in figures.get("reasoning_gains", {}).items():
            tokens = f"{gain['tokens']['reasoned']:.0f} − {gain['tokens']['direct']:.0f} tokens"
            count, means = f"{gain['questions']:,}; {tokens}", (gain["reasoned"], gain["direct"])
            yield Mark(frames, order, gain["gain"], gain["interval95"], *means, count)


def _lines_figure(lines: Sequence[Line], header: str) -> Figure:
    """Draw each line's interval, its dot, and its figures at the right, under `header`."""
    kinds = list(dict.fromkeys(mark.kind for *_, mark in lines))
    counts = list(dict.fromkeys(mark.frames for *_, mark in lines))
    names = kinds if len(kinds) > 1 else [f"{count} frames" for count in counts]
    colour = {name: f"C{number}" for number, name in enumerate(names)}
    told = []
    figure, axes = _axes(len(lines))
    for y, (*_, mark) in enumerate(lines):
        own = colour[mark.kind if len(kinds) > 1 else f"{mark.frames} frames"]
        low, high = (100 * end for end in mark.interval)
        axes.hlines(y, low, high, color=own, linewidth=2)
        axes.plot(100 * mark.gap, y, "o", color=own, markerfacecolor=own if low > 0 or high < 0 else "white")
        told.append(
            (f"{mark.frames} frames: " if len(counts) > 1 < len(kinds) else "")
            + f"{100 * mark.first:.1f} − {100 * mark.other:.1f} = {_signed(100 * mark.gap)} "
            f"[{_signed(low)}, {_signed(high)}]  ({mark.questions})"
        )
    axes.axvline(0, color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: _signed(value, 0))
    _label(axes, [name for name, *_ in lines], told, colour)
    for (_, is_benchmark, _), label in zip(lines, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if is_benchmark else "normal")
    axes.set_title(header, loc="right", fontsize="medium")
    return figure


def _rates_figure(rows: Sequence[tuple[str, Mapping[str, Any]]], views: Sequence[str]) -> Figure:
    """Draw mean pass rates: a line for each view in each row, and a dashed line for the best fixed guess."""
    step, told = 0.8 / len(views), []
    figure, axes = _axes(len(rows) * max(1.0, len(views) / 2))
    for row, (_, group) in enumerate(rows):
        axes.vlines(group["chance"], row - 0.45, row + 0.45, linestyles="dashed", color=INK)
        for place, view in enumerate(views):
            if found := group["views"].get(view):
                y = row + (place - (len(views) - 1) / 2) * step
                axes.hlines(y, *found["interval95"], color=f"C{place}", linewidth=2)
                axes.plot(found["rate"], y, "o", color=f"C{place}", markersize=4)
        blind, order = group["views"].get("blind"), group.get("needs_order")
        shares = [f"{percent(blind['answered']['share'])} without it"] if blind else []
        shares += [f"{percent(order['share'])} by order"] if order else []
        told.append(f"{', '.join(shares)} ({group['questions']:,})")
    axes.plot([], [], "--", color=INK, label="best fixed guess")
    axes.set_xlim(-0.01, 1.01)
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    names = [name if len(name) <= 30 else f"{name[:29]}…" for name, _ in rows]
    _label(axes, names, told, {SHOWN.get(view, view): f"C{place}" for place, view in enumerate(views)})
    return figure


def _axes(lines: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.1 + 0.25 * lines), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="x", color=INK, alpha=0.25)
    return figure, axes


def _label(axes: Any, names: Sequence[str], told: Sequence[str], colour: Mapping[str, str]) -> None:
    """Write names at the left and figures at the right of the rows, and a legend above."""
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(told)), labels=told)
    right.tick_params(length=0)
    for name, each in colour.items():
        axes.plot([], [], "o", color=each, label=name)
    axes.figure.legend(loc="outside upper left", ncols=len(colour) + 1, frameon=False)


def svg(draw: Callable[..., Figure], *arguments: Any) -> str:
    """Return the figure that `draw` makes as an SVG element."""
    from matplotlib import style

    text = StringIO()
    with style.context([COLOURS, STYLE]):
        draw(*arguments).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _page(heading: str, notes: Sequence[str], figure: str) -> str:
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return _PAGE.format(heading=escape(heading), paragraphs=paragraphs, figure=figure)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _signed(value: float, digits: int = 1) -> str:
    """`+5.0`, `−5.0` with a real minus, and a plain 0."""
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"
