"""The page of errors: each one can be printed by the code, and a test provokes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
SHORTEST = 10  # characters by which a message is told


def literals(path: Path) -> Iterator[str]:
    """Every text of a module, neighbours joined, with … in place of what an f-string inserts."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]


@cache
def said_by_the_code() -> str:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "setup").glob("*.py")]
    return "\n".join(text for path in files for text in literals(path))


@cache
def looked_for_by_tests() -> set[str]:
    """Runs of plain characters in the texts of tests, regular expressions among them."""
    texts = (
        text for path in ROOT.glob("tests/test_*.py") if path != Path(__file__) for text in literals(path)
    )
    runs = (run for text in texts for run in re.split(r"[^A-Za-z_` ',:;/-]+", text))
    return {run.strip() for run in runs if len(run.strip()) >= SHORTEST}


def parts_of(message: str) -> list[str]:
    """A message without what the code inserts."""
    return [part.strip() for part in message.split("…") if part.strip()]


@pytest.mark.parametrize("message", MESSAGES)
def test_an_error_of_the_page_is_one_that_the_code_prints(message: str) -> None:
    parts = parts_of(message)
    assert max(map(len, parts)) >= SHORTEST
    for part in parts:
        assert part in said_by_the_code(), part


@pytest.mark.parametrize("message", MESSAGES)
def test_an_error_of_the_page_is_one_that_a_test_provokes(message: str) -> None:
    parts = [part for part in parts_of(message) if len(part) >= SHORTEST]
    assert [run for run in looked_for_by_tests() for part in parts if run in part or part in run]


def test_the_page_has_the_errors_of_every_stage() -> None:
    assert len(MESSAGES) > 30 and len(set(MESSAGES)) == len(MESSAGES)
