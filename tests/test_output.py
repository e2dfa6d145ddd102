"""What commands say while they work: progress in 80 columns, tables, warnings, no bars of others in logs."""

from __future__ import annotations

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from video_r1 import console as progress_module
from video_r1.console import Progress, Warnings, table
from video_r1.training.progress import StepProgress

FIGURES = {"reward": "1.32", "format": "0.98", "gap": "-0.12"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_progress_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that is continued, whose steps before do not count for the rate."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    bar = Progress(1000, "T-GRPO", "steps", done=900)
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
        r"T-GRPO: 4/5, [\d.]+ steps/s, 0:00 taken, reward 1.23, loss 0.000123\n", said.getvalue()
    )


def test_a_warning_replaces_the_line_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    record = logging.LogRecord("video_r1.training", logging.WARNING, "", 1, "step %d is skipped", (7,), None)
    with Progress(4, "T-GRPO", "steps"):
        Warnings().emit(record)
    start, warning, end = terminal.getvalue().split("\r\x1b[K")[1:]
    assert start.startswith("T-GRPO: 0/4") and "\n" not in start
    assert warning == "step 7 is skipped\n" and end.startswith("T-GRPO: 0/4") and end.endswith("\n")
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    Warnings().emit(record)
    assert log.getvalue() == "step 7 is skipped\n"


def test_columns_are_aligned_whatever_the_cells_hold() -> None:
    rows = [("all", "7", "0.5 [0.4, 0.6]"), ("  [bold]源", "1,234", "-"), ("last", "", "")]
    assert table(("source", "questions", "ordered"), rows).splitlines() == [
        "source      questions         ordered",
        "all                 7  0.5 [0.4, 0.6]",
        "  [bold]源      1,234               -",
        "last",
    ]
    assert table(("", "a"), [("x" * 300, "1")]).splitlines()[1] == "x" * 300 + "  1"
