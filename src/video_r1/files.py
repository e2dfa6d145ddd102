"""Files that are written while others read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line. A half-written last line, left by a killed run, stays a line of its own."""
    data = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)
