"""The alert "the run is learning a shortcut": p-values by hand, when it speaks, and how often for nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scripted_engine import ScriptedEngine
from tiny_models import moving_square, tiny_processor, write_clip

from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.data.reading import Reader
from video_r1.evaluation.validation import ShortcutWatch, outcomes_of, shortcut_p, temporal_accuracy
from video_r1.settings.frames import FrameBudget


def outcomes(ordered: str, contrast: str) -> dict[Any, tuple[float, float]]:
    """One clip a digit, 1 for right."""
    return {n: (float(o), float(c)) for n, (o, c) in enumerate(zip(ordered, contrast, strict=True))}


@pytest.mark.parametrize(
    ("first", "now", "p"),
    [
        (("1111", "0000"), ("1111", "1111"), 1 / 16),  # four better with the contrast, four leads lost
        (("0000", "0000"), ("1111", "1111"), 1.0),  # better in both: no lead is lost
        (("1111", "0000"), ("0000", "0000"), 1.0),  # worse in order: nothing is better with the contrast
        (("1111", "0000"), ("1111", "0000"), 1.0),  # nothing changed
        (("1111", "0001"), ("1111", "1110"), 5 / 16),  # three better, one worse: P(3 or 4 of 4)
        (("0011", "0000"), ("1111", "1100"), 1.0),  # a new skill that one frame suffices for
    ],
)
def test_both_sign_tests_count(first: Any, now: Any, p: float) -> None:
    assert shortcut_p(outcomes(*first), outcomes(*now)) == pytest.approx(p)


def test_questions_about_one_clip_are_one_change() -> None:
    scores = [(1.0, 0.0, "a"), (0.0, 1.0, "a"), (1.0, 1.0, "b")]
    assert outcomes_of(scores) == {"a": (0.5, 0.5), "b": (1.0, 1.0)}


def test_when_it_alerts(caplog: pytest.LogCaptureFixture) -> None:
    """Of n clips whose lead is lost p = 2^−n. Levels: 0.0304 at the first validation, then 0.0076."""
    first, n = outcomes("1" * 20, "0" * 20), 6
    for validations, changed, alerts in ((1, n - 1, False), (1, n, True), (2, n, False), (2, n + 2, True)):
        watch = ShortcutWatch()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert not watch.alerts(first, "frozen")
            for _ in range(validations - 1):
                assert not watch.alerts(first, "frozen")
            now = outcomes("1" * 20, "1" * changed + "0" * (20 - changed))
            assert watch.alerts(now, "frozen") == alerts
            assert watch.alerts(first, "frozen") == alerts  # it stays
        assert len(caplog.messages) == alerts
    assert "40 % of the answers to the frozen clips are right (0 % in the first" in caplog.messages[0]


def test_held_out_sets_are_compared_with_themselves() -> None:
    """Two sets take turns; a shortcut in the second is found, a difference between the sets is none."""
    needs, static = outcomes("1" * 20, "0" * 20), outcomes("1" * 20, "1" * 20)
    others = {f"other {clip}": pair for clip, pair in needs.items()}
    watch = ShortcutWatch()
    assert not any(watch.alerts(each, "frozen") for each in (static, others, static, others))
    assert watch.alerts({clip: (1.0, 1.0) for clip in others}, "frozen")


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_run_in_which_nothing_changes_rarely_alerts(share: float) -> None:
    """2,000 runs of 20 validations of 60 clips, each drawn anew with the same probabilities: at most 5 %."""
    rng, runs = np.random.default_rng(0), 2000
    alerts = 0
    for _ in range(runs):
        watch = ShortcutWatch()
        drawn = rng.random((21, 60, 2)) < (0.7, share)
        alerts += any(watch.alerts(dict(enumerate(map(tuple, each.astype(float)))), "x") for each in drawn)
    assert alerts / runs <= 0.05


def test_validation_reports_it(tmp_path: Path) -> None:
    """Six questions need the order at first; then the frozen clip is answered too: p = 2^−6."""
    samples = []
    for n in range(6):
        write_clip(tmp_path / f"{n}.mp4", moving_square(16), 8)
        path = str(tmp_path / f"{n}.mp4")
        samples.append(
            Sample(n, "?", "video", "multiple choice", "<answer>B</answer>", path, ("A. x", "B. y"))
        )
    known = {"ordered"}

    def says(prompt: Prompt, n: int) -> list[str]:
        return [f"<think>t</think><answer>{'B' if prompt.order in known else 'A'}</answer>"] * n

    settings = SimpleNamespace(
        seed=0, tools="", contrast="frozen", contrast_unit="frame", eval_batch_size=4,
        max_completion_length=50, num_generations_eval=None, overview_frames=None,
    )  # fmt: skip
    budget = FrameBudget(fps=2, min_frames=4, max_frames=8, frame_pixels=56 * 56)
    builder = PromptBuilder(tiny_processor("qwen2_5_vl"))
    given = (ScriptedEngine(says), samples, Reader(budget), builder, settings)
    watch = ShortcutWatch()
    assert "shortcut" not in temporal_accuracy(*given)
    assert temporal_accuracy(*given, watch)["shortcut"] == 0.0
    known.add("frozen")
    assert temporal_accuracy(*given, watch)["shortcut"] == 1.0
