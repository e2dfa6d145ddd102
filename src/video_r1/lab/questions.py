"""Question families of the lab: each function draws a `LabQuestion`.

The chain of thought (`process`) lists what is seen at each moment in the order of time and then concludes, so
that a base that describes frames can learn to reason from few examples. Most families cannot be answered
from the set of frames without their order.
"""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from video_r1.lab.scenes import COLOURS, MOMENTS, PLACES, SHAPES, SIZES, Look, box_of, listing
from video_r1.settings.shared import ProblemType

EVERY_MOMENT = tuple(range(MOMENTS))
LAST = MOMENTS - 1
ASKED_TYPES: tuple[ProblemType, ...] = ("multiple choice", "numerical", "OCR", "free-form", "regression")


@dataclass(frozen=True, slots=True)
class LabQuestion:
    """A question about a timeline."""

    timeline: tuple[Look, ...]
    problem: str
    problem_type: str
    answer: str  # the word, number or sentence; for multiple choice one of `choices`
    chain: str
    choices: tuple[str, ...] = ()
    key_moments: tuple[int, ...] = EVERY_MOMENT  # moments on which the answer depends


Family = Callable[[np.random.Generator], LabQuestion]


def _pick(rng: np.random.Generator, values: Collection[str], count: int | None = None) -> list[str]:
    return [str(v) for v in rng.choice(list(values), size=count or len(values), replace=False)]


def _one(rng: np.random.Generator, values: Collection[str]) -> str:
    return _pick(rng, values, 1)[0]


def _question(
    rng: np.random.Generator,
    timeline: Sequence[Look],
    aspect: str,
    wordings: tuple[str, ...],
    answer: str,
    conclusion: str = "",
    choices: Iterable[str] = (),
    key_moments: tuple[int, ...] = EVERY_MOMENT,
    problem_type: str = "multiple choice",
) -> LabQuestion:
    """Build a question in one of its wordings; its chain lists the aspect at every moment, then concludes."""
    problem = wordings[int(rng.integers(len(wordings)))]
    chain = f"{listing(timeline, aspect)}." + (f" {conclusion}." if conclusion else "")
    return LabQuestion(tuple(timeline), problem, problem_type, answer, chain, tuple(choices), key_moments)


def _still(rng: np.random.Generator) -> Look:
    """Draw a look whose attributes a family varies: any colour, shape and corner, not small."""
    look = Look(_one(rng, COLOURS), _one(rng, SHAPES), _one(rng, ["medium", "large"]))
    return look.at(_one(rng, PLACES))


def _coloured(rng: np.random.Generator) -> tuple[list[Look], list[str]]:
    """Draw a timeline of four different colours."""
    look = _still(rng)
    colours = _pick(rng, COLOURS, MOMENTS)
    return [replace(look, colour=colour) for colour in colours], colours


def _cornered(rng: np.random.Generator) -> tuple[list[Look], list[str]]:
    """Draw a timeline that visits all corners."""
    look, places = _still(rng), _pick(rng, PLACES)
    return [look.at(place) for place in places], places


def direction(rng: np.random.Generator) -> LabQuestion:
    words = ("left", "right", "up", "down")
    look, word = _still(rng), _one(rng, words)
    path = (0.15, 0.35, 0.65, 0.85)
    along = path if word in ("right", "down") else path[::-1]
    across = float(rng.choice([0.27, 0.73]))
    vertical = word in ("up", "down")
    timeline = [replace(look, x=across, y=v) if vertical else replace(look, x=v, y=across) for v in along]
    wordings = f"Which way does the {look.shape} move?", "In which direction does the object move?"
    return _question(rng, timeline, "places", wordings, word, f"it moves {word}", words)


def first_colour(rng: np.random.Generator) -> LabQuestion:
    timeline, (first, *_) = _coloured(rng)
    wordings = "Which colour came first?", "What colour was shown first?"
    return _question(rng, timeline, "colours", wordings, first, f"the first is {first}", COLOURS, (0,))


def last_colour(rng: np.random.Generator) -> LabQuestion:
    timeline, (*_, last) = _coloured(rng)
    wordings = "Which colour came last?", "What colour was shown at the end?"
    return _question(rng, timeline, "colours", wordings, last, f"the last is {last}", COLOURS, (LAST,))


def first_shape(rng: np.random.Generator) -> LabQuestion:
    look, shapes = _still(rng), _pick(rng, SHAPES)
    timeline, first = [replace(look, shape=shape) for shape in shapes], shapes[0]
    wordings = "Which shape came first?", "What shape was shown first?"
    return _question(rng, timeline, "shapes", wordings, first, f"the first is {first}", SHAPES, (0,))


