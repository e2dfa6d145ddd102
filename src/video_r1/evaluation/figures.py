"""Figures of an evaluation and of an audit: HTML pages without external files, each around matplotlib SVGs.

    temporal-gap.html   temporal gap of each benchmark and task type: which questions need the frame order
    reasoning.html      accuracy with reasoning minus accuracy of direct answers
    audit.html          pass rates of a dataset by source and type, and a map of its questions

A dot has its 95 % interval; a filled dot's interval does not contain 0. The same figures give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from video_r1.settings.frames import Contrast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # safe for colour-blind readers
_BLUE, _ORANGE, _GREEN, _PURPLE, _YELLOW, _SKY = COLOURS
_FAINT, _GRID = "#6b7280", "#e3e6ea"
_STYLE = {
    "svg.hashsalt": "video-r1",  # ids that do not change from run to run
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9.5,
}
_INCH = 72  # SVG units
SHOWN = {"frozen": "one frame"}  # display names of frame orders, if other than their own
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
:root {{ color-scheme: light dark; }}
body {{ margin: 24px; font: 14px/1.45 system-ui, sans-serif; }}
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
    low: float
    high: float
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
        *_incomplete(results),
    ]
    heading = f"Which questions need the order of the frames: {model}"
    return _page(heading, notes, _drawn_rows(rows, "ordered − contrast (questions)"))


def gain_page(results: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Draw which questions need reasoning. results: as for `gap_page`."""
    notes = [
        "Accuracy with reasoning minus accuracy of direct answers to the same questions, in percentage "
        "points, with the paired 95 % interval over questions. Filled: it does not contain 0. Behind it, the "
        "mean length of both in tokens.",
        *_incomplete(results),
    ]
    rows = figure_rows(results, gain_marks)
    heading = f"Which questions need reasoning: {model}"
    return _page(heading, notes, _drawn_rows(rows, "reasoned − direct (questions; tokens)"))


def audit_page(
    summary: Mapping[str, Any],
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    notes: Sequence[str],
    model: str,
) -> str:
    """Draw an audit. summary: the content of audit.json; rows: groups of questions with their figures."""
    views = _svg(_rates_figure, rows, list(summary["all"]["views"]))
    contrast = SHOWN.get(summary["contrast"], summary["contrast"])
    title = f"Videos by right answers of {summary['samples']}: in order and {contrast}"
    pairs: Sequence[Sequence[int]] = summary["pairs"]
    both = any(map(any, pairs))
    counts = _svg(_pairs_figure, pairs, contrast) if both else "<p>No video was asked both ways.</p>"
    heading = f"What the questions can be answered from: {model}"
    return _page(heading, notes, f"{views}<h1>{escape(title)}</h1>{counts}")


def figure_rows(results: Mapping[str, Mapping[str, Any]], marks_of: MarksOf) -> list[Row]:
    """Return rows of each benchmark: itself, its pair metrics, and its task types by falling mean gap."""
    rows = []
    for result in results.values():
        frames = result["frames"]
        if overall := [mark for count, figures in frames.items() for mark in marks_of(count, figures)]:
            rows.append(Row(result["title"], True, overall))
            rows += _group_rows(frames, "by_pairs", marks_of)
            rows += sorted(_group_rows(frames, "by_task", marks_of), key=lambda row: -_mean_gap(row.marks))
    return rows


def _group_rows(frames: Mapping[str, Any], grouping: str, marks_of: MarksOf) -> list[Row]:
    rows = []
    for name in dict.fromkeys(name for figures in frames.values() for name in figures.get(grouping, {})):
        groups = ((count, figures.get(grouping, {}).get(name, {})) for count, figures in frames.items())
        if marks := [mark for count, group in groups for mark in marks_of(count, group)]:
            rows.append(Row(name.replace("_", " "), False, marks))
    return rows


def _mean_gap(marks: Sequence[Mark]) -> float:
    """Return the mean over the marks of the first kind: shuffled or ordered, if that was asked."""
    first = [mark.gap for mark in marks if mark.kind == marks[0].kind]
    return sum(first) / len(first)


