"""Grounding answers: a span in seconds, boxes, or both, as JSON inside the answer tags (`GROUNDING_FORMS`).

Seconds count from the beginning of the clip, or of the row's window. A box is [x1, y1, x2, y2] in thousandths
of the picture's width and height from its top left corner, whatever the frame size; boxes of several frames
are keyed by their second. The types and their JSON are those of OneThinker (arXiv 2512.03043).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from video_r1.settings.shared import ProblemType

Span = tuple[float, float]  # start and end in seconds
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in thousandths

GROUNDING_FORMS = {
    "temporal grounding": '{"time": [2.5, 6.0]}',
    "spatial grounding": '{"boxes": [120, 300, 480, 910]}',
    "spatial-temporal grounding": '{"time": [2.5, 4.2], "boxes": {"3": [120, 300, 480, 910]}}',
    "tracking": '{"boxes": {"1": [120, 300, 480, 910]}}',
}
"""Example answer of each grounding type."""
GROUNDING_HINTS: dict[ProblemType, str] = {
    "temporal grounding": 'Give start and end in seconds as JSON: {"time": [2.5, 6.0]}',
    "spatial grounding": (
        'Give the box in thousandths of width and height as JSON: {"boxes": [x1, y1, x2, y2]}'
    ),
    "spatial-temporal grounding": (
        "Give start and end in seconds, and for each whole second between them the box in thousandths of "
        'width and height, as JSON: {"time": [2.5, 4.2], "boxes": {"3": [x1, y1, x2, y2], "4": '
        "[x1, y1, x2, y2]}}"
    ),
    "tracking": (
        "Give the box in thousandths of width and height for each second, counted from 1, as JSON: "
        '{"boxes": {"1": [x1, y1, x2, y2], "2": [x1, y1, x2, y2]}}'
    ),
}
"""Instructions about the answer's form and units, for prompts."""
ON_VIDEOS = ("temporal grounding", "spatial-temporal grounding", "tracking")
SIDE = 1000.0  # width and height of a picture, in the unit of boxes

_BOX_NAMES = ("boxes", "box", "bbox", "bbox_2d", "bounding_box")
_TIME_NAMES = ("time", "times", "span", "timestamp", "timestamps", "segment")
_ENDS = (("start", "end"), ("start_time", "end_time"))
_NUMBER = r"\d+(?:\.\d+)?"
_TIME = rf"(?:\d+:)?\d{{1,2}}:\d{{2}}(?:\.\d+)?|{_NUMBER}"  # 1:02:03.5, 02:03, 3.5
_UNIT = r"(?:\s*(?:seconds?|secs?|s)\b)?"
_ONE_TIME = re.compile(rf"\s*({_TIME}){_UNIT}\s*")
_TIMES = re.compile(rf"(?<![\d.:])({_TIME})(?![\d:]){_UNIT}")
_SPAN = re.compile(
    rf"(?<![\d.:])(?<!\d,)({_TIME}){_UNIT}\s*(?:-|–|—|,(?!\d)|\bto\b|\band\b|\buntil\b|\btill\b)"
    rf"\s*({_TIME})(?![\d:]|,\d)"  # a comma between digits may be one of "2,5 s to 4,5 s"
)
_NUMBERS = re.compile(rf"(?<![\w.])-?{_NUMBER}")
_DECODER = json.JSONDecoder()
_MOST_PARTS = 200  # brackets at which a JSON value may begin


@dataclass(frozen=True, slots=True)
class Located:
    """A parsed grounding answer: the span, the box, or the boxes by second; None for a missing part."""

    time: Span | None = None
    box: Box | None = None
    boxes: Mapping[float, Box] | None = None

    def __str__(self) -> str:
        """Format the answer as the JSON that training requires."""
        parsed: dict[str, Any] = {} if self.time is None else {"time": self.time}
        if self.box is not None:
            parsed["boxes"] = self.box
        if self.boxes is not None:
            parsed["boxes"] = {f"{second:.12g}": box for second, box in self.boxes.items()}
        return json.dumps(parsed)


