"""Figure of an evaluation: temporal-gap.html, a page without external files around a matplotlib SVG.

It shows the temporal gap of each benchmark and task type: which questions need the order of the frames. Lines
are 95 % intervals; a filled dot's interval does not contain 0. Equal figures give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple

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

_NOTE = (
    "Temporal gap: accuracy with ordered minus accuracy with shuffled frames (or another contrast), in "
    "percentage points, with the paired 95 % interval over questions. Filled: it does not contain 0."
)


class Line(NamedTuple):
    """A temporal gap to draw."""

    name: str  # of its row; "" below the first line of a row
    is_benchmark: bool
    frames: str  # frame count
    contrast: str
    gap: Mapping[str, Any]  # as in summary.json


def gap_page(results: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Draw temporal gaps. results: figures of each benchmark, as in summary.json."""
    notes = [
        f"{each['title']}: {each['coverage']}." for each in results.values() if not each.get("complete", True)
    ]
    lines = [line for result in results.values() for line in _lines(result)]
    return _PAGE.format(
        heading=escape(f"Which questions need the order of the frames: {model}"),
        paragraphs="".join(f"<p>{escape(note)}</p>" for note in (_NOTE, *notes)),
        figure=_svg(lines) if lines else "<p>No question was asked both ways.</p>",
    )


def _lines(result: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the lines of a benchmark: itself, its pair metrics, and its task types, largest gap first."""
    own, pairs, tasks = {}, {}, {}
    for frames, figures in result["frames"].items():
        shown = ((own, {result["title"]: figures}), (pairs, figures.get("by_pairs", {})),
                 (tasks, figures.get("by_task", {})))  # fmt: skip
        for rows, groups in shown:
            for name, group in groups.items():
                gaps = {"shuffled": group.get("temporal_gap")} | group.get("temporal_gaps", {})
                if found := [(frames, contrast, gap) for contrast, gap in gaps.items() if gap]:
                    rows.setdefault(name, []).extend(found)
    by_gap = sorted(tasks.items(), key=lambda row: row[1][0][2]["gap"], reverse=True)
    for rows in (own, pairs, dict(by_gap)):
        for name, gaps in rows.items():
            shown = name if rows is own else name.replace("_", " ")
            for place, gap in enumerate(gaps):
                yield Line("" if place else shown, rows is own, *gap)


def _svg(lines: Sequence[Line]) -> str:
    """Draw each line's interval, its dot, and its figures at the right, with a legend above."""
    from matplotlib import style
    from matplotlib.figure import Figure

    contrasts = dict.fromkeys(line.contrast for line in lines)
    colour = {contrast: f"C{number}" for number, contrast in enumerate(contrasts)}
    told, text = [], StringIO()
    with style.context([COLOURS, STYLE]):
        figure = Figure(figsize=(13, 1.1 + 0.25 * len(lines)), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="x", color=INK, alpha=0.25)
        for y, line in enumerate(lines):
            own = colour[line.contrast]
            gap, ends = 100 * line.gap["gap"], [100 * end for end in line.gap["interval95"] or ()]
            axes.hlines([y] * bool(ends), ends[:1], ends[1:], color=own, linewidth=2)
            apart = bool(ends) and (ends[0] > 0 or ends[1] < 0)
            axes.plot(gap, y, "o", color=own, markerfacecolor=own if apart else "white")
            shown = f" [{', '.join(map(_signed, ends))}]" if ends else ""
            ordered, other = 100 * line.gap["ordered"], 100 * line.gap[line.contrast]
            told.append(
                f"{line.frames} frames: {ordered:.1f} − {other:.1f} = {_signed(gap)}{shown}"
                f"  ({line.gap['questions']:,})"
            )
        axes.axvline(0, color=INK)
        axes.xaxis.set_major_formatter(lambda value, _: _signed(value, 0))
        axes.set_yticks(range(len(lines)), labels=[line.name for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        for line, label in zip(lines, axes.get_yticklabels(), strict=True):
            label.set_fontweight("bold" if line.is_benchmark else "normal")
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(told)), labels=told)
        right.tick_params(length=0)
        for name, each in colour.items():
            axes.plot([], [], "o", color=each, label=name)
        figure.legend(loc="outside upper left", ncols=len(colour), frameon=False)
        axes.set_title("ordered − contrast (questions)", loc="right", fontsize="medium")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _signed(value: float, digits: int = 1) -> str:
    """`+5.0`, `−5.0` with a real minus, and a plain 0."""
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"
