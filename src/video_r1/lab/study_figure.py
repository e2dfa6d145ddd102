"""The picture of a study: each arm's differences to the control, with intervals, by share of marks."""

from collections.abc import Mapping, Sequence
from html import escape

from video_r1.evaluation.figures import COLOURS
from video_r1.lab.study_tables import Difference, Result, by_rate, differences_of

DRAWN = {"ordered": "without marks", "lying marks": "with lying marks"}
WIDEST = 30.0  # percentage points; of three seeds an interval may go further, and ends at the edge
_LEFT, _PANEL, _GAP, _TOP, _LINE = 150, 230, 44, 66, 15  # pixels
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1b1f24}.faint{font-size:12px;fill:#6b7280}"
    ".grid{stroke:#e3e6ea}.zero{stroke:#6b7280}"
)


def study_svg(results: Sequence[Result], control: str) -> str:
    """Differences in accuracy with 95 % intervals (see `paired_difference`), in percentage points."""
    panels = {rate: differences_of(arms, control, tuple(DRAWN)) for rate, arms in by_rate(results).items()}
    arms = list(dict.fromkeys(arm for panel in panels.values() for arm in panel))
    ends = [100 * end for panel in panels.values() for found in panel.values() for end in _ends(found)]
    most = max([5.0, *map(abs, ends)])
    most = min(WIDEST, 5 * (most // 5 + 1))
    height = _TOP + len(arms) * (_LINE * len(DRAWN) + 10) + 12
    parts = [_legend()]
    for place, (rate, found) in enumerate(panels.items()):
        parts += _panel(_LEFT + place * (_PANEL + _GAP), rate, found, arms, most, height)
    for row, arm in enumerate(arms):
        middle = _TOP + row * (_LINE * len(DRAWN) + 10) + _LINE * len(DRAWN) / 2 + 4
        parts.append(f'<text x="4" y="{middle:.0f}">{escape(arm)}</text>')
    width = _LEFT + len(panels) * (_PANEL + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="differences to {escape(control)}"><style>{_STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _ends(found: Mapping[str, Difference | None]) -> list[float]:
    return [end for each in found.values() if each is not None for end in (each.low, each.high)]


def _panel(
    left: int, rate: float, found: Mapping[str, Mapping[str, Difference | None]], arms: Sequence[str],
    most: float, height: int,
) -> list[str]:  # fmt: skip
    def x(value: float) -> float:
        return left + _PANEL * (max(-most, min(most, 100 * value)) + most) / (2 * most)

    parts = [f'<text x="{left}" y="36">{rate:.0%} of the training clips marked</text>']
    for value in (-most, -most / 2, 0.0, most / 2, most):
        at, kind = x(value / 100), "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 6}" y2="{height - 8}"/>')
        text = f"{value:+.3g}".replace("-", "−") if value else "0"
        parts.append(f'<text class="faint" x="{at:.1f}" y="{_TOP - 12}" text-anchor="middle">{text}</text>')
    for row, arm in enumerate(arms):
        y = _TOP + row * (_LINE * len(DRAWN) + 10) + _LINE / 2
        for colour, name in zip(COLOURS, DRAWN, strict=False):
            if difference := found.get(arm, {}).get(name):
                parts.append(
                    _drawn(difference, colour, x(difference.low), x(difference.mean), x(difference.high), y)
                )
            y += _LINE
    return parts


def _drawn(difference: Difference, colour: str, low: float, mean: float, high: float, y: float) -> str:
    fill = colour if difference.excludes_zero else "#fff"
    told = f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return (
        f"<g><title>{told}, {difference.seeds} seeds</title>"
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{mean:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2"/></g>'
    )


def _legend() -> str:
    parts = ['<text x="4" y="16">Accuracy in order minus that of plain GRPO, percentage points</text>']
    for place, (colour, name) in enumerate(zip(COLOURS, DRAWN.values(), strict=False)):
        x = 460 + 150 * place
        parts.append(
            f'<circle cx="{x}" cy="12" r="4" fill="{colour}"/><text x="{x + 10}" y="16">{name}</text>'
        )
    return "".join(parts)