def end_place(rng: np.random.Generator) -> LabQuestion:
    timeline, (*_, last) = _cornered(rng)
    wordings = f"Where is the {timeline[0].shape} at the end?", "Where does the object stop?"
    return _question(rng, timeline, "places", wordings, last, f"the last is {last}", PLACES, (LAST,))


def after(rng: np.random.Generator) -> LabQuestion:
    return _beside(rng, "after", "followed", 1)


def before(rng: np.random.Generator) -> LabQuestion:
    return _beside(rng, "before", "preceded", -1)


def _beside(rng: np.random.Generator, word: str, verb: str, step: int) -> LabQuestion:
    timeline, colours = _coloured(rng)
    at = int(rng.integers(max(0, -step), MOMENTS - max(0, step)))
    named, answer = colours[at], colours[at + step]
    wordings = f"Which colour came right {word} {named}?", f"What colour {verb} {named}?"
    conclusion, moments = f"{word} {named} comes {answer}", (min(at, at + step), max(at, at + step))
    return _question(rng, timeline, "colours", wordings, answer, conclusion, COLOURS, moments)


def growth(rng: np.random.Generator) -> LabQuestion:
    look = _still(rng)
    ways = {
        "growing": ("small", "medium", "medium", "large"),
        "shrinking": ("large", "medium", "medium", "small"),
        "growing then shrinking": ("small", "large", "large", "small"),
        "shrinking then growing": ("large", "small", "small", "large"),
    }
    word = _one(rng, ways)
    timeline = [replace(look, size=size) for size in ways[word]]
    wordings = f"How does the size of the {look.shape} change?", "Is the object growing or shrinking?"
    return _question(rng, timeline, "sizes", wordings, word, f"it is {word}", ways)


def rotation(rng: np.random.Generator) -> LabQuestion:
    words = ("clockwise", "counterclockwise")
    look, word = _still(rng), _one(rng, words)
    ring = ["top left", "top right", "bottom right", "bottom left"]
    start = int(rng.integers(4))
    ring = (ring[start:] + ring[:start])[:: 1 if word == "clockwise" else -1]
    timeline = [look.at(place) for place in ring]
    wordings = f"Does the {look.shape} go round clockwise or counterclockwise?", "Which way round does it go?"
    return _question(rng, timeline, "places", wordings, word, f"it goes {word}", words)


def count_before(rng: np.random.Generator) -> LabQuestion:
    timeline, colours = _coloured(rng)
    at = int(rng.integers(MOMENTS))
    named, moments = colours[at], tuple(range(at + 1))
    wordings = f"How many colours came before {named}?", f"How many colours were shown before {named}?"
    conclusion = f"{at} before {named}"
    return _question(rng, timeline, "colours", wordings, str(at), conclusion, (), moments, "numerical")


def blinks(rng: np.random.Generator) -> LabQuestion:
    look = _still(rng)
    pattern = _one(rng, ("0110", "1100", "0011", "0101", "1010", "1001", "1101", "1011"))
    timeline = [look if bit == "1" else replace(look, shape="") for bit in pattern]
    count = f"0{pattern}".count("01")
    wordings = f"How many times does the {look.shape} appear?", "How many times does the object light up?"
    conclusion = f"it appears {count} times"
    return _question(rng, timeline, "shapes", wordings, str(count), conclusion, problem_type="numerical")


def digits(rng: np.random.Generator) -> LabQuestion:
    look, shown = _still(rng), [str(d) for d in rng.integers(0, 10, size=MOMENTS)]
    timeline = [replace(look, size="large", shape=digit) for digit in shown]
    wordings = "Which digits are shown, in order?", "Write down the digits in the order in which they appear."
    return _question(rng, timeline, "digits", wordings, " ".join(shown), problem_type="OCR")


def speed(rng: np.random.Generator) -> LabQuestion:
    look, step = _still(rng), int(rng.integers(1, 4))
    start = int(rng.integers(0, 10 - 3 * step))
    columns = [start + step * k for k in range(MOMENTS)]
    if rng.random() < 0.5:
        columns.reverse()
    timeline = [replace(look, x=0.05 + 0.1 * column) for column in columns]
    words = "in columns per second?"
    wordings = f"How fast does the {look.shape} move, {words}", f"What is the speed {words}"
    conclusion = f"the speed is {step}"
    return _question(rng, timeline, "columns", wordings, str(step), conclusion, problem_type="regression")