def gap_marks(frames: str, figures: Mapping[str, Any]) -> list[Mark]:
    """Return a mark for each contrast that was asked."""
    shuffled = {"shuffled": figures["temporal_gap"]} if "temporal_gap" in figures else {}
    return [
        Mark(frames, name, gap["gap"], *gap["interval95"], gap["ordered"], gap[name], gap["questions"])
        for name, gap in (shuffled | figures.get("temporal_gaps", {})).items()
    ]


def gain_marks(frames: str, figures: Mapping[str, Any]) -> list[Mark]:
    """Return a mark for each frame order in which both ways of answering were asked."""
    return [
        Mark(
            frames, order, gain["gain"], *gain["interval95"], gain["reasoned"], gain["direct"],
            gain["questions"], f"; {gain['tokens']['reasoned']:.0f} − {gain['tokens']['direct']:.0f} tokens",
        )
        for order, gain in figures.get("reasoning_gains", {}).items()
    ]  # fmt: skip


def _incomplete(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    parts = [each for each in results.values() if each.get("coverage") and not each.get("complete", True)]
    return [f"{each['title']}: {each['coverage']}." for each in parts]


def _drawn_rows(rows: Sequence[Row], header: str) -> str:
    return _svg(rows_figure, rows, header) if rows else "<p>No question was asked both ways.</p>"


def rows_figure(rows: Sequence[Row], header: str) -> Figure:
    """Draw a line for each mark: its interval, its dot, and its figures at the right, under `header`."""
    marks = [mark for row in rows for mark in row.marks]
    kinds = list(dict.fromkeys(mark.kind for mark in marks))
    counts = list(dict.fromkeys(mark.frames for mark in marks))
    names = kinds if len(kinds) > 1 else [f"{count} frames" for count in counts]
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    lines = len(marks) + sum(0.25 + 0.8 * row.is_benchmark for row in rows)
    figure, axes = _axes(left=270, plot=520, right=370, lines=lines)
    y, ticks = 0.0, []
    for number, row in enumerate(rows):
        y += 0.8 * (row.is_benchmark and number > 0)
        ticks.append((y + (len(row.marks) - 1) / 2, row))
        for mark in row.marks:
            own = colour[mark.kind if len(kinds) > 1 else f"{mark.frames} frames"]
            fill = own if mark.low > 0 or mark.high < 0 else "white"
            axes.plot([100 * mark.low, 100 * mark.high], [y, y], color=own, linewidth=2)
            axes.plot([100 * mark.gap], [y], "o", color=own, markerfacecolor=fill, markersize=6)
            told = f"{100 * mark.first:.1f} − {100 * mark.other:.1f} = {_signed(100 * mark.gap)} "
            told += f"[{_signed(100 * mark.low)}, {_signed(100 * mark.high)}]"
            told += f"  ({mark.questions:,}{mark.more})"
            _beside(axes, y, f"{mark.frames} frames: {told}" if len(counts) > 1 < len(kinds) else told)
            y += 1
        y += 0.25
    axes.set_ylim(y - 0.5, -0.7)
    axes.axvline(0, color=_FAINT, linewidth=1.5)
    axes.xaxis.set_major_formatter(lambda value, _: _signed(value, 0))
    for place, row in ticks:
        weight, indent = ("bold", 0.0) if row.is_benchmark else ("normal", 0.02)
        _name(axes, place, row.name, indent, weight)
    _beside(axes, -1.3, header)
    _legend(axes, colour)
    return figure


def _rates_figure(rows: Sequence[tuple[str, Mapping[str, Any]]], views: Sequence[str]) -> Figure:
    """Draw mean pass rates: a group of lines for each row, a line for each view, a dashed fixed guess."""
    fixed = {"blind": _PURPLE, "frozen": _YELLOW, "ordered": _BLUE}
    others = iter((_ORANGE, _GREEN, _SKY))
    colour = {view: fixed.get(view) or next(others) for view in views}
    step = 0.42  # between the lines of a group
    figure, axes = _axes(left=230, plot=520, right=250, lines=len(rows) * (len(views) * step + 0.5))
    y = 0.0
    for number, (name, group) in enumerate(rows):
        height = len(views) * step
        _name(axes, y + height / 2 - step / 2, name if len(name) <= 30 else f"{name[:29]}…", 0.0,
              "normal" if number else "bold")  # fmt: skip
        axes.plot([group["chance"]] * 2, [y - step / 2, y + height - step / 2], "--", color=_FAINT)
        for place, view in enumerate(view for view in views if view in group["views"]):
            found, at = group["views"][view], y + place * step
            axes.plot(found["interval95"], [at, at], color=colour[view], linewidth=2)
            axes.plot([found["rate"]], [at], "o", color=colour[view], markersize=4.5)
        blind, order = group["views"].get("blind"), group.get("needs_order")
        told = [f"{percent(blind['answered']['share'])} without it"] if blind else []
        told += [f"{percent(order['share'])} by order"] if order else []
        _beside(axes, y + height / 2 - step / 2, f"{', '.join(told)} ({group['questions']:,})")
        y += height + 0.5
    axes.set(xlim=(-0.01, 1.01), ylim=(y - 0.3, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(lambda value, _: percent(value))
    _legend(axes, {SHOWN.get(view, view): each for view, each in colour.items()}, guess="a fixed guess")
    return figure


def _pairs_figure(pairs: Sequence[Sequence[int]], contrast: str) -> Figure:
    """Draw how many questions have which numbers of right answers: in order (x) and with the contrast (y)."""
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count, most = len(pairs), max(map(max, pairs))
    size = 0.48 * count + 1.2
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.add_subplot()
    for row, counts in enumerate(pairs):
        for column, questions in enumerate(counts):
            hue = _FAINT if column == row else _BLUE if column > row else _ORANGE
            fill = to_rgba(hue, 0.12 + 0.78 * math.sqrt(questions / most) if questions else 0.0)
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=fill, edgecolor=_GRID))
            axes.text(column, row, str(questions or ""), ha="center", va="center")
    axes.set(xlim=(-0.5, count - 0.5), ylim=(-0.5, count - 0.5), aspect="equal")
    axes.set(xticks=range(count), yticks=range(count), xlabel="in order", ylabel=contrast)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _axes(left: float, plot: float, right: float, lines: float) -> tuple[Figure, Any]:
    """Return a figure and axes with room for names at the left and figures at the right, in SVG units."""
    from matplotlib.figure import Figure

    top, bottom, line = 52, 10, 16.5
    width, height = left + plot + right, top + bottom + line * max(lines, 1)
    figure = Figure(figsize=(width / _INCH, height / _INCH))
    sides = (left / width, bottom / height, plot / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(sides)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, colors=_FAINT)
    axes.grid(axis="x", color=_GRID)
    axes.set(yticks=[], axisbelow=True)
    axes.spines[:].set_visible(False)
    return figure, axes


def _name(axes: Any, y: float, text: str, indent: float, weight: str) -> None:
    width = axes.get_position().width
    x = -axes.get_position().x0 / width + 0.01 + indent
    axes.text(x, y, text, transform=axes.get_yaxis_transform(), va="center", weight=weight)


def _beside(axes: Any, y: float, text: str) -> None:
    axes.text(1.04, y, text, transform=axes.get_yaxis_transform(), va="center", color=_FAINT)


def _legend(axes: Any, colour: Mapping[str, str], guess: str = "") -> None:
    handles = [axes.plot([], [], "o", color=each, label=name)[0] for name, each in colour.items()]
    if guess:
        handles += axes.plot([], [], "--", color=_FAINT, label=guess)
    axes.figure.legend(
        handles=handles, loc="upper left", ncols=len(handles), frameon=False, borderaxespad=0.2,
        bbox_to_anchor=(axes.get_position().x0, 1),
    )  # fmt: skip


def _svg(draw: Callable[..., Figure], *arguments: Any) -> str:
    """Return the figure that `draw` makes as an SVG element: the same bytes for the same arguments."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context(_STYLE):
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
