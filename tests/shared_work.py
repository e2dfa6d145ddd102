"""What test_shared_work.py runs in several processes: command lines, with outputs that filters can judge."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

from video_r1 import cli
from video_r1.rollout.transformers import TransformersEngine


def command_line(folder: Path, words: list[str], lives: tuple[int | None, ...] = ()) -> None:
    """`video-r1 WORDS`, killed by SIGKILL instead of its engine's call number `lives[rank]`, from 0.

    Each call leaves a line in `folder`/calls.
    """
    rank = int(os.environ.get("RANK", "0"))
    life = lives[rank] if lives else None
    sample, calls = TransformersEngine.sample, []

    def counted(self: Any, prompts: Any, *arguments: Any, **keywords: Any) -> Any:
        if len(calls) == life:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(len(prompts))
        with (folder / "calls").open("a") as file:
            file.write(f"{rank} {len(prompts)}\n")
        groups = sample(self, prompts, *arguments, **keywords)
        return [[dataclasses.replace(one, text=rationale(one)) for one in group] for group in groups]

    TransformersEngine.sample = counted
    cli.SECONDS_TO_BE_ENDED = 0.0  # no launcher would end them
    code = cli.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rationale(rollout: Any) -> str:
    """The tokens in an answer's format; half of them say B."""
    tokens = rollout.token_ids.tolist()
    answer = "AB"[sum(tokens) % 2]
    return f"<think>It goes on with {tokens} to the end.</think>\n<answer>{answer}</answer>"
