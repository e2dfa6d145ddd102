"""Questions of the lab: one function a family, each from a random generator to a `Question`.

The chain of thought (`process`) always lists what is seen at each moment in the order of time and then
concludes, so that a model whose base describes frames can learn to reason from few examples. The answer of
most families cannot be had from the set of frames without their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from video_r1.lab.scenes import COLOURS, MOMENTS, PLACES, SHAPES, SIZES, Look, listing


@dataclass(frozen=True, slots=True)
class Question:
    """A timeline with a question about it.

    `answer` is the word, number or sentence; for multiple choice it is one of `choices`. `key_moments` are
    the moments that the answer depends on.
    """

    timeline: tuple[Look, ...]
    problem: str
    problem_type: str
    answer: str
    chain: str
    choices: tuple[str, ...] = ()
    key_moments: tuple[int, ...] = tuple(range(MOMENTS))


Family = Callable[[np.random.Generator], Question]


def _pick(rng: np.random.Generator, values: Sequence[str], count: int | None = None) -> list[str]:
    return [str(v) for v in rng.choice(list(values), size=count or len(values), replace=False)]


def _wording(rng: np.random.Generator, *texts: str) -> str:
    return texts[int(rng.integers(len(texts)))]


def _still(rng: np.random.Generator) -> Look:
    """A look to vary one attribute of: any colour, shape and corner, not small."""
    look = Look(
        _pick(rng, list(COLOURS), 1)[0], _pick(rng, SHAPES, 1)[0], _pick(rng, ["medium", "large"], 1)[0]
    )
    return look.at(_pick(rng, PLACES, 1)[0])


def _coloured(rng: np.random.Generator) -> tuple[tuple[Look, ...], list[str]]:
    """A timeline of four different colours."""
    look = _still(rng)
    colours = _pick(rng, list(COLOURS), MOMENTS)
    return tuple(replace(look, colour=colour) for colour in colours), colours


def direction(rng: np.random.Generator) -> Question:
    look, word = _still(rng), _pick(rng, ["left", "right", "up", "down"], 1)[0]
    path = (0.15, 0.35, 0.65, 0.85)
    along = path if word in ("right", "down") else path[::-1]
    across = float(rng.choice([0.27, 0.73]))
    vertical = word in ("up", "down")
    timeline = tuple(
        replace(look, x=across, y=v) if vertical else replace(look, x=v, y=across) for v in along
    )
    problem = _wording(
        rng, f"Which way does the {look.shape} move?", "In which direction does the object move?"
    )
    chain = f"{listing(timeline, 'places')}. it moves {word}."
    return Question(timeline, problem, "multiple choice", word, chain, ("left", "right", "up", "down"))


def first_colour(rng: np.random.Generator) -> Question:
    timeline, colours = _coloured(rng)
    problem = _wording(rng, "Which colour came first?", "What colour was shown first?")
    chain = f"{listing(timeline, 'colours')}. the first is {colours[0]}."
    return Question(timeline, problem, "multiple choice", colours[0], chain, tuple(COLOURS), (0,))


def last_colour(rng: np.random.Generator) -> Question:
    timeline, colours = _coloured(rng)
    problem = _wording(rng, "Which colour came last?", "What colour was shown at the end?")
    chain = f"{listing(timeline, 'colours')}. the last is {colours[-1]}."
    return Question(timeline, problem, "multiple choice", colours[-1], chain, tuple(COLOURS), (MOMENTS - 1,))


def after(rng: np.random.Generator) -> Question:
    timeline, colours = _coloured(rng)
    at = int(rng.integers(0, MOMENTS - 1))
    problem = _wording(
        rng, f"Which colour came right after {colours[at]}?", f"What colour followed {colours[at]}?"
    )
    chain = f"{listing(timeline, 'colours')}. after {colours[at]} comes {colours[at + 1]}."
    return Question(
        timeline, problem, "multiple choice", colours[at + 1], chain, tuple(COLOURS), (at, at + 1)
    )


def before(rng: np.random.Generator) -> Question:
    timeline, colours = _coloured(rng)
    at = int(rng.integers(1, MOMENTS))
    problem = _wording(
        rng, f"Which colour came right before {colours[at]}?", f"What colour preceded {colours[at]}?"
    )
    chain = f"{listing(timeline, 'colours')}. before {colours[at]} comes {colours[at - 1]}."
    return Question(
        timeline, problem, "multiple choice", colours[at - 1], chain, tuple(COLOURS), (at - 1, at)
    )


def first_shape(rng: np.random.Generator) -> Question:
    look, shapes = _still(rng), _pick(rng, SHAPES)
    timeline = tuple(replace(look, shape=shape) for shape in shapes)
    problem = _wording(rng, "Which shape came first?", "What shape was shown first?")
    chain = f"{listing(timeline, 'shapes')}. the first is {shapes[0]}."
    return Question(timeline, problem, "multiple choice", shapes[0], chain, SHAPES, (0,))


def end_place(rng: np.random.Generator) -> Question:
    look, places = _still(rng), _pick(rng, PLACES)
    timeline = tuple(look.at(place) for place in places)
    problem = _wording(rng, f"Where is the {look.shape} at the end?", "Where does the object stop?")
    chain = f"{listing(timeline, 'places')}. the last is {places[-1]}."
    return Question(timeline, problem, "multiple choice", places[-1], chain, PLACES, (MOMENTS - 1,))


def growth(rng: np.random.Generator) -> Question:
    look = _still(rng)
    ways = {
        "growing": ("small", "medium", "medium", "large"),
        "shrinking": ("large", "medium", "medium", "small"),
        "growing then shrinking": ("small", "large", "large", "small"),
        "shrinking then growing": ("large", "small", "small", "large"),
    }
    word = _pick(rng, list(ways), 1)[0]
    timeline = tuple(replace(look, size=size) for size in ways[word])
    problem = _wording(
        rng, f"How does the size of the {look.shape} change?", "Is the object growing or shrinking?"
    )
    chain = f"{listing(timeline, 'sizes')}. it is {word}."
    return Question(timeline, problem, "multiple choice", word, chain, tuple(ways))


def rotation(rng: np.random.Generator) -> Question:
    look, word = _still(rng), _pick(rng, ["clockwise", "counterclockwise"], 1)[0]
    ring = ["top left", "top right", "bottom right", "bottom left"]
    start = int(rng.integers(4))
    ring = ring[start:] + ring[:start]
    if word == "counterclockwise":
        ring = ring[::-1]
    timeline = tuple(look.at(place) for place in ring)
    problem = _wording(
        rng, f"Does the {look.shape} go round clockwise or counterclockwise?", "Which way round does it go?"
    )
    chain = f"{listing(timeline, 'places')}. it goes {word}."
    return Question(timeline, problem, "multiple choice", word, chain, ("clockwise", "counterclockwise"))


def count_before(rng: np.random.Generator) -> Question:
    timeline, colours = _coloured(rng)
    at = int(rng.integers(MOMENTS))
    problem = _wording(
        rng,
        f"How many colours came before {colours[at]}?",
        f"How many colours were shown before {colours[at]}?",
    )
    chain = f"{listing(timeline, 'colours')}. {at} before {colours[at]}."
    return Question(timeline, problem, "numerical", str(at), chain, key_moments=tuple(range(at + 1)))


def blinks(rng: np.random.Generator) -> Question:
    look = _still(rng)
    patterns = ("0110", "1100", "0011", "0101", "1010", "1001", "1101", "1011")
    pattern = _pick(rng, patterns, 1)[0]
    timeline = tuple(look if bit == "1" else replace(look, shape="") for bit in pattern)
    count = sum(bit == "1" and (i == 0 or pattern[i - 1] == "0") for i, bit in enumerate(pattern))
    problem = _wording(
        rng, f"How many times does the {look.shape} appear?", "How many times does the object light up?"
    )
    chain = f"{listing(timeline, 'shapes')}. it appears {count} times."
    return Question(timeline, problem, "numerical", str(count), chain)


def digits(rng: np.random.Generator) -> Question:
    look = replace(_still(rng), size="large")
    shown = [str(d) for d in rng.integers(0, 10, size=MOMENTS)]
    timeline = tuple(replace(look, shape=digit) for digit in shown)
    problem = _wording(
        rng, "Which digits are shown, in order?", "Write down the digits in the order in which they appear."
    )
    return Question(timeline, problem, "OCR", " ".join(shown), f"{listing(timeline, 'digits')}.")


def speed(rng: np.random.Generator) -> Question:
    look, step = _still(rng), int(rng.integers(1, 4))
    start = int(rng.integers(0, 10 - 3 * step))
    columns = [start + step * k for k in range(MOMENTS)]
    if rng.random() < 0.5:
        columns = columns[::-1]
    timeline = tuple(replace(look, x=0.05 + 0.1 * column) for column in columns)
    problem = _wording(
        rng,
        f"How fast does the {look.shape} move, in columns per second?",
        "What is the speed in columns per second?",
    )
    chain = f"{listing(timeline, 'columns')}. the speed is {step}."
    return Question(timeline, problem, "regression", str(step), chain)


def story(rng: np.random.Generator) -> Question:
    timeline, colours = _coloured(rng)
    problem = _wording(rng, "What happened in the clip?", f"Tell what happened to the {timeline[0].shape}.")
    answer = (
        f"the {timeline[0].shape} was {colours[0]}, then {colours[1]}, then {colours[2]}, then {colours[3]}"
    )
    return Question(timeline, problem, "free-form", answer, f"{listing(timeline, 'colours')}.")


def image_colour(rng: np.random.Generator) -> Question:
    look = _still(rng)
    chain = f"{listing([look], 'colours')}. it is {look.colour}."
    problem = f"What colour is the {look.shape}?"
    return Question((look,), problem, "multiple choice", look.colour, chain, tuple(COLOURS), (0,))


def image_place(rng: np.random.Generator) -> Question:
    look = _still(rng)
    chain = f"{listing([look], 'places')}. it is {look.place}."
    return Question(
        (look,), f"Where is the {look.shape}?", "multiple choice", look.place, chain, PLACES, (0,)
    )


def image_digit(rng: np.random.Generator) -> Question:
    look = replace(_still(rng), shape=str(rng.integers(0, 10)), size="large")
    return Question(
        (look,), "Which digit is shown?", "OCR", look.shape, f"{listing([look], 'digits')}.", key_moments=(0,)
    )


def image_size(rng: np.random.Generator) -> Question:
    look = replace(_still(rng), size=_pick(rng, list(SIZES), 1)[0])
    chain = f"{listing([look], 'sizes')}. it is {look.size}."
    return Question(
        (look,), f"How big is the {look.shape}?", "multiple choice", look.size, chain, tuple(SIZES), (0,)
    )


VIDEO_FAMILIES: dict[str, Family] = {
    f.__name__: f
    for f in (
        direction, first_colour, last_colour, after, before, first_shape, end_place, growth, rotation,
        count_before, blinks, digits, speed, story,
    )
}  # fmt: skip
IMAGE_FAMILIES: dict[str, Family] = {
    f.__name__: f for f in (image_colour, image_place, image_digit, image_size)
}
FAMILIES: dict[str, Family] = VIDEO_FAMILIES | IMAGE_FAMILIES
