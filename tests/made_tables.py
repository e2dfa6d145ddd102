"""A folder of clips, tables about them, and the command that makes manifests of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from media_files import write_video
from PIL import Image

from video_r1.cli import main


def write_shelf(root: Path) -> Path:
    """Clips as they lie about: in folders, with one name twice, one that is none, and subtitles."""
    for name in ("cup.mp4", "a/ball.mp4", "a/same.mp4", "b/same.mp4", "1164/4010069381.mp4", "video_0.mkv"):
        (root / name).parent.mkdir(exist_ok=True)
        write_video(root / name, 50)
    Image.fromarray(np.full((56, 56, 3), 90, np.uint8)).save(root / "sign.png")
    (root / "broken.mp4").write_text("no video")
    (root / "cup.srt").write_text("1\n00:00:00,500 --> 00:00:01,200\n<i>Look</i> here.\n\n")
    (root / "a" / "ball.en.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nIt rolls.\n")
    return root


def make(shelf: Path, table: Path, *words: str, code: int = 0) -> tuple[list[dict], list[dict]]:
    """The rows of the manifest that the command writes, and its refused lines."""
    out = table.with_name("out.json")
    request = ["data", "make", str(table), "--media_root", str(shelf), "--out", str(out), "--workers", "1"]
    assert main([*request, *words]) == code
    refused = out.with_name("out.refused.jsonl").read_text().splitlines()
    return json.loads(out.read_text()) if out.exists() else [], [json.loads(line) for line in refused]


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if not isinstance(content, str):
        lines = name.endswith(".jsonl")
        content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_text(content)
    return path
