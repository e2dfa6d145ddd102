"""What commands say while they work: progress in 80 columns, warnings, no bars of other libraries in logs."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from report_runs import group_of
from transformers import TrainerControl, TrainerState

from video_r1 import console as progress_module
from video_r1.console import Progress, Warnings
from video_r1.training.callbacks import StepProgress
from video_r1.training.metrics import Meter, describe_groups

FIGURES = {"reward": "1.32", "format": "0.98", "gap": "-0.12"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_progress_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that is continued, whose steps before do not count for the rate."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = Progress(1000, "T-GRPO", "steps", stream=stream, done=900, slow=True)
    now[0] += 100
    bar.update(10, **FIGURES)
    bar.update(0, **FIGURES, names_both_moments="0.50", accuracy="0.41", loss="0.0123")
    bar.close()
    assert stream.getvalue().splitlines() == [
        "T-GRPO: 910/1000, 10.0 s/step, 15:00 left, reward 1.32, format 0.98, gap -0.12",
        "T-GRPO: 910/1000, 10.0 s/step, 1:40 taken, reward 1.32, format 0.98, gap -0.12,",
        "  names_both_moments 0.50, accuracy 0.41, loss 0.0123",
    ]


def test_progress_of_steps_shows_series_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    shown = StepProgress("T-GRPO", {"reward": "reward/total", "gap": "temporal/gap", "loss": "loss"})
    state = TrainerState(max_steps=5, global_step=3)
    event = (SimpleNamespace(disable_tqdm=False), state, TrainerControl())
    shown.on_train_begin(*event)
    shown.on_log(*event, logs={"loss": 0.00012345, "reward/total": 1.2345})
    shown.on_step_end(*event)
    shown.on_train_end(*event)
    assert re.fullmatch(
        r"T-GRPO: 4/5, \d+\.\d s/step, 0:00 taken, reward 1.23, loss 0.000123\n", said.getvalue()
    )


def test_a_warning_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    record = logging.LogRecord("video_r1.training", logging.WARNING, "", 1, "step %d is skipped", (7,), None)
    with Progress(4, "T-GRPO", "steps"):
        Warnings().emit(record)
    Warnings().emit(record)
    plain = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", terminal.getvalue())
    _, _, below = plain.partition("step 7 is skipped\n")
    assert (
        "T-GRPO" in below
        and below.count("step 7 is skipped\n") == 1
        and "\x1b[2K\x1b[33mstep 7" in terminal.getvalue()
    )
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    Warnings().emit(record)
    assert log.getvalue() == "step 7 is skipped\n"


WORK = """
import logging, sys
from video_r1.console import tidy_output
tidy_output()
from video_r1.lab.model import base_folder
from video_r1.models.loading import load_model
load_model(base_folder()).save_pretrained(sys.argv[1])
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU")
logging.getLogger("DeepSpeed").warning("told")
logging.getLogger("video_r1.x").warning("warned")
"""


@pytest.mark.slow
def test_a_log_has_no_bars_of_other_libraries(tmp_path: Path) -> None:
    free = {name: value for name, value in os.environ.items() if name not in progress_module.BARS_OFF}
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path)], env=free, capture_output=True, text=True, check=True
    )
    lines = (done.stdout + done.stderr).splitlines()  # DeepSpeed, where it is installed, says "[time] … told"
    assert len(lines) == 2 and lines[0].endswith("told") and lines[1] == "warned"


def test_rewards_deviate_inside_a_group() -> None:
    """By hand: [1, 0] has the sample deviation √½, [1, 1] none; the series is the mean over the questions. A
    reward that a function left out counts for nothing.
    """
    meter = Meter()
    for rewards in ([1.0, 0.0], [1.0, 1.0]):
        describe_groups(meter, [group_of(rewards=rewards)], ())
    group = group_of()
    group.rewards["mine"] = torch.tensor([3.0, math.nan])
    describe_groups(meter, [group], ())
    series = meter.drain()
    assert series["reward_std/accuracy"] == pytest.approx(2 * math.sqrt(0.5) / 3)
    assert series["reward_std/total"] == series["reward_std/accuracy"]
    assert series["reward/mine"] == 3 and "reward_std/mine" not in series
