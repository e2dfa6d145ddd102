"""`data pairs`: the answer about the reversed clip by rules on words, and the manifest with its twins."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_endpoint import chat_endpoint
from test_temporal import scored
from tiny_models import moving_square, write_clip

from video_r1.cli import main
from video_r1.data.making.reversal import Reversals, Unknown
from video_r1.data.manifests.records import load_manifest
from video_r1.data.reading import Question, derived_generator
from video_r1.training.metrics import Meter, describe_groups
from video_r1.training.questions import epoch_order, pair_of

WORDS = Reversals()
WAYS = ["left", "right", "up", "down"]


def sentences() -> dict[str, list[tuple[str, list[str], str, str | None]]]:
    """Question, options, answer and the answer backwards, by section of reversal_sentences.txt."""
    found: dict[str, list[Any]] = {}
    for line in Path(__file__).with_name("reversal_sentences.txt").read_text("utf-8").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line[3:], [])
        elif line and not line.startswith("#"):
            problem, *given, backwards = line.split(" | ")
            answers = given[0] if given else "*yes / no"
            options = answers.split(" / ") if " / " in answers else []
            answer = next((each[1:] for each in options if each[0] == "*"), answers)
            options = [each.removeprefix("*") for each in options]
            rows.append((problem, options, answer, None if backwards == "-" else backwards))
    return found


def answered(problem: str, options: list[str], answer: str) -> str | None:
    kind = "multiple choice" if options else "numerical" if answer.isdigit() else "free-form"
    try:
        return WORDS.answer(problem, kind, options, answer)
    except Unknown:
        return None


@pytest.mark.parametrize(
    ("section", "least"),
    [
        ("The answer changes: 100 questions.", 93),
        ("No answer follows: 100 questions.", 0),
        ("Written after the rules", 34),
        ("Twelve further sets, each written with its answers before it was first tried", 150),
    ],
)
def test_no_answer_is_false_on_general_english(section: str, least: int) -> None:
    rows = sentences()[section]
    found = [(answered(*row[:3]), *row) for row in rows]
    assert [row for row in found if row[0] not in (None, row[-1])] == []
    assert sum(row[0] is not None for row in found) >= least
    assert len(rows) >= 100


@pytest.mark.parametrize(
    ("problem", "options", "answer", "expected"),
    [
        ("Which way does the square move?", WAYS, "left", "right"),
        ("How is the car moving?", ["from left to right", "from right to left"], "from left to right", 1),
        ("What is the door doing?", ["Opening.", "Closing.", "Nothing"], "Opening.", "Closing."),
        ("How does the apple change?", ["from green to red", "from red to green"], "from red to green", 0),
        ("In what order?", ["A dog runs, then a cat sits", "A cat sits and then a dog runs"], 0, 1),
        ("In what order?", ["He eats before he drinks", "he eats after he drinks"], 0, 1),
        ("Is the ball rolling to the left?", ["no", "yes"], "yes", "no"),
        ("Does he eat before he drinks?", ["yes", "no"], "yes", "no"),
        ("How many times does the ball bounce?", [], "3", "3"),
        ("How many dogs are there?", [], "3", "3"),
        ("What is he doing?", ["turning his head to the left", "turning his head to the right"], 0, 1),
        ("Is opening the box what the man is doing?", ["yes", "no"], "yes", "no"),
        ("Is the cup shrinking or growing?", ["shrinking", "growing", "neither"], "growing", None),
        ("Is the circle shrinking or growing?", ["shrinking", "growing", "neither"], "growing", "shrinking"),
    ],
)
def test_known_answers(problem: str, options: list[str], answer: Any, expected: Any) -> None:
    answer, expected = (options[each] if isinstance(each, int) else each for each in (answer, expected))
    assert answered(problem, options, answer) == expected


@pytest.mark.parametrize(
    ("problem", "options", "answer", "reason"),
    [
        ("Is the ball rolling to the left?", ["yes", "no"], "no", "the answer no"),
        ("Is the man on the left tall?", ["yes", "no"], "yes", "no event"),
        ("Does the ball not roll left?", ["yes", "no"], "yes", "no event"),
        ("Is a ball rolling left?", ["yes", "no"], "yes", "which one"),
        ("Is the woman singing?", ["yes", "no"], "yes", "nothing turns round"),
        ("Does the man sing while he dances?", ["yes", "no"], "yes", "no event"),
        ("Is she eating before she drinks?", ["yes", "no"], "yes", "what lasts"),
        ("Does the rabbit appear?", ["yes", "no"], "yes", "only be seen"),
        ("Where is the dog?", ["left", "right"], "left", "“where”"),
        ("Which way does it move first?", WAYS, "left", "“first”"),
        ("Which way does the opening door move?", WAYS, "left", "“opening”"),
        ("Which way does it move?", ["left", "up"], "left", "not among the options"),
        ("How does it move?", ["up and down", "down"], "up and down", "no event"),
        ("Which animal is moving?", ["a dog", "a cat"], "a dog", "no event"),
        ("In what order?", ["The door opens, then he runs", "He runs, then the door opens"], 0, "not among"),
        ("In what order?", ["He grows, then shrinks", "He shrinks, then grows"], 0, "no event"),
        ("In what order?", ["It grows, then shrinks", "It shrinks, then grows"], 0, "both ways"),
        ("Is he there? Is the door opening?", ["yes", "no"], "yes", "several sentences"),
        ("How many people enter the room?", [], "3", "may change"),
        ("What happens?", [], "A dog runs.", "no rule"),
        ("Is the ball rolling to the left?", [], "yes", "no rule"),
    ],
)
def test_unknown_answers(problem: str, options: list[str], answer: Any, reason: str) -> None:
    answer = options[answer] if isinstance(answer, int) else answer
    kind = "multiple choice" if options else "numerical" if answer == "3" else "free-form"
    with pytest.raises(Unknown, match=reason):
        WORDS.answer(problem, kind, options, answer)


def rows(folder: Path) -> list[dict[str, Any]]:
    write_clip(folder / "clip.mp4", moving_square(frames=16))
    row = {
        "problem_id": 7, "problem": "Which way does the square move?", "data_type": "video",
        "problem_type": "multiple choice", "options": ["A. up", "B. left", "C. right"],
        "solution": "<answer>C</answer>", "path": "clip.mp4", "process": "<think>right</think>",
        "topic": "toy",
    }  # fmt: skip
    return [row, {**row, "problem_id": "x", "problem": "Which way does the square wobble first?"}]


def test_the_manifest_with_twins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made.json").write_text(json.dumps(rows(tmp_path)))
    out = tmp_path / "pairs.json"
    words = ["data", "pairs", str(tmp_path / "made.json"), "--out", str(out)]
    assert main(words) == 0
    assert "2 questions and 1 reversed twins" in capsys.readouterr().out
    first, twin, other = load_manifest(str(out), str(tmp_path))
    assert (first.problem_id, twin.problem_id, other.problem_id) == (7, "7-reversed", "x")
    assert (twin.play, twin.answer, twin.process) == ("reversed", "B", None) and twin.path == first.path
    assert first.process == "<think>right</think>" and twin.extra["topic"] == "toy"
    assert first.extra["pairs"] == twin.extra["pairs"] == {"pair accuracy": ["7", 2]}
    (refused,) = map(json.loads, (tmp_path / "pairs.refused.jsonl").read_text().splitlines())
    assert refused == {"problem_id": "x", "reason": "the question has “first”"}
    assert (
        main(["data", "pairs", str(out), "--out", str(tmp_path / "again.json")]) == 1
    )  # all have their twins
    written = (tmp_path / "made.json").read_text()
    assert main([*words[:-1], str(tmp_path / "made.json")]) == 2  # never over a file of somebody else's
    assert (tmp_path / "made.json").read_text() == written


def test_twins_are_asked_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made.json").write_text(
        json.dumps([{**rows(tmp_path)[0], "problem_id": number} for number in range(6)])
    )
    alone = load_manifest(str(tmp_path / "made.json"))
    drawn = torch.randperm(6, generator=derived_generator(3, "epoch", 1)).tolist()
    assert epoch_order(3, alone, 1) == drawn
    assert main(["data", "pairs", str(tmp_path / "made.json"), "--out", str(tmp_path / "pairs.json")]) == 0
    samples = load_manifest(str(tmp_path / "pairs.json"))
    order = epoch_order(3, samples, 1)
    assert sorted(order) == list(range(12)) and order != sorted(order)
    for one, other in zip(order[::2], order[1::2], strict=True):
        assert (
            pair_of(samples[one]) == pair_of(samples[other]) == (str(samples[min(one, other)].problem_id), 2)
        )
    meter = Meter()
    answers = zip(samples[:3], ("AABB", "ABBB", "AAAA"), strict=True)
    groups = [(scored([*letters]), sample) for sample, letters in answers]
    *twins, single = [
        replace(group, rollouts=replace(group.rollouts, question=Question(sample, None, None, 0)))  # type: ignore[arg-type]
        for group, sample in groups
    ]
    describe_groups(meter, [*twins, single], ())
    assert meter.drain()["temporal/pair_accuracy"] == 0.125
    key = pair_of(samples[0])  # its other half is asked on another rank
    monkeypatch.setattr("video_r1.training.metrics.gather", lambda own: [own, {key: [0.5]}])
    describe_groups(meter, twins[1:], ())
    monkeypatch.undo()
    assert meter.drain()["temporal/pair_accuracy"] == 0.125


def test_a_teacher_that_agrees_with_itself(tmp_path: Path) -> None:
    (asked, _), twins = rows(tmp_path), []
    for number, problem in enumerate(["Where is it first?", "Where is it first?", "Which way does it move?"]):
        twins.append({**asked, "problem_id": number, "problem": f"Question {number}: {problem}"})
    twins.append({**asked, "problem_id": 3, "problem_type": "free-form", "options": []})
    (tmp_path / "made.json").write_text(json.dumps(twins))
    out = tmp_path / "pairs.json"
    with chat_endpoint() as teacher:
        teacher.script[1] = ["one", "wrong"]  # B, and then another answer
        words = ["data", "pairs", str(tmp_path / "made.json"), "--out", str(out), "--teacher", teacher.url]
        assert main([*words, "--samples", "3"]) == 0
        assert len(teacher.requests) == 3  # the third follows from its words, the fourth is no choice
        found = {sample.problem_id: sample for sample in load_manifest(str(out), str(tmp_path))}
        assert found["0-reversed"].answer == "B" and found["0-reversed"].play == "reversed"
        assert "1-reversed" not in found and found["2-reversed"].answer == "B"
        refused = (tmp_path / "pairs.refused.jsonl").read_text()
        assert [json.loads(line)["problem_id"] for line in refused.splitlines()] == [1, 3]
        assert "does not agree with itself" in refused
        assert main([*words, "--samples", "3"]) == 0 and len(teacher.requests) == 3  # all are answered
        assert load_manifest(str(out), str(tmp_path)) == [*found.values()]


def test_further_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[events]\nitself = [["knit", "unravel", "people"]]\n[nouns]\npeople = "hobbit"')
    asked = ("What is the hobbit doing?", "multiple choice", ["knitting", "unraveling"], "knitting")
    with pytest.raises(Unknown):
        WORDS.answer(*asked)
    assert Reversals(str(mine)).answer(*asked) == "unraveling"
    (tmp_path / "made.json").write_text(json.dumps(rows(tmp_path)))
    words = ["data", "pairs", str(tmp_path / "made.json"), "--out", str(tmp_path / "out.json")]
    for wrong in (
        'change = ["knitting"]',
        '[events]\nitself = [["knit", "unravel"]]',
        "[nouns]\npeople = 1",
        "[events]\nitself = 1",
    ):
        mine.write_text(wrong)
        assert main([*words, "--words", str(mine)]) == 2
        assert "must be TOML with entries as in reversals.toml" in capsys.readouterr().err
