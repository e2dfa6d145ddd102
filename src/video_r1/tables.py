"""Text for people: aligned tables, and help and errors with colours on a terminal, plain lines elsewhere."""

import io
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """The rows as lines below `head`: the first column to the left, the others to the right (words: left)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        grid.add_column(Text(name), justify="right" if grid.columns and not words else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=10_000, force_terminal=sys.stdout.isatty()).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def show(text: str, styles: dict[str, str], stream: TextIO) -> None:
    """Prints the text; on a terminal, what the regular expressions in `styles` find is styled so."""
    if not stream.isatty():
        print(text, file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    for pattern, style in styles.items():
        styled.highlight_regex(pattern, style)
    Console(file=stream).print(styled, soft_wrap=True)
