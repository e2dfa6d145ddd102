"""The command lines of the documents: what stands in their code blocks, as words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\S.*\n)+", re.MULTILINE)
STAND_INS = {
    "RECIPE": "video-r1-7b-tgrpo", "SFT_RECIPE": "video-r1-7b-sft", "N": "1", "M": "1", "S": "1",
    "CHECKPOINT": "runs/rl", "DIR": "made", "NAME": "served",
}  # fmt: skip
"""What a page leaves to its reader."""
ENDS = ("&", "|", ";", "&&", ">")  # of a command, in a shell's line
_BEGINS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:video-r1|python|accelerate|torchrun|make|pip|hf|git) ")


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every shell line that has a command of this project or of Python: in blocks fenced as bash
    or as nothing, behind the prompt `$ ` of a console, and in indented lines that begin as a command."""
    lines: list[str] = []
    for language, block in FENCED.findall(text):
        if language in ("", "bash"):
            lines += _joined(block)
        elif language == "console":
            lines += [line[2:] for line in _joined(block) if line.startswith("$ ")]
    for block in INDENTED.findall(FENCED.sub("", text)):
        lines += [line for line in _joined(block) if _BEGINS.match(line)]
    for line in lines:
        if "video-r1 " in line or "-m " in line:
            yield shlex.split(line, comments=True)


def _joined(block: str) -> Iterator[str]:
    """The lines of a block, continued lines joined and comment lines gone."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.strip().startswith("#"):
            yield line.strip()


def request(words: list[str]) -> list[str] | None:
    """The words after `video-r1` or `-m video_r1`; None where the line runs something else."""
    at = next((i for i, word in enumerate(words) if word in ("video-r1", "video_r1")), None)
    if at is None or (words[at] == "video_r1" and words[at - 1] != "-m"):
        return None
    rest = [STAND_INS.get(word, word) for word in words[at + 1 :]]
    end = next((i for i, word in enumerate(rest) if word in ENDS), len(rest))
    return rest[:end] or None
