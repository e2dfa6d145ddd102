"""Problem types by other names, ids used twice, clips that are not there yet: rows that others write."""

import json
from pathlib import Path
from typing import Any

import pytest

from video_r1.cli import main
from video_r1.data.manifests.problem_types import in_our_words, type_of
from video_r1.data.manifests.records import check_manifest
from video_r1.data.manifests.trl_rows import is_trl_table, trl_samples
from video_r1.errors import ManifestError

ROW = {"problem_id": 1, "problem": "What is it?", "data_type": "text", "solution": "<answer>red</answer>"}
TWO = {"options": ["A. red", "B. blue"], "solution": "<answer>B</answer>"}
TRUE = {"solution": "<answer>True</answer>"}
YES_NO = {"solution": "<answer>no</answer>"}


@pytest.mark.parametrize(
    ("names", "fields", "read"),
    [
        ("open-ended open_ended open Open-Ended free_form", {}, ("free-form", (), "red")),
        ("caption captioning text short_answer", {}, ("free-form", (), "red")),
        ("multiple-choice mcq mc multi_choice MCQ", TWO, ("multiple choice", ("A. red", "B. blue"), "B")),
        ("number integer float numeric", {"solution": "<answer>4</answer>"}, ("numerical", (), "4")),
        ("yes/no boolean bool yes-no binary", YES_NO, ("multiple choice", ("A. Yes", "B. No"), "B")),
        ("true/false bool", TRUE, ("multiple choice", ("A. True", "B. False"), "A")),
        ("yes/no", {**YES_NO, "options": ["A. no", "B. yes"]}, ("multiple choice", ("A. no", "B. yes"), "A")),
        ("yes/no", {**YES_NO, "options": ["no", "yes"]}, ("multiple choice", ("A. no", "B. yes"), "A")),
        ("yes/no", {**TWO, "options": ["yes", "no"]}, ("multiple choice", ("A. yes", "B. no"), "B")),
    ],
)  # fmt: skip
def test_an_alias_is_read_as_our_type(names: str, fields: dict[str, Any], read: tuple[Any, ...]) -> None:
    for name in names.split():
        (sample,), _, problems = check_manifest([{**ROW, **fields, "problem_type": name}])
        assert (sample.problem_type, sample.options, sample.answer) == read
        assert not problems


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"problem_type": "essay"}, "problem_type is 'essay'; known are multiple choice"),
        ({"problem_type": "other"}, "problem_type is 'other'"),
        ({"problem_type": "yes/no"}, "problem_type is 'yes/no'"),  # its answer is red
        ({"problem_type": "mcq"}, "two options or more, found 0"),
        ({"problem_type": "mcq", "options": ["A. red", "A. blue"]}, "use the letter A more than once"),
        ({"problem_type": "open-ended", "options": ["A. red", "B. blue"]}, "options are given"),
        ({"problem_type": 7}, "problem_type is 7"),
    ],
)
def test_an_alias_that_does_not_help_is_refused_with_its_reason(fields: dict[str, Any], problem: str) -> None:
    checked = check_manifest([{**ROW, **fields}])
    assert any(problem in each.text for each in checked.problems) and not checked.samples


def test_alias_counts_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {**ROW, "problem_id": n, "problem_type": name} for n, name in enumerate(["open", "open", "caption"])
    ]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    assert main(["data", "check", str(tmp_path / "m.json"), "--media", "false"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "→" in line]
    counts = "open → free-form: 2, caption → free-form (a judge is advised): 1"
    assert told == [f"problem types read by other names: {counts}"]
    questions = "question,type,answer,data_type\nWhat is it?,short answer,red,text\nIs it?,boolean,yes,text\n"
    (tmp_path / "q.csv").write_text(questions)
    assert main(["data", "make", str(tmp_path / "q.csv"), "--out", str(tmp_path / "made.json")]) == 0
    assert "short answer → free-form: 1 " in capsys.readouterr().out
    made = json.loads((tmp_path / "made.json").read_text())
    assert [row["problem_type"] for row in made] == ["free-form", "multiple choice"]
    assert in_our_words(made[0]) == (made[0], "") and type_of("?") is None


def test_alias_in_a_table_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "How many?", "problem_type": "integer", "answer": "4"},
        {"prompt": "A or B?", "problem_type": "mcq", "answer": "B"},
        {"prompt": "Is it?", "problem_type": "yes/no", "answer": "yes"},
        {"prompt": "How many?", "answer": 4},
    ]
    assert is_trl_table(rows) and not is_trl_table([{**ROW, "prompt": "", "problem_type": "open"}])
    found = [(one.problem_type, one.answer) for one in trl_samples(rows, tmp_path)]
    assert found == [("numerical", "4"), ("multiple choice", "B"), ("free-form", "yes"), ("numerical", "4")]
    told = "integer → numerical: 1, mcq → multiple choice: 1, yes/no → free-form: 1"
    assert told in capsys.readouterr().err
    with pytest.raises(ManifestError, match="row 1: problem_type is 'essay'; known are"):
        trl_samples([{**rows[0], "problem_type": "essay"}], tmp_path)


def test_renumber_gives_each_row_its_own_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [7, "7", "7-2", "x", 7, "x", None, 3.5, "row-7"]
    (tmp_path / "m.json").write_text(
        json.dumps([{**ROW, "problem_id": n, "problem_type": "open"} for n in ids])
    )
    check = ["data", "check", str(tmp_path / "m.json"), "--media", "false"]
    assert main(check) == 1 and "--renumber OUT" in capsys.readouterr().out
    out = tmp_path / "out.json"
    assert main([*check, "--renumber", str(out)]) == 0
    assert "5 of 9 rows got another id; the old one is kept as former_id" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    found = [(row["problem_id"], row.get("former_id")) for row in rows[:6]]
    assert found == [(7, None), ("7-3", "7"), ("7-2", None), ("x", None), ("7-4", 7), ("x-2", "x")]
    assert [row["problem_id"] for row in rows[6:]] == ["row-8", "row-9", "row-7"]
    assert "former_id" not in rows[6] and rows[7]["former_id"] == 3.5
    assert main([*check, "--renumber", str(out)]) == 2


def test_renumbered_and_missing_clips_of_data_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = "id,question,answer,video\n1,What is it?,red,a/clip.mp4\n1,Why?,blue,b.mp4\n"
    (tmp_path / "q.csv").write_text(questions)
    made = ["data", "make", str(tmp_path / "q.csv"), "--out", str(tmp_path / "made.json")]
    assert main(made) == 1  # the clips are not there
    capsys.readouterr()
    assert main([*made, "--media", "false"]) == 0
    out = capsys.readouterr().out
    assert "files that are not there yet, with the paths of the table: 2 (such as a/clip.mp4)" in out
    assert "repeated ids that got a number appended: 1 (the old one is kept as former_id)" in out
    rows = json.loads((tmp_path / "made.json").read_text())
    assert [(row["path"], row["problem_id"], row.get("former_id")) for row in rows] == [
        ("a/clip.mp4", 1, None) if rows[0]["problem_id"] == 1 else ("a/clip.mp4", "1", None),
        ("b.mp4", "1-2", rows[0]["problem_id"]),
    ]
