"""Files that are replaced in one step, and folders that one process at a time claims."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from video_r1.errors import RequestError
from video_r1.files import append_line, claimed, follow_umask, replace_json, replacing

HOLDER = """
import os, sys, time
from pathlib import Path
from video_r1.files import claimed
with claimed(Path(sys.argv[1])):
    if os.fork() == 0:  # a child that outlives its parent, as a worker of a killed command does
        time.sleep(60)
        os._exit(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A block that fails leaves the earlier file, and nothing beside it."""
    path = tmp_path / "figures.json"
    replace_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write("half a")
        file.flush()
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none" / "x.json"))):
        replace_json(tmp_path / "none" / "x.json", {})


def test_appended_lines_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    append_line(path, {"text": "half a pair \ud83d", "step": 3})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and json.loads(lines[0]) == {"step": 1}
    assert json.loads(lines[2]) == {"text": "half a pair \ud83d", "step": 3}


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    """By another process, which is named; its death releases the claim, although a child of it lives on."""
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True,
                              start_new_session=True)  # fmt: skip
    try:
        assert holder.stdout is not None
        number = holder.stdout.readline().strip()
        with (
            pytest.raises(RequestError, match=rf"is being written by another command \(process {number} on "),
            claimed(folder),
        ):
            pass
        holder.kill()
        holder.wait()
        with claimed(folder), claimed(folder):  # nested: a command that runs another one
            pass
        with claimed(folder):
            pass
    finally:
        os.killpg(holder.pid, 9)


def test_weights_follow_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        follow_umask(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [path]
