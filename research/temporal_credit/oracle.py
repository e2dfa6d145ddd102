"""True answers to lab questions about a contrast clip (reversed, or frozen at one moment).

The lab draws an answer first and then a timeline that has it. The oracle reads the answer off any timeline,
so that a model's answer to a contrast clip can be judged: right about the clip that it saw, or a habit.
"""

import json
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Literal

from video_r1.lab.questions import LabQuestion
from video_r1.lab.scenes import SIZES, Look, box_of

Timeline = Sequence[Look]
_RING = ("top left", "top right", "bottom right", "bottom left")  # clockwise


def contrast_answer(
    family: str, question: LabQuestion, contrast: Literal["reversed", "frozen"], moment: int = 0
) -> str | None:
    """Return the answer to `question` about its contrast clip; None if the clip has none.

    moment: the moment that a frozen clip shows.
    """
    timeline = question.timeline
    shown = timeline[::-1] if contrast == "reversed" else (timeline[moment],) * len(timeline)
    return true_answer(family, question.problem, shown)


def true_answer(family: str, problem: str, timeline: Timeline) -> str | None:
    """Return the answer to a family's question about `timeline`, in the family's words.

    Returns None if the question presupposes something that is not shown, such as the direction of an object
    that does not move.
    """
    return _ANSWERS[family](timeline, problem.rstrip("?").split()[-1])


def _direction(timeline: Timeline, named: str) -> str | None:
    for steps, back, forth in (
        ([b.x - a.x for a, b in pairwise(timeline)], "left", "right"),
        ([b.y - a.y for a, b in pairwise(timeline)], "up", "down"),
    ):
        if all(step < 0 for step in steps) or all(step > 0 for step in steps):
            return back if steps[0] < 0 else forth
    return None


def _neighbour(timeline: Timeline, named: str, by: int) -> str | None:
    """Return the colour `by` places after the named one."""
    colours = [colour for colour, _ in groupby(look.colour for look in timeline)]
    at = colours.index(named) + by if named in colours else -1
    return colours[at] if 0 <= at < len(colours) else None


def _growth(timeline: Timeline, named: str) -> str | None:
    radii = [SIZES[look.size] for look in timeline]
    ways = [way for way, _ in groupby(b > a for a, b in pairwise(radii) if a != b)]
    return " then ".join("growing" if way else "shrinking" for way in ways) or None


def _rotation(timeline: Timeline, named: str) -> str | None:
    places = [_RING.index(look.place) for look in timeline]
    turns = {(b - a) % len(_RING) for a, b in pairwise(places)}
    return {1: "clockwise", 3: "counterclockwise"}.get(turns.pop()) if len(turns) == 1 else None


def _count_before(timeline: Timeline, named: str) -> str | None:
    colours = [look.colour for look in timeline]
    return str(len(set(colours[: colours.index(named)]))) if named in colours else None


def _blinks(timeline: Timeline, named: str) -> str:
    return str(sum(is_shown for is_shown, _ in groupby(bool(look.shape) for look in timeline)))


def _speed(timeline: Timeline, named: str) -> str | None:
    steps = {abs(b.column - a.column) for a, b in pairwise(timeline)}
    return str(steps.pop()) if len(steps) == 1 else None


def _story(timeline: Timeline, named: str) -> str:
    colours = [colour for colour, _ in groupby(look.colour for look in timeline)]
    return f"the {timeline[0].shape} was {', then '.join(colours)}"


def _when(timeline: Timeline, named: str) -> str | None:
    """Return the interval of the named colour; None if it comes twice."""
    runs = [(colour, len(list(looks))) for colour, looks in groupby(look.colour for look in timeline)]
    places = [place for place, (colour, _) in enumerate(runs) if colour == named]
    if len(places) != 1:
        return None
    start = sum(length for _, length in runs[: places[0]])
    return json.dumps({"time": [start, start + runs[places[0]][1]]})


def _box(look: Look) -> str:
    return json.dumps({"boxes": box_of(look)})


_ANSWERS: dict[str, Callable[[Timeline, str], str | None]] = {
    "direction": _direction,
    "first_colour": lambda timeline, named: timeline[0].colour,
    "last_colour": lambda timeline, named: timeline[-1].colour,
    "after": lambda timeline, named: _neighbour(timeline, named, 1),
    "before": lambda timeline, named: _neighbour(timeline, named, -1),
    "first_shape": lambda timeline, named: timeline[0].shape,
    "end_place": lambda timeline, named: timeline[-1].place,
    "growth": _growth,
    "rotation": _rotation,
    "count_before": _count_before,
    "blinks": _blinks,
    "digits": lambda timeline, named: " ".join(look.shape for look in timeline),
    "speed": _speed,
    "story": _story,
    "image_colour": lambda timeline, named: timeline[0].colour,
    "image_place": lambda timeline, named: timeline[0].place,
    "image_digit": lambda timeline, named: timeline[0].shape,
    "image_size": lambda timeline, named: timeline[0].size,
    "when": _when,
    "box_at_end": lambda timeline, named: _box(timeline[-1]),
    "box_at": lambda timeline, named: _box(timeline[int(float(named))]),
}
