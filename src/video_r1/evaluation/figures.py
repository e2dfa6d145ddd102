"""Figures of an evaluation and of an audit: HTML pages without external files, each around matplotlib SVGs.

    temporal-gap.html   temporal gap of each benchmark and task type: which questions need the frame order
    reasoning.html      accuracy with reasoning minus accuracy of direct answers
    audit.html          pass rates of a dataset by source and type, and a map of its questions

Lines are 95 % intervals; a filled dot's interval does not contain 0. Equal figures give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from video_r1.settings.frames import Contrast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#444444",
)  # safe if colour-blind
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "video-r1",  # ids that do not change from run to run
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "ytick.left": False,
}  # fmt: skip
SHOWN: dict[str, str] = {"frozen": "one frame"}  # display names of frame orders, if other than their own
_MEANING: dict[Contrast, str] = {
    "shuffled": "the same frames in a random order; what is lost needs their order",
    "reversed": "the same frames from last to first; what is lost needs the arrow of time",
    "frozen": "one frame in every place; what is lost needs change",
    "single": "the middle frame alone; what is lost needs more than one moment",
    "dropped": "half of the frames; what is lost needs the other half",
    "blind": "no frame at all; what is lost needs the video, what is not is answered from the question",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title><style>
:root {{ color-scheme: light dark; }} body {{ margin: 24px; font: 14px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 18px; margin: 0 0 4px; }} p {{ margin: 0 0 6px; max-width: 78em; opacity: 0.75; }}
svg {{ display: block; max-width: 100%; height: auto; margin: 12px 0; background: #fff; border-radius: 4px; }}
</style></head>
<body><h1>{heading}</h1>{paragraphs}
{figure}
</body></html>
"""


class Mark(NamedTuple):
    """A difference in [−1, 1] with its 95 % interval and the two accuracies behind it."""

    frames: str  # frame count
    kind: str  # the contrast; of reasoning gains the frame order
    gap: float
    interval: Sequence[float]
    first: float
    other: float
    questions: int
    more: str = ""  # text behind the number of questions


class Row(NamedTuple):
    """A benchmark, or one of its task types or pair metrics, with a mark for each frame count and kind."""

    name: str
    is_benchmark: bool
    marks: list[Mark]


MarksOf = Callable[[str, Mapping[str, Any]], list[Mark]]  # from a frame count and a group's figures


