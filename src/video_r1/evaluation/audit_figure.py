"""The picture of an audit: pass rates by source and type, and which questions have which two rates.

A row for each group of questions and a mark for each thing that was shown, with its 95 % interval; below it
a map of the questions by their rates in order and with the contrast clip. Those right of the diagonal need
what the contrast takes away.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from video_r1.evaluation.audit_summary import audit_rows, audit_sentences, percent, shown
from video_r1.evaluation.figures import COLOURS, figure_page

_LEFT, _PLOT, _RIGHT, _TOP = 230, 520, 250, 52  # pixels
_ROW, _MARK = 34, 7  # height of a group, and of a mark's line in it
_CELL, _MAP_LEFT = 34, 110
_BLUE, _ORANGE, _PURPLE, _YELLOW = COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[4]


def audit_page(summary: Mapping[str, Any], model: str) -> str:
    """The picture as one HTML page that needs nothing else."""
    notes = [sentence.strip() for sentence in audit_sentences(summary)]
    figure = f"{rates_svg(summary)}<h1>{_map_title(summary)}</h1>{map_svg(summary)}"
    return figure_page(f"What the questions can be answered from: {model}", notes, figure)


def rates_svg(summary: Mapping[str, Any]) -> str:
    """The mean pass rate of each group and view."""
    views = list(summary["all"]["views"])
    fixed = {"blind": _PURPLE, "frozen": _YELLOW, "ordered": _BLUE}
    others = iter((_ORANGE, COLOURS[2], COLOURS[5]))
    colour = {view: fixed.get(view) or next(others) for view in views}
    rows = audit_rows(summary)
    bottom = _TOP + len(rows) * _ROW

    def x(share: float) -> float:
        return _LEFT + _PLOT * share

    parts = [
        f'<line class="grid" x1="{x(share):.0f}" x2="{x(share):.0f}" y1="{_TOP - 6}" y2="{bottom}"/>'
        f'<text class="faint" x="{x(share):.0f}" y="{_TOP - 12}" text-anchor="middle">{percent(share)}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    for place, view in enumerate(views):
        at = _LEFT + 110 * place
        parts.append(
            f'<circle cx="{at}" cy="14" r="4" fill="{colour[view]}"/>'
            f'<text x="{at + 10}" y="18.5">{escape(shown(view))}</text>'
        )
    at = _LEFT + 110 * len(views)
    parts.append(f'<line class="zero" stroke-dasharray="3 2" x1="{at}" x2="{at}" y1="5" y2="23"/>')
    parts.append(f'<text x="{at + 10}" y="18.5">a fixed guess</text>')
    for number, (name, figures) in enumerate(rows):
        y = _TOP + number * _ROW
        parts.append(_row(name, figures, colour, x, y, number == 0))
    height = bottom + 8
    return (
        f'<svg viewBox="0 0 {_LEFT + _PLOT + _RIGHT} {height}" width="{_LEFT + _PLOT + _RIGHT}" role="img" '
        f'aria-label="pass rates by source and type">{"".join(parts)}</svg>'
    )


def _row(
    name: str, figures: Mapping[str, Any], colour: Mapping[str, str], x: Any, y: float, is_title: bool
) -> str:
    label = name if len(name) <= 30 else f"{name[:29]}…"
    guess, middle = x(figures["chance"]), y + _ROW / 2
    parts = [
        f"<title>{escape(name)}: {figures['questions']:,} questions</title>",
        f'<text{" class=title" if is_title else ""} x="0" y="{middle + 4}">{escape(label)}</text>',
        f'<line class="zero" stroke-dasharray="3 2" x1="{guess:.1f}" x2="{guess:.1f}" y1="{y + 3}" '
        f'y2="{y + _ROW - 3}"/>',
    ]
    for place, view in enumerate(view for view in colour if view in figures["views"]):
        figure = figures["views"][view]
        low, high = figure["interval95"]
        at = y + 6 + _MARK * place
        told = f"{shown(view)}: {percent(figure['rate'])} [{percent(low)}, {percent(high)}]"
        parts.append(
            f'<g fill="{colour[view]}" stroke="{colour[view]}"><title>{escape(told)}</title>'
            f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{at}" y2="{at}" stroke-width="2"/>'
            f'<circle cx="{x(figure["rate"]):.1f}" cy="{at}" r="3"/></g>'
        )
    blind = figures["views"].get("blind")
    notes = [f"{percent(blind['answered']['share'])} without it"] if blind else []
    notes += [f"{percent(figures['needs_order']['share'])} by order"] if "needs_order" in figures else []
    text = f"{', '.join(notes)} ({figures['questions']:,})"
    parts.append(f'<text class="faint" x="{_LEFT + _PLOT + 16}" y="{middle + 4}">{escape(text)}</text>')
    return f"<g>{''.join(parts)}</g>"


def _map_title(summary: Mapping[str, Any]) -> str:
    return (
        f"Videos by right answers of {summary['samples']}: in order and {escape(shown(summary['contrast']))}"
    )


def map_svg(summary: Mapping[str, Any]) -> str:
    """Questions by the numbers of right answers in order (to the right) and with the contrast (upwards)."""
    pairs: Sequence[Sequence[int]] = summary["pairs"]
    most, count = max(map(max, pairs)), len(pairs)
    if not most:
        return "<p>No video was asked both ways.</p>"
    parts = []
    for row, counts in enumerate(pairs):
        y = 8 + _CELL * (count - 1 - row)
        for column, questions in enumerate(counts):
            left = _MAP_LEFT + _CELL * column
            fill = "var(--faint)" if column == row else _BLUE if column > row else _ORANGE
            strength = 0.12 + 0.78 * math.sqrt(questions / most) if questions else 0.0
            said = f"{column} right in order, {row} with the contrast: {questions:,} questions"
            parts.append(
                f'<g><title>{escape(said)}</title><rect x="{left}" y="{y}" width="{_CELL - 1}" '
                f'height="{_CELL - 1}" fill="{fill}" fill-opacity="{strength:.2f}" stroke="var(--grid)"/>'
                f'<text x="{left + _CELL / 2}" y="{y + _CELL / 2 + 4}" text-anchor="middle">'
                f"{questions or ''}</text></g>"
            )
        parts.append(f'<text class="faint" x="{_MAP_LEFT - 8}" y="{y + 21}" text-anchor="end">{row}</text>')
        left = _MAP_LEFT + _CELL * row + _CELL / 2
        parts.append(
            f'<text class="faint" x="{left}" y="{8 + _CELL * count + 15}" text-anchor="middle">{row}</text>'
        )
    bottom = 8 + _CELL * count
    parts.append(f'<text class="faint" x="0" y="{bottom / 2}">{escape(shown(summary["contrast"]))}</text>')
    parts.append(
        f'<text class="faint" x="{_MAP_LEFT + _CELL * count / 2}" y="{bottom + 33}" '
        'text-anchor="middle">in order</text>'
    )
    width = _MAP_LEFT + _CELL * count + 8
    return (
        f'<svg viewBox="0 0 {width} {bottom + 40}" width="{width}" role="img" '
        f'aria-label="questions by two rates">{"".join(parts)}</svg>'
    )
