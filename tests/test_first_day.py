"""docs/first-day.md is replayed: its commands run, in a folder of made clips, and print what it promises.

Figures are masked, but for those of `video-r1 data` and the demo; … stands for anything. What takes long is
shortened (SHORT), and plans are of a model with fewer layers. The set-up and the demo, which take minutes,
are held against what they print.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from doc_commands import FENCED, ROOT
from own_clips import write_own_clips

from video_r1.cli import main
from video_r1.lab.model import base_folder
from video_r1.plan.shapes import published_config

PAGE = (ROOT / "docs" / "first-day.md").read_text(encoding="utf-8")
SET_UP = ("git clone", "make install", "source .venv/bin/activate")
DEMO = "make demo"
SHORT = {
    "video-r1 plan": "--model_config shallow",
    "video-r1 rl lab-tgrpo": "--num_generations 2 --preflight_questions 0",  # the base has no cold start
}
"""What is added to the commands that begin so."""
FIGURE = r"-?\d(?:[\d,.:]*\d)?(?:e-?\d+)?"
IN_PLACE = {"Qwen/Qwen3-VL-4B-Instruct (the built-in table)": "shallow"}


class Step(NamedTuple):
    """A command of the page, and the lines that it prints there."""

    command: str
    promised: list[str]


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for language, block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language == "console" else ():
            if line.startswith("$ "):
                found.append(Step(re.sub(r"\s+# .*|(?<= ) +", "", line[2:]), []))
            elif line.strip(" …"):
                found[-1].promised.append(line)
    return found


def pattern(line: str, exact: bool) -> re.Pattern[str]:
    """What a promised line stands for."""
    parts = re.split(rf"(…|{FIGURE}|\s+)", line)
    masks = [(r"…", ".*"), (r"\s+", r"\s+"), *([] if exact else [(FIGURE, FIGURE)])]
    said = (
        next((mask for known, mask in masks if re.fullmatch(known, part)), re.escape(part)) for part in parts
    )
    return re.compile("".join(said) + r"\s*")


RATE = re.compile(r"[\d.]+ (s/step|steps/s)")  # the unit follows the machine


def missing(step: Step, said: str) -> list[str]:
    """The promised lines that were not printed."""
    exact = step.command.startswith(("cat ", "video-r1 data", DEMO))
    printed = RATE.sub("1 s/step", said).splitlines()
    return [
        line
        for line in step.promised
        if not any(pattern(instead(line), exact).fullmatch(one) for one in printed)
    ]


def instead(line: str) -> str:
    for name, other in IN_PLACE.items():
        line = line.replace(name, other)
    return RATE.sub("1 s/step", line)


def replay(step: Step, capfd: Any) -> None:
    if step.command.startswith("video-r1 "):
        extra = next((words for begin, words in SHORT.items() if step.command.startswith(begin)), "")
        assert main([*shlex.split(step.command)[1:], *extra.split()]) == 0
        said = "".join(capfd.readouterr())
    else:
        said = subprocess.run(step.command, shell=True, check=True, capture_output=True, text=True).stdout
    assert missing(step, said) == [], said


@pytest.mark.slow
def test_the_page_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_own_clips(tmp_path / "mine")
    shutil.copytree(base_folder(), tmp_path / "runs" / "demo" / "sft")
    config = published_config("Qwen/Qwen3-VL-4B-Instruct")
    config.text_config.num_hidden_layers = config.vision_config.depth = 2
    config.vision_config.deepstack_visual_indexes = [0]
    config.save_pretrained(tmp_path / "shallow")
    played = [step for step in steps(PAGE) if not step.command.startswith((*SET_UP, DEMO))]
    for step in played:
        replay(step, capfd)
    begun = {" ".join(step.command.split()[:3]) for step in played}
    assert begun >= {"video-r1 data make", "video-r1 data check", "video-r1 plan qwen3-vl-4b-tgrpo-lora"}
    assert begun >= {
        "video-r1 rl qwen3-vl-4b-tgrpo-lora",
        "video-r1 rl lab-tgrpo",
        "video-r1 report runs/mine",
    }


def test_the_demo_says_what_the_page_promises() -> None:
    """By the summary of one that ran."""
    (step,) = [step for step in steps(PAGE) if step.command == DEMO]
    text = (ROOT / "docs" / "demo" / "seed-0.json").read_text()
    stages = [f"== {stage}" for stage in json.loads(text)["seconds"] if stage != "total"]
    assert missing(step, "\n".join([*stages, text, "report: runs/demo/report.html"])) == []


def test_the_set_up_says_what_the_page_promises() -> None:
    (step,) = [step for step in steps(PAGE) if step.command == "make install"]
    script = (ROOT / "setup" / "install.sh").read_text().replace("$venv", ".venv")
    said = "\n".join(f"setup: {text}" for text in re.findall(r'say "([^"]+)"', script))
    assert step.promised and missing(step, said) == []
