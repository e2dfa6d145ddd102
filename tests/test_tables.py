"""Tables in a pipe: aligned plain text."""

from __future__ import annotations

from video_r1.console import table


def test_columns_are_aligned_whatever_the_cells_hold() -> None:
    rows = [("all", "7", "0.5 [0.4, 0.6]"), ("  [bold]源", "1,234", "-"), ("last", "", "")]
    assert table(("source", "questions", "ordered"), rows).splitlines() == [
        "source      questions         ordered",
        "all                 7  0.5 [0.4, 0.6]",
        "  [bold]源      1,234               -",
        "last",
    ]
    assert table(("", "a"), [("x" * 300, "1")]).splitlines()[1] == "x" * 300 + "  1"
