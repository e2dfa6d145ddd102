"""Scenes of the lab: the look of each moment of a procedural clip, and its rendering.

A clip is a timeline of `MOMENTS` looks of one second each. Rendering adds irrelevant variation: background,
texture, noise, distractors, jitter of position, size and colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MOMENTS = 4
SECONDS = 4.0  # one second a moment
FPS = 8
SIDE = 112  # pixels, both sides
LABEL = SIDE // 4  # side of a mark's label: one patch of the lab model's tower

COLOURS = {
    "red": (225, 45, 45), "green": (50, 200, 70), "blue": (60, 90, 240), "yellow": (240, 220, 50),
    "purple": (180, 70, 220), "white": (240, 240, 240),
}  # fmt: skip
MARKS = {
    "A": (220, 40, 40), "B": (40, 170, 60), "C": (50, 70, 230), "D": (240, 220, 40), "E": (210, 60, 220),
    "F": (40, 220, 230), "0": (250, 250, 250), "1": (255, 170, 200), "2": (250, 140, 20),
    "3": (150, 150, 150),
}  # fmt: skip
"""Marks (the letter of an option, or a number) and the colours of their labels."""
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.10, "medium": 0.16, "large": 0.23}  # radius as a share of the side
_CORNERS = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
PLACES = tuple(_CORNERS)
# Extent of a shape from its centre, in radii: left, up, right, down.
_EXTENTS = {"square": (0.85, 0.85, 0.85, 0.85), "triangle": (1.0, 1.0, 1.0, 0.8)}


@dataclass(frozen=True, slots=True)
class Look:
    """The object shown during one moment. `shape`: a shape, a digit as text, or "" if nothing is shown."""

    colour: str = "red"
    shape: str = "circle"
    size: str = "medium"
    x: float = 0.5  # centre, shares of the side
    y: float = 0.5

    @property
    def place(self) -> str:
        return f"{'top' if self.y < 0.5 else 'bottom'} {'left' if self.x < 0.5 else 'right'}"

    @property
    def column(self) -> int:
        """Tenth of the picture that contains the centre, 0 at the left edge."""
        return int(self.x * 10)

    def at(self, place: str) -> Self:
        x, y = _CORNERS[place]
        return replace(self, x=x, y=y)


def box_of(look: Look) -> list[int]:
    """Return the box [x1, y1, x2, y2] in thousandths of the side; rendering moves the object a little."""
    left, up, right, down = _EXTENTS.get(look.shape, (1.0, 1.0, 1.0, 1.0))
    size = SIZES[look.size]
    sides = look.x - left * size, look.y - up * size, look.x + right * size, look.y + down * size
    return [round(1000 * min(1.0, max(0.0, side))) for side in sides]


def caption(look: Look) -> str:
    """Return `red large circle top left`, or `nothing`."""
    return f"{look.colour} {look.size} {look.shape} {look.place}" if look.shape else "nothing"


def listing(timeline: Sequence[Look], attribute: str) -> str:
    """Return the base's description of one attribute over time: `colours: red, blue, blue, green`."""
    values = {
        "colours": lambda look: look.colour if look.shape else "nothing",
        "shapes": lambda look: look.shape or "nothing",
        "sizes": lambda look: look.size,
        "places": lambda look: look.place,
        "columns": lambda look: str(look.column),
        "digits": lambda look: look.shape,
        "scenes": caption,
    }[attribute]
    return f"{attribute}: " + ", ".join(values(look) for look in timeline)


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=pixels)