def story(rng: np.random.Generator) -> LabQuestion:
    timeline, colours = _coloured(rng)
    shape = timeline[0].shape
    answer = f"the {shape} was {', then '.join(colours)}"
    wordings = "What happened in the clip?", f"Tell what happened to the {shape}."
    return _question(rng, timeline, "colours", wordings, answer, problem_type="free-form")


def image_colour(rng: np.random.Generator) -> LabQuestion:
    look = _still(rng)
    wordings = (f"What colour is the {look.shape}?",)
    return _question(rng, [look], "colours", wordings, look.colour, f"it is {look.colour}", COLOURS, (0,))


def image_place(rng: np.random.Generator) -> LabQuestion:
    look = _still(rng)
    wordings = (f"Where is the {look.shape}?",)
    return _question(rng, [look], "places", wordings, look.place, f"it is {look.place}", PLACES, (0,))


def image_digit(rng: np.random.Generator) -> LabQuestion:
    look = replace(_still(rng), shape=str(rng.integers(0, 10)), size="large")
    wordings = ("Which digit is shown?",)
    return _question(rng, [look], "digits", wordings, look.shape, key_moments=(0,), problem_type="OCR")


def image_size(rng: np.random.Generator) -> LabQuestion:
    look = replace(_still(rng), size=_one(rng, SIZES))
    wordings = (f"How big is the {look.shape}?",)
    return _question(rng, [look], "sizes", wordings, look.size, f"it is {look.size}", SIZES, (0,))


def when(rng: np.random.Generator) -> LabQuestion:
    look, colours = _still(rng), _pick(rng, COLOURS, 3)
    twice = int(rng.integers(3))  # which of the colours lasts two moments
    shown = [colour for place, colour in enumerate(colours) for _ in range(1 + (place == twice))]
    timeline = [replace(look, colour=colour) for colour in shown]
    named = _one(rng, colours)
    start, end = shown.index(named), MOMENTS - shown[::-1].index(named)
    answer, conclusion = json.dumps({"time": [start, end]}), f"{named} from {start} to {end}"
    wordings = f"When is the {look.shape} {named}?", f"From when to when is the object {named}?"
    moments, kind = tuple(range(start, end)), "temporal grounding"
    return _question(rng, timeline, "colours", wordings, answer, conclusion, (), moments, kind)


def box_at_end(rng: np.random.Generator) -> LabQuestion:
    look = _still(rng)
    wordings = f"Where is the {look.shape} at the end?", "Where does the object stop?"
    return _boxed(rng, look, LAST, wordings)


def box_at(rng: np.random.Generator) -> LabQuestion:
    look, moment = _still(rng), int(rng.integers(MOMENTS))
    time = f"at second {moment}.5?"
    wordings = f"Where is the {look.shape} {time}", f"Where is the object {time}"
    return _boxed(rng, look, moment, wordings)


def _boxed(rng: np.random.Generator, look: Look, moment: int, wordings: tuple[str, ...]) -> LabQuestion:
    """Build a question about the box at one moment of a look that visits all corners."""
    timeline = [look.at(place) for place in _pick(rng, PLACES)]
    seen = timeline[moment]
    answer, conclusion = json.dumps({"boxes": box_of(seen)}), f"{seen.size} {seen.place}"
    kind = "spatial grounding"
    return _question(rng, timeline, "places", wordings, answer, conclusion, (), (moment,), kind)


VIDEO_FAMILIES = {
    f.__name__: f
    for f in (
        direction, first_colour, last_colour, after, before, first_shape, end_place, growth, rotation,
        count_before, blinks, digits, speed, story,
    )
}  # fmt: skip
IMAGE_FAMILIES = {f.__name__: f for f in (image_colour, image_place, image_digit, image_size)}
FAMILIES: dict[str, Family] = VIDEO_FAMILIES | IMAGE_FAMILIES
"""Default families of a lab."""
NAMED_FAMILIES: dict[str, Family] = FAMILIES | {f.__name__: f for f in (when, box_at_end, box_at)}
"""All families: the default ones, and those of when and where, which are used only if named."""


def read_mark(mark: str) -> str:
    """Return the description of a mark: `mark: B.`, or `mark: none.` without one."""
    return f"mark: {mark or 'none'}."


def any_question(rng: np.random.Generator) -> LabQuestion:
    """Draw a question of any default family."""
    return list(FAMILIES.values())[rng.integers(len(FAMILIES))](rng)
