"""Two figures: which questions of which benchmarks need the order of the frames, and which need reasoning.

Each is a self-contained HTML page around one SVG. A row for each benchmark and each of its task types, the
temporal gap (accuracy with ordered minus accuracy with shuffled frames, on the same questions) with its
paired 95 % interval, one mark for each frame count; where other contrasts were asked too, one for each of
them. What reasoning gains over direct answers is drawn alike, with one mark for each frame order. A mark is
filled where the interval does not contain 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from video_r1.evaluation.figures import COLOURS, figure_page
from video_r1.settings.frames import Contrast

_LEFT, _PLOT, _RIGHT, _TOP = 270, 520, 250, 64  # pixels
_LINE = 17  # height of one mark's line
_GAP_BEFORE_BENCHMARK = 14


class Mark(NamedTuple):
    """A difference in [−1, 1] with its interval, the two accuracies behind it, and how many questions.
    `kind`: the contrast, or the order in which both ways of answering were asked."""

    frames: str
    kind: str
    gap: float
    low: float
    high: float
    first: float
    other: float
    questions: int
    more: str = ""  # said behind the number of questions

    @property
    def beyond_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Row(NamedTuple):
    name: str
    is_benchmark: bool
    marks: list[Mark]


Marks = Callable[[str, Mapping[str, Any]], list[Mark]]  # of a frame count and a group's figures


def figure_rows(results: Mapping[str, Mapping[str, Any]], marks_of: Marks) -> list[Row]:
    """Each benchmark of a summary, then its pairs, and its task types from the largest gap to the
    smallest."""
    rows = []
    for result in results.values():
        frames = result["frames"]
        overall = [mark for count, figures in frames.items() for mark in marks_of(count, figures)]
        if not overall:
            continue
        rows.append(Row(result["title"], True, overall))
        rows += _group_rows(frames, "by_pairs", marks_of)
        rows += sorted(_group_rows(frames, "by_task", marks_of), key=lambda row: -_mean_gap(row.marks))
    return rows


def _group_rows(frames: Mapping[str, Any], grouping: str, marks_of: Marks) -> list[Row]:
    rows = []
    for name in dict.fromkeys(name for figures in frames.values() for name in figures.get(grouping, {})):
        groups = ((count, figures.get(grouping, {}).get(name, {})) for count, figures in frames.items())
        if marks := [mark for count, group in groups for mark in marks_of(count, group)]:
            rows.append(Row(name.replace("_", " "), False, marks))
    return rows


def _mean_gap(marks: Sequence[Mark]) -> float:
    """Of the kind that comes first, which is shuffled or ordered where that was asked."""
    first = [mark.gap for mark in marks if mark.kind == marks[0].kind]
    return sum(first) / len(first)


def gap_marks(frames: str, figures: Mapping[str, Any]) -> list[Mark]:
    shuffled = {"shuffled": figures["temporal_gap"]} if "temporal_gap" in figures else {}
    marks = []
    for name, gap in (shuffled | figures.get("temporal_gaps", {})).items():
        low, high = gap["interval95"]
        marks.append(Mark(frames, name, gap["gap"], low, high, gap["ordered"], gap[name], gap["questions"]))
    return marks


def gain_marks(frames: str, figures: Mapping[str, Any]) -> list[Mark]:
    marks = []
    for order, gain in figures.get("reasoning_gains", {}).items():
        low, high = gain["interval95"]
        tokens = f"; {gain['tokens']['reasoned']:.0f} − {gain['tokens']['direct']:.0f} tokens"
        figures_of = (gain["gain"], low, high, gain["reasoned"], gain["direct"], gain["questions"])
        marks.append(Mark(frames, order, *figures_of, tokens))
    return marks


def gap_page(results: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Which questions need the order: one HTML page that needs nothing else."""
    rows = figure_rows(results, gap_marks)
    asked = {mark.kind for row in rows for mark in row.marks}
    told = [f"{name}: {_TOLD[name]}." for name in _TOLD if name in asked] if len(asked) > 1 else []
    heading = f"Which questions need the order of the frames: {model}"
    figure = rows_svg(rows, "ordered − contrast (questions)", "temporal gap by benchmark and task type")
    return figure_page(heading, [_CAPTION, *told, *_incomplete(results)], figure)


