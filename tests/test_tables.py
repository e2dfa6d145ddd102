"""Tables, help and errors: aligned plain text in a pipe, the same text with colours on a terminal."""

from __future__ import annotations

import io
import re

import pytest

from video_r1.cli import main
from video_r1.command_help import HELP_STYLES
from video_r1.console import show, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_columns_are_aligned_whatever_the_cells_hold() -> None:
    rows = [("all", "7", "0.5 [0.4, 0.6]"), ("  [bold]源", "1,234", "-"), ("last", "", "")]
    assert table(("source", "questions", "ordered"), rows).splitlines() == [
        "source      questions         ordered",
        "all                 7  0.5 [0.4, 0.6]",
        "  [bold]源      1,234               -",
        "last",
    ]
    assert table(("", "a"), [("x" * 300, "1")]).splitlines()[1] == "x" * 300 + "  1"


def test_text_on_a_terminal_is_the_same_with_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "settings:\n  --beta float   weight of the KL term, " + "long " * 60 + "[0.04]"
    plain, coloured = io.StringIO(), Terminal()
    show(text, HELP_STYLES, plain)
    show(text, HELP_STYLES, coloured)
    assert plain.getvalue() == text + "\n"
    assert "\x1b[36m  --beta\x1b[0m" in coloured.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured.getvalue()) == text + "\n"


def test_an_error_on_a_terminal_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    assert main(["rl", "no-such-recipe-of-mine"]) == 2
    assert stream.getvalue().startswith("\x1b[1;31mvideo-r1:\x1b[0m no-such-recipe-of-mine: no such recipe")
    assert stream.getvalue().count("\n") == 1