@lru_cache(256)  # a truth is compared with many answers
def parse_located(text: str, problem_type: str) -> Located | None:
    """Parse an answer in the exact form that training requires: one JSON object with the type's keys (others
    are ignored) and finite numbers. Return None for any other text.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _located(parsed, problem_type) if isinstance(parsed, dict) else None


def _located(named: Mapping[str, Any], problem_type: str) -> Located | None:
    time = None if problem_type in ("spatial grounding", "tracking") else _numbers(named.get("time"), 2)
    if problem_type == "temporal grounding":
        return time and Located(time=time)
    if problem_type == "spatial grounding":
        box = _numbers(named.get("boxes"), 4)
        return box and Located(box=box)
    frames = named.get("boxes")
    if not isinstance(frames, dict) or (problem_type != "tracking" and time is None):
        return None
    boxes: dict[Any, Any] = {_number(second): _numbers(box, 4) for second, box in frames.items()}
    return None if None in boxes or None in boxes.values() else Located(time=time, boxes=boxes)


def read_located(text: str, problem_type: str, last: bool = False) -> Located | None:
    """Parse the answer that a human reader would take from `text`, for evaluation.

    Also accepted: single quotes, text or a code block around the JSON, truncated JSON, keys such as
    "bbox_2d", a bare list, quoted numbers, times such as "3.2s" and "1:05", and in words "from 3.2s to 5s" or
    exactly two times (four coordinates). Frames with an invalid box are dropped. last: use the last of
    several spans in words, not the first.
    """
    if exact := parse_located(text, problem_type):
        return exact
    for parsed in _json_parts(text):
        if found := _located(_in_form(parsed, problem_type), problem_type):
            return found
    coordinates = [float(number) for number in _NUMBERS.findall(text)]
    return _located({"time": _span_in_words(text, last), "boxes": coordinates}, problem_type)


def truth_problems(text: str, problem_type: str, data_type: str, window: float | None) -> Iterator[str]:
    """Yield what is wrong with the true answer of a grounding row. window: length of its window in s."""
    if data_type == "text" or (data_type == "image" and problem_type in ON_VIDEOS):
        yield f"{problem_type} is for videos, and this is {'a' if data_type == 'text' else 'an'} {data_type}"
    found = parse_located(text, problem_type)
    form = GROUNDING_FORMS[problem_type]
    if found is None:
        yield f"the solution of a {problem_type} problem must be JSON such as {form}, not {text[:80]!r}"
        return
    if found.time is not None:
        start, end = found.time
        if not 0 <= start < end:
            yield f"the solution's span goes from {start:g} s to {end:g} s; it needs 0 <= start < end"
    if window is not None and (outside := outside_of(found, window)):
        yield f"{outside}, and the window lasts {window:g} s; its seconds count from the window's start"
    boxes = [found.box] if found.box else [*(found.boxes or {}).values()]
    if not boxes and problem_type != "temporal grounding":
        yield f"the solution has no box; it must be JSON such as {form}"
    for box in boxes:
        left, top, right, bottom = box
        shown = ", ".join(f"{value:g}" for value in box)
        if max(box) <= 1:
            yield f"the solution's box [{shown}] is in shares of the picture; write thousandths (times 1000)"
        elif min(box) < 0 or max(box) > SIDE:
            yield f"the solution's box [{shown}] is in pixels; write 1000·x/width and 1000·y/height"
        elif left >= right or top >= bottom:
            yield f"the solution's box [{shown}] has no area; write [x1, y1, x2, y2], x1 < x2 and y1 < y2"
        else:
            continue
        return


def outside_of(truth: Located, duration: float) -> str:
    """Return what of a true answer is outside of a clip or window of `duration` s; "" for nothing."""
    start, end = truth.time or (0.0, 0.0)
    seconds = max([end, *(truth.boxes or ())])
    if start < duration and seconds <= duration + 1:  # a span may be rounded up to the next second
        return ""
    return f"the solution goes from {start:g} s to {seconds:g} s"


def _number(value: Any) -> float | None:
    """Return a finite number, also from a key that spells one; None for other values."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not re.fullmatch(_NUMBER, value):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(value: Any, count: int) -> Any:
    """Return a list of `count` finite numbers as a tuple, or None."""
    if not isinstance(value, list) or len(value) != count or any(isinstance(one, str) for one in value):
        return None
    numbers = tuple(_number(one) for one in value)
    return None if None in numbers else numbers


def _json_parts(text: str) -> Iterator[Any]:
    """Yield the JSON objects and lists in a text, outermost ones first."""
    for written in dict.fromkeys((text, text.replace("'", '"'))):
        end = 0
        for match in islice(re.finditer(r"[\[{]", written), _MOST_PARTS):
            if match.start() >= end:
                try:
                    parsed, end = _DECODER.raw_decode(written, match.start())
                except (ValueError, RecursionError):
                    continue
                yield parsed


def _in_form(parsed: Any, problem_type: str) -> dict[str, Any]:
    """Return what other keys, quotes and bare lists say, in the exact form; invalid parts are left out."""
    if isinstance(parsed, list) and len(parsed) == 1:
        parsed = parsed[0]
    named = parsed if isinstance(parsed, dict) else {}
    time, boxes = _first(named, _TIME_NAMES), _first(named, _BOX_NAMES)
    for start, end in _ENDS:
        if time is None and start in named and end in named:
            time = [named[start], named[end]]
    if problem_type == "temporal grounding":
        return {"time": _times(parsed if time is None else time)}
    if problem_type == "spatial grounding":
        if isinstance(boxes, list) and len(boxes) == 1:
            boxes = boxes[0]
        return {"boxes": _unquoted(parsed if boxes is None else boxes)}
    frames = boxes if isinstance(boxes, dict) else named
    kept = {_second(second): _unquoted(box) for second, box in frames.items()}
    kept = {second: box for second, box in kept.items() if second is not None and _numbers(box, 4)}
    return {"time": _times(time), "boxes": kept if kept or problem_type != "tracking" else None}


def _first(named: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((named[name] for name in names if name in named), None)


def _unquoted(value: Any) -> Any:
    return [_number(one) for one in value] if isinstance(value, list) else value


def _times(value: Any) -> list[float | None] | None:
    """Parse two times, each a number or a text."""
    if isinstance(value, str):
        return _span_in_words(value, last=False)
    return [_second(one) for one in value] if isinstance(value, list) else None


def _second(value: Any) -> float | None:
    """Parse `3.2`, `"3.2s"`, `"1:05"` or `"0:01:05"` into seconds."""
    if isinstance(value, str):
        match = _ONE_TIME.fullmatch(value)
        value = _clock(match.group(1)) if match else None
    return _number(value)


def _clock(text: str) -> float:
    """Convert "1:02:03.5" to seconds, which may overflow to infinity."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def _span_in_words(text: str, last: bool) -> list[float | None] | None:
    """Find the first or last "3.2s to 5s" of a text, or else its two times if it has exactly two."""
    spans = [match.groups() for match in _SPAN.finditer(text)]
    if not spans and len(times := _TIMES.findall(text)) == 2:
        spans = [times]
    return [_second(one) for one in spans[-1 if last else 0]] if spans else None
