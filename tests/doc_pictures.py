"""The drawings of the documents: step.svg, packed-sequence.svg and contrasts.svg.

    python tests/doc_pictures.py docs/images

Each has its own background, and colours for light and dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

STYLE = """
svg { --paper: #fdfcf8; --ink: #1f1d1a; --muted: #6b665d; --line: #a8a294; --box: #f3efe4;
  --ordered: #2f5d8c; --contrast: #985f0a; --a: #22704f; --b: #8a3f86; --c: #b03a2e }
@media (prefers-color-scheme: dark) { svg { --paper: #171614; --ink: #e6e1d6; --muted: #a8a294;
  --line: #6f6a5f; --box: #24221e; --ordered: #86b4e2; --contrast: #e0ac5c; --a: #74c8a1; --b: #d9a0d5;
  --c: #ec8a7e } }
text { font: 14px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--ink) }
.title { font-weight: 600; font-size: 15px } .small { font-size: 12.5px; fill: var(--muted) }
.ordered { fill: var(--ordered) } .contrast { fill: var(--contrast) }
.a { fill: var(--a) } .b { fill: var(--b) } .c { fill: var(--c) }
.paper { fill: var(--paper) } .box { fill: var(--box); stroke: var(--line) }
.letter { font-size: 12px; font-weight: 600; fill: var(--paper); text-anchor: middle }
.middle { text-anchor: middle } .faint { opacity: .16 }
.arrow { fill: none; stroke: var(--muted); stroke-width: 1.6; marker-end: url(#tip) }
""".strip()
TIP = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" style="fill:var(--muted)"/></marker>'
)


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">'
    frame = [f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", f"<defs>{TIP}</defs>"]
    return "\n".join([head, *frame, rect(0, 0, width, height, "paper", 10), *parts, "</svg>"]) + "\n"


def rect(x: float, y: float, width: float, height: float, style: str, radius: float = 2) -> str:
    size = f'width="{width:g}" height="{height:g}" rx="{radius:g}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} class="{style}"/>'


def words(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(text)}</text>'


# ---- The step

STEP = {  # title: place, and lines with their styles
    "1  Question": ((0, 0), ("frames in order, V", "ordered"), ("contrast clip, Ṽ", "contrast"),
                    ("decoded once, ahead of the step", "small")),
    "2  Rollouts": ((1, 0), ("G answers sampled with V", "ordered"),
                    ("H sampled or G scored with Ṽ", "contrast"), ("transformers, vLLM, a server", "small")),
    "3  Rewards": ((2, 0), ("accuracy, format, length, …", ""), ("temporal rule: V against Ṽ", "contrast"),
                   ("each term's share is logged", "small")),
    "4  Advantages": ((2, 1), ("A = (R − mean) ÷ deviation", ""), ("within the G answers", ""),
                      ("equal rewards teach nothing", "small")),
    "5  Packed sequence": ((1, 1), ("the prompt once,", "ordered"), ("then its G answers", "ordered"),
                           ("answers with Ṽ are not trained on", "small")),
    "6  Loss": ((0, 1), ("clipped ratio × A − β · KL", ""), ("mean over the step", ""),
                ("transformers.Trainer updates", "small")),
}  # fmt: skip


def step() -> str:
    parts = []
    for title, ((column, row), *lines) in STEP.items():
        x, y = 25 + 295 * column, 25 + 185 * row
        parts += [rect(x, y, 260, 112, "box", 8), words(x + 14, y + 26, title, "title")]
        parts += [words(x + 14, y + 51 + 21 * i, text, style) for i, (text, style) in enumerate(lines)]
    for path in (
        "M285 81H316",
        "M580 81H611",
        "M745 137V206",
        "M615 266H584",
        "M320 266H289",
        "M155 210V174H450V141",
    ):
        parts.append(f'<path d="{path}" class="arrow"/>')
    parts.append(words(165, 168, "new weights", "small"))
    return picture(900, 350, "One T-GRPO step, from a question to new weights", parts)


# ---- The packed sequence

SEGMENTS = (("p", "ordered", 6), ("a", "a", 3), ("b", "b", 4), ("c", "c", 2))
CELL = 20


def token(x: float, y: float, letter: str, style: str) -> list[str]:
    return [rect(x, y, CELL - 2, CELL - 2, style), words(x + 9, y + 13.5, letter, "letter")]


def packed_sequence() -> str:
    tokens = [(name, style, i) for name, style, count in SEGMENTS for i in range(count)]
    prompt = SEGMENTS[0][2]
    parts = [words(30, 42, "Usual batch: every answer carries the prompt", "title")]
    for row, (name, style, count) in enumerate(SEGMENTS[1:]):
        y = 58 + 24 * row
        for i in range(prompt):
            parts += token(30 + CELL * i, y, "p", "ordered")
        for i in range(count):
            parts += token(30 + CELL * (prompt + i), y, name, style)
        parts += [rect(30 + CELL * i, y, CELL - 2, CELL - 2, "box") for i in range(prompt + count, 10)]
    parts += [
        words(30, 150, "30 positions, of which 3 are padding", "small"),
        words(30, 204, "Packed sequence: the prompt once", "title"),
    ]
    for i, (name, style, _) in enumerate(tokens):
        parts += token(30 + CELL * i, 220, name, style)
    for i, (name, _, place) in enumerate(tokens):
        position = place if name == "p" else prompt + place
        parts.append(words(39 + CELL * i, 254, str(position), "small middle"))
    parts += [
        words(30, 278, "15 positions; each answer counts on from the prompt's end.", "small"),
        words(30, 310, "The frames are encoded once, the prompt is read once,", "small"),
        words(30, 328, "and only answer tokens reach the output layer.", "small"),
        words(500, 42, "Attention: what each row's token sees", "title"),
    ]
    left, top = 500, 76
    for i, (name, style, _) in enumerate(tokens):
        along, style = CELL * i, f"small middle {style}"
        parts += [
            words(left + along + 9, top - 6, name, style),
            words(left - 10, top + along + 13, name, style),
        ]
        for j, (other, paint, _) in enumerate(tokens):
            seen = paint if j <= i and other in ("p", name) else "box faint"
            parts.append(rect(left + CELL * j, top + along, CELL - 2, CELL - 2, seen))
    told = "An answer sees the prompt and itself, no other answer."
    parts.append(words(left, top + CELL * len(tokens) + 18, told, "small"))
    return picture(900, 410, "A group as one packed sequence, and its attention mask", parts)


# ---- Contrasts

FRAMES = range(8)
CONTRASTS = (
    ("in order", FRAMES, "the clip", ""),
    ("shuffled", (3, 1, 0, 2, 7, 5, 4, 6), "without", "the order"),
    ("reversed", (7, 6, 5, 4, 3, 2, 1, 0), "without", "the arrow of time"),
    ("frozen", (5,) * 8, "without", "any change"),
    ("dropped", (1, 2, 5, 6), "without", "half of the moments"),
    ("single", (4, 4), "without", "all frames but one"),
    ("blind", (), "without", "any frame"),
)


def frame(x: float, y: float, number: int, style: str) -> list[str]:
    """A ball that rolls to the right and down, with the frame's number."""
    return [
        rect(x, y, 64, 44, "box"),
        f'<circle cx="{x + 9 + 6.6 * number:g}" cy="{y + 10 + 2.6 * number:g}" r="7" class="{style}"/>',
        words(x + 5, y + 39, str(number), "small"),
    ]


def contrasts() -> str:
    parts = [
        words(30, 40, "A ball rolls to the right: the clip, and what the contrasts leave of it", "title")
    ]
    for row, (name, numbers, kind, removed) in enumerate(CONTRASTS):
        y = 58 + 54 * row
        style = "contrast" if row else "ordered"
        parts.append(words(30, y + 27, name, f"title {style}"))
        for place, number in enumerate(numbers):
            parts += frame(120 + 70 * place, y, number, style)
        if not numbers:
            parts.append(words(120, y + 27, "the question alone", "small"))
        parts.append(words(700, y + 27, f"{kind} {removed}".strip(), "small"))
    gap = "Temporal gap: accuracy in order − accuracy with the contrast."
    parts.append(words(30, 458, f"{gap} Near 0, the answers do not need what it removes.", "small"))
    return picture(900, 484, "A clip in order and its contrasts, frame by frame", parts)


PICTURES = {"step.svg": step, "packed-sequence.svg": packed_sequence, "contrasts.svg": contrasts}

if __name__ == "__main__":
    for name, drawn in PICTURES.items():
        Path(sys.argv[1], name).write_text(drawn(), encoding="utf-8")