def _draw_look(
    canvas: ImageDraw.ImageDraw, look: Look, x: float, y: float, radius: float, fill: tuple[int, ...]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    match look.shape:
        case "circle":
            canvas.ellipse(box, fill=fill)
        case "square":
            half = 0.85 * radius
            canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        case "triangle":
            base = y + 0.8 * radius
            canvas.polygon([(x, y - radius), (x - radius, base), (x + radius, base)], fill=fill)
        case "cross":
            arm = radius * 0.33
            canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
            canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        case "":
            pass
        case digit:
            canvas.text((x, y), digit, fill=fill, font=_font(max(8, int(radius * 2.6))), anchor="mm")


def _backdrop(rng: np.random.Generator) -> Image.Image:
    """Draw a tinted gradient with some thin lines and small dots."""
    first, second = rng.integers(20, 105, size=(2, 3))
    across = (SIDE, 1, 1) if rng.random() < 0.5 else (1, SIDE, 1)
    ramp = np.linspace(0, 1, SIDE).reshape(across)
    pixels = first + (second - first) * np.broadcast_to(ramp, (SIDE, SIDE, 1))
    picture = Image.fromarray(pixels.astype(np.uint8))
    canvas = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 4)):
        tint = tuple(int(v) for v in rng.integers(60, 150, size=3))
        x, y, u, v = (float(value) for value in rng.uniform(0, SIDE, size=4))
        if rng.random() < 0.5:
            canvas.line((x, y, u, v), fill=tint, width=1)
        else:
            canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=tint)
    return picture


def _draw_mark(canvas: ImageDraw.ImageDraw, mark: str) -> None:
    """Draw a mark on its label in the bottom right corner, in front of everything."""
    corner, middle = SIDE - LABEL, SIDE - LABEL // 2
    canvas.rectangle((corner, corner, SIDE, SIDE), fill=MARKS[mark])
    canvas.text((middle, middle), mark, fill=(0, 0, 0), font=_font(LABEL), anchor="mm")


def render(
    timeline: Sequence[Look], times: Sequence[float], rng: np.random.Generator, mark: str = ""
) -> np.ndarray:
    """Render frames at `times` (seconds from the start of the clip): uint8 [len(times), SIDE, SIDE, 3].

    A look lasts one second; a change of place or size is a short slide at its end. mark: character in a
    corner that gives the answer away in a single frame.
    """
    backdrop = _backdrop(rng)
    scale = rng.uniform(0.92, 1.08)
    shift_x, shift_y = rng.uniform(-0.02, 0.02, size=2)
    tint = rng.integers(-18, 19, size=3)
    sigma = rng.uniform(2.0, 9.0)
    frames = np.empty((len(times), SIDE, SIDE, 3), np.uint8)
    for index, time in enumerate(times):
        moment = min(int(time), len(timeline) - 1)
        look, after = timeline[moment], timeline[min(moment + 1, len(timeline) - 1)]
        slide = max(0.0, (time - moment - 0.9) / 0.1) if after.shape and look.shape else 0.0
        jitter_x, jitter_y = rng.uniform(-0.008, 0.008, size=2)
        x = (look.x + slide * (after.x - look.x) + shift_x + jitter_x) * SIDE
        y = (look.y + slide * (after.y - look.y) + shift_y + jitter_y) * SIDE
        radius = (SIZES[look.size] + slide * (SIZES[after.size] - SIZES[look.size])) * scale * SIDE
        picture = backdrop.copy()
        fill = tuple(int(v) for v in np.clip(np.array(COLOURS[look.colour]) + tint, 0, 255))
        canvas = ImageDraw.Draw(picture)
        _draw_look(canvas, look, x, y, radius, fill)
        if mark:
            _draw_mark(canvas, mark)
        frames[index] = np.asarray(picture)
    noise = rng.standard_normal((len(times), SIDE // 2, SIDE // 2, 1), dtype=np.float32) * sigma
    noise = noise.repeat(2, axis=1).repeat(2, axis=2)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def random_look(rng: np.random.Generator, digit: bool = False) -> Look:
    """Draw any look, at a corner or anywhere off the middle lines."""
    colour = str(rng.choice(list(COLOURS)))
    shape = str(rng.integers(0, 10)) if digit else str(rng.choice(SHAPES))
    size = "large" if digit else str(rng.choice(list(SIZES)))
    look = Look(colour, shape, size)
    if rng.random() < 0.6:
        return look.at(str(rng.choice(PLACES)))
    x, y = (0.05 + 0.1 * rng.integers(0, 10, size=2)).tolist()
    return replace(look, x=x, y=y)
