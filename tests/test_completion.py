"""What the completion scripts complete."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from video_r1.cli import main

BASH = """
source /dev/stdin
complete_word() {
    COMP_WORDS=(video-r1 "$@") COMP_CWORD=$#
    $(complete -p video-r1 | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    echo "${COMPREPLY[*]}"
}
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("data", "c"), "check"),
        (("rl", "video-r1-3"), "video-r1-3b-distill video-r1-3b-tgrpo video-r1-3b-tgrpo-lora"),
        (("rl", "lab-tgrpo", "--temporal_ru"), "--temporal_rule"),
        (("rl", "lab-tgrpo", "--temporal_rule", "l"), "likelihood_gate"),
        (("plan", "lab-tgrpo", "--sharding", "z"), "zero2 zero3"),
    ],
)
def test_bash_completes(words: tuple[str, ...], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(
        ["bash", "-c", f"{BASH}\ncomplete_word {shlex.join(words)}"],
        input=script,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == found.split(), done.stderr


def test_zsh_has_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert "--temporal_rule" in capsys.readouterr().out