def gap_page(results: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Draw which questions need the frame order. results: figures of each benchmark, as in summary.json."""
    rows = figure_rows(results, gap_marks)
    kinds = {mark.kind for row in rows for mark in row.marks}
    notes = [
        "Temporal gap: accuracy with ordered minus accuracy with shuffled frames (or another contrast), in "
        "percentage points, with the paired 95 % interval over questions. Filled: it does not contain 0.",
        *(f"{name}: {text}." for name, text in _MEANING.items() if name in kinds and len(kinds) > 1),
    ]
    heading = f"Which questions need the order of the frames: {model}"
    return _rows_page(heading, notes, results, rows, "ordered − contrast (questions)")


def gain_page(results: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Draw which questions need reasoning. results: as for `gap_page`."""
    note = (
        "Accuracy with reasoning minus accuracy of direct answers to the same questions, in percentage "
        "points, with the paired 95 % interval over questions. Filled: it does not contain 0. Behind it, the "
        "mean length of both in tokens."
    )
    rows = figure_rows(results, gain_marks)
    heading = f"Which questions need reasoning: {model}"
    return _rows_page(heading, [note], results, rows, "reasoned − direct (questions; tokens)")


def audit_page(
    summary: Mapping[str, Any],
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    notes: Sequence[str],
    model: str,
) -> str:
    """Draw an audit. summary: the content of audit.json; rows: groups of questions with their figures."""
    contrast = SHOWN.get(summary["contrast"], summary["contrast"])
    title = f"Videos by right answers of {summary['samples']}: in order and {contrast}"
    counts = "<p>No video was asked both ways.</p>"
    if any(map(any, summary["pairs"])):
        counts = svg(pairs_figure, summary["pairs"], contrast)
    rates = svg(rates_figure, rows, list(summary["all"]["views"]))
    heading = f"What the questions can be answered from: {model}"
    return _page(heading, notes, f"{rates}<h1>{escape(title)}</h1>{counts}")


def figure_rows(results: Mapping[str, Mapping[str, Any]], marks_of: MarksOf) -> list[Row]:
    """Return rows of each benchmark: itself, its pair metrics, and its task types by falling mean gap."""

    def group_rows(frames: Mapping[str, Any], grouping: str) -> list[Row]:
        names = dict.fromkeys(name for figures in frames.values() for name in figures.get(grouping, {}))
        groups = {
            name: [
                mark
                for count, figures in frames.items()
                for mark in marks_of(count, figures.get(grouping, {}).get(name, {}))
            ]
            for name in names
        }
        return [Row(name.replace("_", " "), False, marks) for name, marks in groups.items() if marks]

    def mean_gap(row: Row) -> float:  # of the first kind: shuffled or ordered, if that was asked
        first = [mark.gap for mark in row.marks if mark.kind == row.marks[0].kind]
        return sum(first) / len(first)

    rows = []
    for result in results.values():
        frames = result["frames"]
        if overall := [mark for count, figures in frames.items() for mark in marks_of(count, figures)]:
            tasks = sorted(group_rows(frames, "by_task"), key=mean_gap, reverse=True)
            rows += [Row(result["title"], True, overall), *group_rows(frames, "by_pairs"), *tasks]
    return rows


def gap_marks(frames: str, figures: Mapping[str, Any]) -> list[Mark]:
    """Return a mark for each contrast that was asked."""
    shuffled = {"shuffled": figures["temporal_gap"]} if "temporal_gap" in figures else {}
    return [
        Mark(frames, name, gap["gap"], gap["interval95"], gap["ordered"], gap[name], gap["questions"])
        for name, gap in (shuffled | figures.get("temporal_gaps", {})).items()
    ]


def gain_marks(frames: str, figures: Mapping[str, Any]) -> list[Mark]:
    """Return a mark for each frame order in which both ways of answering were asked."""
    return [
        Mark(
            frames, order, gain["gain"], gain["interval95"], gain["reasoned"], gain["direct"],
            gain["questions"], f"; {gain['tokens']['reasoned']:.0f} − {gain['tokens']['direct']:.0f} tokens",
        )
        for order, gain in figures.get("reasoning_gains", {}).items()
    ]  # fmt: skip


def rows_figure(rows: Sequence[Row], header: str) -> Figure:
    """Draw a line for each mark: its interval, its dot, and its figures at the right, under `header`."""
    lines = [(row, mark) for row in rows for mark in row.marks]
    kinds = list(dict.fromkeys(mark.kind for _, mark in lines))
    counts = list(dict.fromkeys(mark.frames for _, mark in lines))
    names = kinds if len(kinds) > 1 else [f"{count} frames" for count in counts]
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    told = []
    figure, axes = _axes(len(lines))
    for y, (_, mark) in enumerate(lines):
        own = colour[mark.kind if len(kinds) > 1 else f"{mark.frames} frames"]
        low, high = (100 * end for end in mark.interval)
        axes.hlines(y, low, high, color=own, linewidth=2)
        axes.plot(100 * mark.gap, y, "o", color=own, markerfacecolor=own if low > 0 or high < 0 else "white")
        told.append(
            (f"{mark.frames} frames: " if len(counts) > 1 < len(kinds) else "")
            + f"{100 * mark.first:.1f} − {100 * mark.other:.1f} = {_signed(100 * mark.gap)} "
            f"[{_signed(low)}, {_signed(high)}]  ({mark.questions:,}{mark.more})"
        )
    axes.axvline(0, color="#6b7280")
    axes.xaxis.set_major_formatter(lambda value, _: _signed(value, 0))
    _label(axes, [row.name if mark is row.marks[0] else "" for row, mark in lines], told, colour)
    for (row, _), label in zip(lines, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if row.is_benchmark else "normal")
    axes.set_title(header, loc="right", fontsize="medium")
    return figure


def rates_figure(rows: Sequence[tuple[str, Mapping[str, Any]]], views: Sequence[str]) -> Figure:
    """Draw mean pass rates: a line for each view in each row, and a dashed line for a fixed guess."""
    colour = dict(zip(views, COLOURS, strict=False))
    step, told = 0.8 / len(views), []
    figure, axes = _axes(len(rows) * max(1.0, len(views) / 2))
    for row, (_, group) in enumerate(rows):
        axes.vlines(group["chance"], row - 0.45, row + 0.45, linestyles="dashed", color="#6b7280")
        for place, view in enumerate(views):
            if found := group["views"].get(view):
                y = row + (place - (len(views) - 1) / 2) * step
                axes.hlines(y, *found["interval95"], color=colour[view], linewidth=2)
                axes.plot(found["rate"], y, "o", color=colour[view], markersize=4)
        blind, order = group["views"].get("blind"), group.get("needs_order")
        shares = [f"{percent(blind['answered']['share'])} without it"] if blind else []
        shares += [f"{percent(order['share'])} by order"] if order else []
        told.append(f"{', '.join(shares)} ({group['questions']:,})")
    axes.plot([], [], "--", color="#6b7280", label="a fixed guess")
    axes.set_xlim(-0.01, 1.01)
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    names = [name if len(name) <= 30 else f"{name[:29]}…" for name, _ in rows]
    _label(axes, names, told, {SHOWN.get(view, view): each for view, each in colour.items()})
    return figure


def pairs_figure(pairs: Sequence[Sequence[int]], contrast: str) -> Figure:
    """Draw numbers of questions by their right answers in order (x) and with the contrast (y).

    Questions right of the dashed diagonal need what the contrast takes away.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(pairs)
    figure = Figure(figsize=(2 + 0.45 * count, 1 + 0.45 * count), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        pairs, cmap="Blues", origin="lower", norm=PowerNorm(0.5, vmin=0, vmax=1.6 * max(map(max, pairs)))
    )
    axes.plot([-0.5, count - 0.5], [-0.5, count - 0.5], "--", color="#6b7280", linewidth=1)
    for row, counts in enumerate(pairs):
        for column, questions in enumerate(counts):
            axes.text(column, row, str(questions or ""), ha="center", va="center")
    axes.set(xticks=range(count), yticks=range(count), xlabel="in order", ylabel=contrast)
    return figure


def _axes(lines: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.1 + 0.25 * lines), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="x", color="#e3e6ea")
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
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context(STYLE):
        draw(*arguments).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _rows_page(
    heading: str, notes: Sequence[str], results: Mapping[str, Any], rows: Sequence[Row], header: str
) -> str:
    parts = [each for each in results.values() if each.get("coverage") and not each.get("complete", True)]
    incomplete = [f"{each['title']}: {each['coverage']}." for each in parts]
    drawn = svg(rows_figure, rows, header) if rows else "<p>No question was asked both ways.</p>"
    return _page(heading, [*notes, *incomplete], drawn)


def _page(heading: str, notes: Sequence[str], figure: str) -> str:
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return _PAGE.format(heading=escape(heading), paragraphs=paragraphs, figure=figure)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _signed(value: float, digits: int = 1) -> str:
    """`+5.0`, `−5.0` with a real minus, and a plain 0."""
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"
