"""Tables of one's own: which column is what, what an answer means, which file is meant."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from made_tables import make, written

from video_r1.cli import main
from video_r1.data.answers import options_of, parse_options, split_options
from video_r1.data.making.clip_index import ClipIndex
from video_r1.data.making.columns import guess_columns
from video_r1.data.making.drafts import numbers_of, read_choice
from video_r1.data.making.layouts import Rejected
from video_r1.data.manifests.records import load_manifest
from video_r1.errors import RequestError

# --- tables --------------------------------------------------------------------------------------


def test_a_csv_with_guessed_columns(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = written(
        tmp_path, "questions.csv",
        'Question;Video Name;Option_1;Option_2;Option 3;Correct-Answer;Source;Level\n'
        '"Which way;\nthen?";ball;left;right;;Right;lab;hard\n'
        "What?;cup.mp4;red;green;blue;c;lab;easy\n",
    )  # fmt: skip
    rows, refused = make(shelf, table)
    assert refused == []
    assert rows[0] == {
        "problem_id": 1, "problem": "Which way;\nthen?", "problem_type": "multiple choice",
        "options": ["A. left", "B. right"], "solution": "<answer>B</answer>", "data_type": "video",
        "path": "a/ball.mp4", "data_source": "lab", "Level": "hard",
    }  # fmt: skip
    assert rows[1]["solution"] == "<answer>C</answer>" and len(rows[1]["options"]) == 3
    said = capsys.readouterr().out
    shown = [line.split() for line in said.splitlines()]
    assert ["problem", "Question", "guessed"] in shown and ["answer", "Correct-Answer", "guessed"] in shown
    assert "Option_1+Option_2+Option 3" in said
    assert "kept as they are: Level" in said and "to change that: --columns problem=COLUMN" in said
    assert f"--train_manifest {tmp_path / 'out.json'} --media_root {shelf.resolve()}" in said


def test_columns_are_overridden_and_left_out(shelf: Path, tmp_path: Path) -> None:
    table = written(tmp_path, "t.tsv", "question\tasked\tvideo\tanswer\tid\nwrong\tHow many?\tcup\t4\t9\n")
    rows, _ = make(shelf, table, "--columns", "problem=asked,problem_id=none", "--problem_type", "regression")
    assert (rows[0]["problem"], rows[0]["problem_id"], rows[0]["problem_type"]) == (
        "How many?",
        1,
        "regression",
    )
    for columns, said in (
        ("problem=nothing", "no column 'nothing', only question"),
        ("what=asked", "no field 'what'"),
    ):
        with pytest.raises(RequestError, match=said):
            guess_columns(["question", "asked"], dict([columns.split("=")]))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["a0", "a1", "a2"], ("a0", "a1", "a2")), (["A", "B", "C", "answer"], ("A", "B", "C")),
        (["option_1", "option_2"], ("option_1", "option_2")),
        (["choice b", "choice a"], ("choice a", "choice b")), (["Options", "a0", "a1"], ("Options",)),
        (["a1", "a3"], None), (["a0"], None),
    ],
)  # fmt: skip
def test_columns_of_options(names: list[str], options: Any) -> None:
    assert guess_columns(names, {}).names.get("options") == options


def test_cases_numbers_of_other_countries(shelf: Path, tmp_path: Path) -> None:
    answers = ["3,5", "1.234,5", "12'000", "−5", "1\u00a0200", "3, 5", "12.5.2024"]
    table = written(
        tmp_path, "t.jsonl", [{"video": "ball", "question": "?", "answer": text} for text in answers]
    )
    rows, refused = make(shelf, table)
    assert [line["reason"] for line in refused] == ["doubtful number"] * 3
    assert [row["problem_type"] for row in rows] == ["numerical", "numerical", "free-form", "free-form"]


@pytest.mark.parametrize("kind", ["parquet", "folder", "json of one list"])
def test_other_files(kind: str, shelf: Path, tmp_path: Path) -> None:
    made = [
        {"query": "Which?", "choices": ["red", "blue"], "label": n, "clip": "cup", "vec": [1.0]}
        for n in (0, 1)
    ]
    if kind == "json of one list":
        table = written(tmp_path, "t.json", {"version": 1, "data": made})
    else:
        folder = tmp_path / "set"
        folder.mkdir()
        datasets.Dataset.from_list(made).to_parquet(folder / "train.parquet")
        table = folder / "train.parquet" if kind == "parquet" else folder
    rows, _ = make(shelf, table)
    assert [row["solution"] for row in rows] == ["<answer>A</answer>", "<answer>B</answer>"]
    assert rows[0]["vec"] == [1.0]


def test_tables_at_an_address(
    memory: Any, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    memory.pipe("/b/t.csv", b"question,answer,video\nq,yes,cup\n")
    memory.pipe(
        "/b/t.json", json.dumps({"data": [{"question": "q", "answer": "yes", "video": "cup"}]}).encode()
    )
    out = tmp_path / "out.json"
    for name in ("t.csv", "t.json"):
        request = ["data", "make", f"memory://b/{name}", "--media_root", str(shelf), "--out", str(out)]
        assert main(request) == 0 and json.loads(out.read_text())[0]["path"] == "cup.mp4"
    monkeypatch.setattr("video_r1.data.manifests.records._LARGEST_FETCHED", 20)
    assert main(request) == 2
    assert "memory://b/t.json: is larger than a manifest may be (2e-08 GB)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "several", "layout"),
    [
        ("image", False, "table"),
        ("picture", False, "table"),
        ("images", True, "table"),
        ("image", False, "swift"),
    ],
)
def test_a_table_with_the_files_themselves(
    column: str, several: bool, layout: str, shelf: Path, tmp_path: Path
) -> None:
    """As data sets of the hub have them: each at its cell, also in a list; a column of names will do."""
    kind = datasets.List(datasets.Image()) if several else datasets.Image()
    pixels = {"bytes": (shelf / "sign.png").read_bytes(), "path": "sign.png"}
    rows = {
        "messages": [[{"role": "user", "content": "q"}]] if layout == "swift" else None,
        "question": ["q"], "answer": ["yes"], "shown": ["sign"], column: [[pixels] if several else pixels],
    }  # fmt: skip
    made = datasets.Dataset.from_dict({name: values for name, values in rows.items() if values})
    table = tmp_path / "t.parquet"
    made.cast_column(column, kind).to_parquet(table)
    taken, (line,) = make(shelf, table, code=1)
    assert taken == [] and line["reason"] == "clip elsewhere" and "--allowed_roots" in line["remedy"]
    ((row,), _) = make(shelf, table, "--allowed_roots", str(tmp_path))
    place = "0.0" if several else "0"
    assert row["path"] == f"parquet://{column}/{place}::{table}" and row["data_type"] == "image"
    taken, refused = make(shelf, table, "--columns", "path=shown")
    assert refused == [] and taken[0]["path"] == "sign.png" and column not in taken[0]


def test_jsonl_out_and_ids_that_repeat(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [{"id": name, "question": "q", "answer": "yes", "video": "cup"} for name in (7.0, "7", "x", None)]
    table, out = written(tmp_path, "t.json", made), tmp_path / "o.jsonl"
    assert main(["data", "make", str(table), "--media_root", str(shelf), "--out", str(out)]) == 0
    assert [json.loads(line)["problem_id"] for line in out.read_text().splitlines()] == [7, "7-2", "x", 4]
    assert "repeated ids that got a number appended: 1" in capsys.readouterr().out


# --- options and answers -------------------------------------------------------------------------

COLOURS = ["A. red", "B. green", "C. blue"]


@pytest.mark.parametrize(
    ("answer", "reading", "letter"),
    [
        ("B", "text", "B"), ("b", "text", "B"), ("(B)", "text", "B"), ("B.", "text", "B"),
        ("B. green", "text", "B"), ("b) green", "text", "B"), ("Green.", "text", "B"), ("GREEN", "text", "B"),
        ("purple", "text", ""), ("D", "text", ""), ("B. red", "text", ""), ("", "text", ""),
        (0, "from_0", "A"), ("2", "from_0", "C"), (2.0, "from_0", "C"), (3, "from_0", ""), (0, "from_1", ""),
        (3, "from_1", "C"), ("green", "from_1", "B"), ("C", "from_0", "C"), (-1, "from_0", ""),
    ],
)  # fmt: skip
def test_an_answer_becomes_a_letter(answer: Any, reading: Any, letter: str) -> None:
    assert read_choice(answer, COLOURS, reading) == letter


NUMBERS = ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("answers", "options", "reading"),
    [
        (["A", "red"], COLOURS, "text"),
        ([0, 1, 2], COLOURS, "from_0"),
        ([1, 2, 3], COLOURS, "from_1"),
        (["1", "3", "B"], COLOURS, "from_1"),
        ([0], COLOURS, "from_0"),
        ([1, 2], COLOURS, None),
        ([1, 1], ["A. 0", "B. 1"], None),  # the text of B, the place of B from 0, that of A from 1
        ([5, 4, 5], options_of(NUMBERS), "text"),
        ([2, 3], options_of(NUMBERS), None),
        ([1, 2, 2], options_of(["1", "2"]), "text"),  # the place from 1 is the same
        ([1, 2, 4], options_of(["1", "2", "3", "4"]), "text"),
        ([17], COLOURS, "text"),
        ([0, *[1, 2, 3] * 20], COLOURS, "from_1"),  # a stray one decides nothing
        ([], COLOURS, "text"),
    ],
)
def test_numbers_are_read_where_the_data_leave_no_doubt(
    answers: list, options: list, reading: str | None
) -> None:
    choices = [(answer, options) for answer in answers]
    if reading is None:
        with pytest.raises(RequestError, match=r"numbers, which may be read as .* say which: --answers text"):
            numbers_of(choices)
    else:
        assert numbers_of(choices) == reading


def test_an_ambiguous_table_is_asked_about_and_nothing_is_written(shelf: Path, tmp_path: Path) -> None:
    table = written(
        tmp_path, "t.csv", "question,video,options,answer\nq,cup,red|green|blue,1\nq,cup,red|green|blue,2\n"
    )
    out = tmp_path / "out.json"
    request = ["data", "make", str(table), "--media_root", str(shelf), "--out", str(out)]
    assert main(request) == 2 and not out.exists()
    for answers, letters in (("from_0", "BC"), ("from_1", "AB")):
        rows, _ = make(shelf, table, "--answers", answers)
        assert [row["solution"][8] for row in rows] == list(letters)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ('["a, b", "c"]', ["a, b", "c"]), ("['a', 'b']", ["a", "b"]), ("a|b", ["a", "b"]),
        ("a; b", ["a", "b"]),
        ("a\nb", ["a", "b"]), ("A. red B. green", ["A. red", "B. green"]),
        ("(A) red (B) b", ["A. red", "B. b"]),
        ("[broken", ["[broken"]), (["a"], ["a"]), ({"A": "x"}, {"A": "x"}),
        ('{"A": "x", "B": "y"}', {"A": "x", "B": "y"}),
        ("A. red C. green", ["A. red C. green"]),
    ],
)  # fmt: skip
def test_options_in_one_cell(cell: Any, options: Any) -> None:
    assert parse_options(cell) == options


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What?\nA. x\nB. y\nAnswer by letter.", ("What?", ["A. x", "B. y"])),
        ("What?\nA. x\nB. y\nIt is night.", ("What?\nIt is night.", ["A. x", "B. y"])),
        ("What?\n(A) x\n(B) y\n(C) z", ("What?", ["A. x", "B. y", "C. z"])),
        ("A. Smith went\nwhere?", ("A. Smith went\nwhere?", [])),
        ("A. Smith went\nwhere?\nA. in\nB. out", ("A. Smith went\nwhere?", ["A. in", "B. out"])),
        ("What?", ("What?", [])),
    ],
)
def test_options_in_the_question(question: str, expected: tuple[str, list[str]]) -> None:
    assert split_options(question) == expected


# --- clips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("cup.mp4", "cup.mp4"), ("./cup.mp4", "cup.mp4"), ("cup", "cup.mp4"), ("CUP.MP4", "cup.mp4"),
        ("cup.avi", "cup.mp4"), ("ball", "a/ball.mp4"), ("x/y/a/ball.mp4", "a/ball.mp4"),
        ("b/same", "b/same.mp4"),
        ("/far/b/same.mp4", "b/same.mp4"), ("x\\cup.mp4", "cup.mp4"),
        ("same", "several clips: 'same' may be a/same.mp4, b/same.mp4"),
        ("cupp", "no such clip: no file 'cupp' below .*; near it: cup.mp4"), ("zzz", "below .*shelf[^;]*$"),
        ("s3://bucket/x.mp4", "s3://bucket/x.mp4"),
    ],
)  # fmt: skip
def test_finding_clips(name: str, path: str, shelf: Path) -> None:
    index = ClipIndex(str(shelf))
    if " " in path or "*" in path:
        with pytest.raises(Rejected, match=path):
            index.find(name)
    else:
        assert index.find(name) == path
    assert index.find(str(shelf / "cup.mp4")) == "cup.mp4"


def test_a_copy_of_the_clips_in_a_subfolder_does_not_count(tmp_path: Path) -> None:
    for name in ("7.mp4", "old/7.mp4", "old/older/7.mp4", "a/8.mp4", "b/c/8.mp4", "9.mp4", "9.avi"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    index = ClipIndex(str(tmp_path))
    assert (index.find("7"), index.find("x/7.mp4"), index.find("old/7")) == ("7.mp4", "7.mp4", "old/7.mp4")
    for name in ("8", "9"):
        with pytest.raises(Rejected, match="several clips"):
            index.find(name)


def test_links_and_absolute_paths_need_allowed_roots(shelf: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(shelf / "cup.mp4", root / "linked.mp4")
    os.symlink(shelf / "a", root / "folder")
    os.symlink(root, root / "loop")
    names = ["linked", str(shelf / "a" / "same.mp4"), "ball"]
    table = written(tmp_path, "t.json", [{"question": "q", "answer": "yes", "video": name} for name in names])
    rows, refused = make(root, table, code=1)
    assert rows == [] and [line["reason"] for line in refused] == [
        "clip elsewhere",
        "clip elsewhere",
        "no such clip",
    ]
    assert "--allowed_roots" in refused[0]["remedy"]
    rows, refused = make(root, table, "--allowed_roots", str(shelf))
    assert [row["path"] for row in rows] == ["linked.mp4", str(shelf / "a" / "same.mp4"), "folder/ball.mp4"]
    samples = load_manifest(tmp_path / "out.json", root, allowed_roots=[shelf])
    assert [Path(sample.path) for sample in samples] == [
        (shelf / name).resolve() for name in ("cup.mp4", "a/same.mp4", "a/ball.mp4")
    ]
    assert refused == []
