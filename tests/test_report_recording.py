"""Records of a run for the report: strips of frames and sampled groups."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from report_runs import group_of
from tiny_models import tiny_processor

from video_r1.files import append_line
from video_r1.report.run_data import read_groups, read_run
from video_r1.training.recording import by_word, record_group, save_strip, skipped_facts


@pytest.mark.parametrize(
    ("frames", "height", "width", "max_side", "tile"),
    [
        (2, 168, 224, 112, (112, 84)),  # the longer side becomes max_side
        (16, 224, 420, None, (224, 119)),  # a clip at the training budget
        (1, 1000, 500, None, (336, 672)),
        (1, 2, 2000, 112, (112, 1)),  # no side vanishes
        (1000, 112, 112, 112, (65, 65)),  # a JPEG is at most 65,535 wide
    ],
)
def test_strip_sizes(
    tmp_path: Path, frames: int, height: int, width: int, max_side: int | None, tile: tuple[int, int]
) -> None:
    clip = torch.zeros(1, 3, height, width, dtype=torch.uint8).expand(frames, -1, -1, -1)
    made = save_strip(clip, tmp_path / "s.jpg", max_side)
    assert (made["width"], made["height"]) == tile
    assert Image.open(tmp_path / "s.jpg").size == (frames * tile[0], tile[1])


def test_recorded_group(tmp_path: Path) -> None:
    record_group(tmp_path, 10, group_of())
    line = json.loads((tmp_path / "rollouts.jsonl").read_text())
    strip = {"strip": "frames/10-7.jpg", "count": 3, "width": 28, "height": 28}
    assert line["frames"] == strip | {"timestamps": [0.0, 0.5, 1.0]}
    assert (line["step"], line["problem_id"], line["path"]) == (10, 7, "videos/7.mp4")
    assert (line["contrast"], line["permutation"]) == ("shuffled", [2, 0, 1])
    right = {"text": "<think>x</think><answer>B</answer>", "tokens": 5, "finish_reason": "stop"}
    wrong = {"text": "A", "tokens": 3, "finish_reason": "stop"}
    assert line["ordered"] == [
        right | {"rewards": {"accuracy": 1.0}, "total": 1.0, "advantage": 0.7},
        wrong | {"rewards": {"accuracy": 0.0}, "total": 0.0, "advantage": -0.7},
    ]
    assert line["shuffled"] == [wrong | {"text": "C", "tokens": 2, "rewards": {"accuracy": 0.0}}]
    assert (line["p"], line["p_contrast"]) == (0.5, 0.0)
    # The strip holds the ordered frames, although the shuffled prompt has its own media.
    picture = Image.open(tmp_path / "frames/10-7.jpg")
    assert [picture.getpixel((28 * i + 14, 14)) for i in range(3)] == [(v, v, v) for v in (10, 120, 240)]


def test_a_contrast_has_its_name(tmp_path: Path) -> None:
    """In the record and in the page's data; a record of an older run has none, and is of shuffled frames."""
    group = group_of()
    question = group.rollouts.question
    assert question.contrast is not None
    blind = replace(question.contrast, permutation=torch.tensor([], dtype=torch.long), contrast="blind")
    rollouts = replace(group.rollouts, question=replace(question, contrast=blind))
    record_group(tmp_path, 1, replace(group, rollouts=rollouts))
    record_group(tmp_path, 2, group)
    record_group(tmp_path, 3, group)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["contrast"], line["permutation"]) for line in lines[:2]] == [
        ("blind", []),
        ("shuffled", [2, 0, 1]),
    ]
    lines[1]["contrast"] = "<b>"
    del lines[2]["contrast"]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups, _ = read_groups(read_run(tmp_path, tmp_path), 1_000_000)
    assert [shown["contrast"] for shown in groups] == ["blind", "shuffled", "shuffled"]


def test_a_clip_played_backwards_says_so(tmp_path: Path) -> None:
    group = group_of()
    question = replace(group.rollouts.question, sample=replace(group.sample, play="reversed"))
    record_group(tmp_path, 1, replace(group, rollouts=replace(group.rollouts, question=question)))
    record_group(tmp_path, 2, group)
    groups, _ = read_groups(read_run(tmp_path, tmp_path), 1_000_000)
    assert [shown["play"] for shown in groups] == ["reversed", "forward"]
    assert "play" not in skipped_facts(group.sample, group.rewards)


def test_recording_survives_a_killed_run_and_bad_values(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1, "pro')
    record_group(tmp_path, 2, group_of(rewards=[math.nan, 1.0]))
    append_line(tmp_path / "rollouts.jsonl", {"text": "half a pair \ud83d"})
    broken, line, last = (tmp_path / "rollouts.jsonl").read_bytes().splitlines()
    assert json.loads(line)["ordered"][0]["rewards"] == {"accuracy": None}
    assert json.loads(last)["text"] == "half a pair \ud83d"
    assert broken == b'{"step": 1, "pro'


@pytest.mark.parametrize("problem_id", ["../../up", "a/b", "nul\0", "x" * 400, "<img src=x>", "..", ""])
def test_problem_ids_stay_inside_the_folder(tmp_path: Path, problem_id: str) -> None:
    record_group(tmp_path / "run", 1, group_of(problem_id))
    record_group(tmp_path / "run", 1, group_of("a_b"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert len(list((tmp_path / "run" / "frames").glob("1-*.jpg"))) == 2  # nor do two ids share a file
    assert len(read_groups(read_run(tmp_path / "run", tmp_path), 10**7)[0]) == 2


def test_words_have_what_they_lose_with_the_contrast(tmp_path: Path) -> None:
    tokenizer = tiny_processor("qwen2_5_vl").tokenizer
    text = "Über 🙂 it goes right.\n<answer>B</answer>"
    ids = tokenizer(text)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    drops = torch.tensor([0.25] * len(ids) + [0.5])
    words = by_word(tokenizer, torch.tensor([*ids, end]), drops, -drops)
    assert "".join(word for word, *_ in words) == text and words[2][0] == " it"
    assert sum(drop for _, drop, _ in words) == pytest.approx(float(drops.sum()))
    assert all(drop == -other for _, drop, other in words)
    group = group_of()
    taught, contrasts = (
        [torch.full((len(rollout.token_ids),), value) for rollout in group.ordered] for value in (-1.0, 0.5)
    )
    with_contrasts = replace(group.rollouts, token_contrasts=contrasts)
    record_group(tmp_path, 1, replace(group, rollouts=with_contrasts), tokenizer, taught)
    record_group(tmp_path, 2, group, tokenizer, taught)
    told, plain = (json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines())
    losses = [sum(drop for _, drop in item["word_drops"]) for item in told["ordered"]]
    assert losses == pytest.approx([0.5 * item["tokens"] for item in told["ordered"]])
    taught = [sum(teacher for *_, teacher in item["word_logprobs"]) for item in told["ordered"]]
    assert taught == pytest.approx([-1.0 * item["tokens"] for item in told["ordered"]])
    assert "word_drops" not in plain["ordered"][0] and "word_drops" not in told["shuffled"][0]
