"""The page of errors quotes messages that the code prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def literals(path: Path) -> Iterator[str]:
    """Yield every text of a module, neighbours joined, with … in place of what an f-string inserts."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_error_of_the_page_is_printed_by_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "setup").glob("*.py")]
    printed = "\n".join(text for path in files for text in literals(path))
    parts = {part.strip() for message in messages for part in message.split("…") if part.strip()}
    assert len(messages) > 25 and [part for part in sorted(parts) if part not in printed] == []