def gain_page(results: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Which questions need reasoning: one HTML page that needs nothing else."""
    rows = figure_rows(results, gain_marks)
    heading = f"Which questions need reasoning: {model}"
    figure = rows_svg(rows, "reasoned − direct (questions; tokens)", "gain of reasoning by task type")
    return figure_page(heading, [_GAIN_CAPTION, *_incomplete(results)], figure)


def _incomplete(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{result['title']}: {result['coverage']}."
        for result in results.values()
        if result.get("coverage") and not result.get("complete", True)
    ]


_CAPTION = (
    "Temporal gap: accuracy with ordered minus accuracy with shuffled frames (or another contrast), in "
    "percentage points, with the paired 95 % interval over questions. Filled: it does not contain 0."
)
_GAIN_CAPTION = (
    "Accuracy with reasoning minus accuracy of direct answers to the same questions, in percentage points, "
    "with the paired 95 % interval over questions. Filled: it does not contain 0. Behind it, the mean length "
    "of both in tokens."
)
_TOLD: dict[Contrast, str] = {
    "shuffled": "the same frames in a random order; what is lost needs their order",
    "reversed": "the same frames from last to first; what is lost needs the arrow of time",
    "frozen": "one frame in every place; what is lost needs change",
    "single": "the middle frame alone; what is lost needs more than one moment",
    "dropped": "half of the frames; what is lost needs the other half",
    "blind": "no frame at all; what is lost needs the video, what is not is answered from the question",
}


def rows_svg(rows: Sequence[Row], header: str, label: str) -> str:
    """The SVG of the rows; a sentence where there is nothing to draw. header: of the figures at the right."""
    if not rows:
        return "<p>No question was asked both ways.</p>"
    marks = [mark for row in rows for mark in row.marks]
    counts, kinds = (
        list(dict.fromkeys(getattr(mark, name) for mark in marks)) for name in ("frames", "kind")
    )
    several = len(kinds) > 1
    names = kinds if several else [f"{count} frames" for count in counts]
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    low, high, step = _axis(rows)
    y, body = float(_TOP), []

    def x(value: float) -> float:
        return _LEFT + _PLOT * (100 * value - low) / (high - low)

    for number, row in enumerate(rows):
        if row.is_benchmark and number:
            y += _GAP_BEFORE_BENCHMARK
        kind, indent = ("title", 0) if row.is_benchmark else ("task", 16)
        middle = y + _LINE * len(row.marks) / 2 + 4.5
        body.append(f'<text class="{kind}" x="{indent}" y="{middle:.1f}">{escape(row.name)}</text>')
        for mark in row.marks:
            own = colour[mark.kind if several else f"{mark.frames} frames"]
            body.append(_drawn(mark, own, x, y + _LINE / 2, with_frames=len(counts) > 1))
            y += _LINE
        y += 4
    grid = []
    for place in range(round((high - low) / step) + 1):
        value = low + place * step
        kind = "zero" if abs(value) < 1e-9 else "grid"
        at = x(value / 100)
        grid.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 8}" y2="{y:.0f}"/>')
        place_of = f'class="faint" x="{at:.1f}" y="{_TOP - 14}" text-anchor="middle"'
        grid.append(f"<text {place_of}>{_signed(value, 0)}</text>")
    width, height = _LEFT + _PLOT + _RIGHT + (120 if any(mark.more for mark in marks) else 0), y + 8
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" role="img" '
        f'aria-label="{label}">{_legend(colour, header)}{"".join(grid + body)}</svg>'
    )


def _axis(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Ends and step of the axis in percentage points: 0 is on it, and at most eleven lines."""
    ends = [100 * end for row in rows for mark in row.marks for end in (mark.low, mark.high)] + [0.0]
    span = max(ends) - min(ends) or 1.0
    step = next(each for each in (1, 2, 5, 10, 20, 50) if span / each <= 9 or each == 50)
    return math.floor(min(ends) / step) * step, math.ceil(max(ends) / step) * step or step, step


def _drawn(mark: Mark, colour: str, x: Any, y: float, with_frames: bool) -> str:
    frames = f"{mark.frames} frames: " if with_frames else ""
    figures = f"{100 * mark.first:.1f} − {100 * mark.other:.1f} = {_signed(100 * mark.gap)}"
    interval = f"[{_signed(100 * mark.low)}, {_signed(100 * mark.high)}]"
    told = f"{frames}{mark.kind}: {figures} {interval}, {mark.questions:,} questions{mark.more}"
    fill = colour if mark.beyond_zero else "var(--page)"
    return (
        f"<g><title>{escape(told)}</title>"
        f'<line x1="{x(mark.low):.1f}" x2="{x(mark.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" '
        f'stroke-width="2"/>'
        f'<circle cx="{x(mark.gap):.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{colour}" '
        f'stroke-width="2"/>'
        f'<text class="faint" x="{_LEFT + _PLOT + 28}" y="{y + 4:.1f}">{escape(figures)}'
        f"  ({mark.questions:,}{mark.more})</text></g>"
    )


def _signed(value: float, digits: int = 1) -> str:
    """`+5.0`, `−5.0` with a real minus, and a plain 0."""
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"


def _legend(colour: Mapping[str, str], header: str) -> str:
    parts = [
        f'<circle cx="{_LEFT + 8 + 110 * place}" cy="16" r="4.5" fill="{each}"/>'
        f'<text x="{_LEFT + 20 + 110 * place}" y="20.5">{escape(name)}</text>'
        for place, (name, each) in enumerate(colour.items())
    ]
    parts.append(f'<text class="faint" x="{_LEFT + _PLOT + 28}" y="{_TOP - 14}">{header}</text>')
    return "".join(parts)
