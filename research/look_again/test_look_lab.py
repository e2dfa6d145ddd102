"""Clips and lessons of the lab of looks."""

import re
from pathlib import Path

from research.look_again.experiment import EVERY, OVERVIEW, WINDOW, write_question
from video_r1.data.decoding.decoders import read_media_at
from video_r1.data.manifests.records import load_manifest
from video_r1.lab.scenes import SHAPES
from video_r1.settings.frames import FrameBudget


def test_the_overview_says_where_to_look_and_not_what(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    budget = FrameBudget(fps=2, max_frames=OVERVIEW, frame_pixels=3136, image_pixels=3136)
    calls = set()
    for index in range(12):
        row = write_question(tmp_path, 0, ("sft", index))
        lesson, true, event = row.pop("taught")["tool"], row["solution"], row["event"]
        (sample,) = load_manifest([row | lesson], tmp_path)
        (media,) = read_media_at(sample, budget, (OVERVIEW,))
        assert not any(event <= time < event + 1 for time in media.timestamps.tolist())
        said = sample.work[0].text if sample.work else sample.process or ""
        assert event // EVERY == SHAPES.index(re.findall(r"shape: (\w+)", said)[0])
        if sample.work:
            ((_, window),) = sample.work[0].calls
            calls.add(window["start"])
            saw = window["start"] <= event < window["end"]
            is_about_colour = sample.data_source == "look/colour"
            assert (sample.solution == true) == (saw or not is_about_colour)
            seen = (sample.process or "").partition(". ")[0]
            assert seen.count("white") == WINDOW - saw
    assert len(calls) > 1  # at random
