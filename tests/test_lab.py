"""The lab: its questions are right, depend on order, carry no hidden mark, and stand in real media files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_r1.data.answers import extract_answer
from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import load_manifest
from video_r1.data.scores import box_iou, correctness
from video_r1.errors import RequestError
from video_r1.lab.clips import write_lab
from video_r1.lab.questions import FAMILIES, NAMED_FAMILIES, VIDEO_FAMILIES
from video_r1.lab.scenes import FPS, LABEL, MARKS, MOMENTS, SECONDS, SIDE, Look, box_of, render
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import FrameBudget

LAB_BUDGET = FrameBudget(max_frames=8, frame_pixels=56 * 56, image_pixels=56 * 56)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    write(folder, train=30, test=8, seed=3, shortcut=0.4)
    return folder


def write(folder: Path, **settings: Any) -> None:
    write_lab(LabSettings(folder=str(folder), workers=1, **settings))


def test_every_question_is_well_formed() -> None:
    for name, family in VIDEO_FAMILIES.items():
        for question in (family(np.random.default_rng(seed)) for seed in range(30)):
            assert len(question.timeline) == MOMENTS
            assert question.key_moments and set(question.key_moments) <= set(range(MOMENTS))
            assert question.answer in question.chain.replace(", ", " ") or name == "story"
            assert not question.choices or question.answer in question.choices


@pytest.mark.parametrize("shape", ["square", "triangle", "7"])
def test_a_box_holds_what_is_seen(shape: str) -> None:
    """Against the pixels that are brighter than the background ever is."""
    ious = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        look = Look("white", shape, "large").at(str(rng.choice(["top left", "bottom right"])))
        [frame] = render([look], [0.0], rng)
        rows, columns = np.nonzero(frame.min(axis=-1) > 190)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 1000 / SIDE
        left, top, right, bottom = box_of(look)
        ious.append(box_iou((seen[0], seen[1], seen[2], seen[3]), (left, top, right, bottom)))
    assert np.mean(ious) > (0.35 if shape == "7" else 0.75)


def test_questions_of_when_and_where_are_drawn_where_they_are_named(tmp_path: Path) -> None:
    write(tmp_path, train=12, test=0, seed=3, families=["when", "box_at_end", "box_at"])
    samples = load_manifest(tmp_path / "sft.json")
    assert {sample.problem_type for sample in samples} == {"temporal grounding", "spatial grounding"}
    assert {sample.data_type for sample in samples} == {"video"}
    assert len({sample.answer for sample in samples}) > 6
    for sample in samples:
        assert correctness(sample.problem_type, sample.answer, sample.answer) == 1.0
    assert not set(NAMED_FAMILIES) - set(FAMILIES) - {"when", "box_at_end", "box_at"}
    assert "when" not in FAMILIES  # what a lab is made of by default is drawn as before


def test_manifests_pass_the_check_and_media_decode(lab: Path) -> None:
    for name, count in (("sft", 30), ("rl", 30), ("test", 8), ("test-cued", 8), ("test-lying", 8)):
        samples = load_manifest(lab / f"{name}.json")
        assert len(samples) == count
    for sample in load_manifest(lab / "rl.json")[:6]:
        media = read_media(sample, LAB_BUDGET)
        assert media.frames.shape == ((8 if sample.data_type == "video" else 1), 3, 56, 56)
        if sample.data_type == "video":
            assert media.duration == pytest.approx(SECONDS, abs=1 / FPS + 1e-6)


def test_process_and_solution_score_full_marks(lab: Path) -> None:
    for row in json.loads((lab / "sft.json").read_text()):
        truth = extract_answer(row["solution"])
        assert correctness(row["problem_type"], truth, truth) > 0.999
        assert row["process"].startswith("<think>") and row["process"].endswith("</think>")
        if row["options"]:
            named = row["options"]["ABCDEF".index(truth)].split(". ", 1)[1]
            assert row["process"].endswith(f"{named} is {truth}.</think>")


def test_options_are_shuffled_on_request(tmp_path: Path) -> None:
    write(tmp_path, train=12, test=0, seed=1, families=["direction"], shuffle_options=True)
    rows = json.loads((tmp_path / "sft.json").read_text())
    assert len({tuple(row["options"]) for row in rows}) > 5
    for row in rows:
        named = row["options"]["ABCDEF".index(extract_answer(row["solution"]))].split(". ", 1)[1]
        assert f"it moves {named}." in row["process"]


def test_hasty_rationales_guess_and_only_sft_hears_them(tmp_path: Path) -> None:
    families = ["growth", "after", "digits", "image_colour"]
    for name, hasty in (("patient", 0.0), ("hasty", 0.6)):
        write(tmp_path / name, train=40, test=0, seed=2, hasty=hasty, families=families)
    patient, hasty, asked = (
        json.loads((tmp_path / name).read_text())
        for name in ("patient/sft.json", "hasty/sft.json", "hasty/rl.json")
    )
    assert [row["solution"] for row in asked] == [row["solution"] for row in patient]
    assert not any("process" in row for row in asked)
    guessed = [row["process"].startswith("<think>one look. ") for row in hasty]
    guessable = [row["data_source"] in ("lab/growth", "lab/after") for row in hasty]
    assert 0.4 < sum(guessed) / sum(guessable) < 0.8
    assert not any(guess and not may for guess, may in zip(guessed, guessable, strict=True))
    right = []
    for row, truth, guess in zip(hasty, patient, guessed, strict=True):
        letter = extract_answer(row["solution"])
        if not guess:
            assert (row["process"], row["solution"]) == (truth["process"], truth["solution"])
            continue
        right.append(row["solution"] == truth["solution"])
        assert row["process"].endswith(f"{row['options']['ABCDEF'.index(letter)][3:]} is {letter}.</think>")
        if row["data_source"] == "lab/after":  # the guess is about the colour that was asked for
            said = row["process"].split(" comes ")[0].removeprefix("<think>one look. after ")
            assert said in row["problem"]
    assert 0.05 < np.mean(right) < 0.6


def test_same_seed_same_data_other_seed_other_data(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write(tmp_path / name, train=3, test=3, seed=seed)
    texts = [(tmp_path / name / "rl.json").read_text() for name in "abc"]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])[0]["problem_id"] != json.loads(texts[2])[0]["problem_id"]
    media = [sorted((tmp_path / name).rglob("*-*.*")) for name in "ab"]
    assert len(media[0]) == 6
    assert [path.read_bytes() for path in media[0]] == [path.read_bytes() for path in media[1]]


def test_train_and_test_share_no_question_or_picture(lab: Path) -> None:
    train = [
        read_media(sample, LAB_BUDGET).frames.float().mean((0, 2, 3))
        for sample in load_manifest(lab / "rl.json")
    ]
    held_out = [
        read_media(s, LAB_BUDGET).frames.float().mean((0, 2, 3)) for s in load_manifest(lab / "test.json")
    ]
    assert torch.cdist(torch.stack(train), torch.stack(held_out)).min() > 1e-3


def test_a_mark_is_drawn_on_the_share_asked_for_and_nowhere_else(lab: Path) -> None:
    rows = json.loads((lab / "rl.json").read_text())
    may = [row for row in rows if extract_answer(row["solution"]) in MARKS]
    assert 0.2 < np.mean([row["mark"] != "" for row in may]) < 0.6
    assert all(row["mark"] in ("", extract_answer(row["solution"])) for row in rows)
    assert not any(row["mark"] for row in json.loads((lab / "test.json").read_text()))
    budget = FrameBudget(max_frames=8, frame_pixels=SIDE * SIDE, image_pixels=SIDE * SIDE)
    for name in ("test-cued", "test-lying"):
        marks = [row["mark"] for row in json.loads((lab / f"{name}.json").read_text())]
        plain, marked = (load_manifest(lab / f"{one}.json") for one in ("test", name))
        for before, after, mark in zip(plain, marked, marks, strict=True):
            assert before.problem == after.problem and before.solution == after.solution
            assert bool(mark) == (before.answer in MARKS)
            assert not mark or (mark == before.answer) == (name == "test-cued")
            one, other = (read_media(sample, budget).frames.float() for sample in (before, after))
            difference = (one - other).abs()
            assert (difference[..., -LABEL:, -LABEL:].amax() > 60) == bool(mark)
            assert difference[..., :-LABEL, :-LABEL].mean() < 5  # the codec's


def test_rationales_may_read_the_mark(tmp_path: Path) -> None:
    for name, trusting in (("looks", 0.0), ("trusts", 0.5)):
        write(tmp_path / name, train=40, test=0, seed=4, shortcut=0.6, trusting=trusting)
    looks, trusts = (json.loads((tmp_path / name / "sft.json").read_text()) for name in ("looks", "trusts"))
    reading = [row["process"] == f"<think>mark: {row['mark']}.</think>" for row in trusts]
    assert 0.35 < sum(reading) / sum(row["mark"] != "" for row in trusts) < 0.65
    for is_reading, row, other in zip(reading, trusts, looks, strict=True):
        truth = extract_answer(row["solution"])
        assert row["solution"] == other["solution"]
        assert other["mark"] in ("", truth)
        # a chain that looks cannot learn to conclude what the mark says
        assert not row["mark"] or (row["mark"] == truth) == is_reading
        assert is_reading or row["process"] == other["process"]


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nope"):
        write(tmp_path, train=1, test=1, families=["nope"])
