"""What commands say while they work: progress in 80 columns, tables, warnings, no bars of others in logs."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from video_r1 import cli
from video_r1 import console as progress_module
from video_r1.cli import main
from video_r1.commands import Command
from video_r1.console import Progress, Warnings, printable_output, table
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


HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b31m\rb\u202ec\ud800.mp4"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b31m\rb\u202ec\ud800.mp4"


def test_cases_control_characters_reach_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a manifest, of an error, of a table and of a model's answer; tables keep their bold heads."""
    row = {
        "problem_id": HOSTILE, "problem": HOSTILE, "data_type": "video", "problem_type": "free-form",
        "solution": "<answer>x</answer>", "path": HOSTILE, "data_source": HOSTILE,
    }  # fmt: skip
    row = {name: value.replace("\ud800", "") for name, value in row.items()}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"problem_type": HOSTILE}))
    assert main(["data", "check", str(tmp_path / "m.jsonl")]) == 1
    assert main(["ask", "lab-base", HOSTILE, "What?"]) == 2
    with printable_output():
        print(HOSTILE, end="")
    said = capsys.readouterr()
    assert said.out.endswith(SHOWN) and r"a\x1b]0;title\x07" in said.out.removesuffix(SHOWN)
    assert SHOWN.replace(r"\r", " ") in said.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", said.out + said.err)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with printable_output():
        print(table([HOSTILE], [[HOSTILE]]))
    assert isinstance(sys.stdout, Terminal)
    head, body = terminal.getvalue().splitlines()
    assert (head, body) == (f"\x1b[1m{SHOWN}\x1b[0m", SHOWN)


@pytest.mark.parametrize("words", ["rl lab-tgrpo --output_dir", "annotate m.jsonl --teacher lab-base --out"])
def test_cases_a_folder_that_may_not_be_written_is_refused_at_once(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(Command, "function", lambda self: pytest.fail("the work began"))
    (tmp_path / "m.jsonl").write_text("{}")
    words += (
        f" {tmp_path}/some/x.json --train_manifest m.jsonl"
        if "rl" in words[:3]
        else f" {tmp_path}/some/x.json"
    )
    monkeypatch.setattr(cli, "check_sources", lambda recipe: None)
    assert main(words.split()) == 1
    assert (
        f"some/x.json cannot be written: {tmp_path} may not be written; choose another one"
        in capsys.readouterr().err
    )
