"""What the pictures of an evaluation and of an audit share: one HTML page that needs nothing else."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

# told apart without red or green
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def figure_page(heading: str, notes: Sequence[str], figure: str) -> str:
    """A page with the notes, plain text, above the figure, HTML or SVG; for light and dark screens."""
    page = Template(Path(__file__).with_name("figure.html").read_text(encoding="utf-8"))
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return page.substitute(heading=escape(heading), paragraphs=paragraphs, figure=figure)
