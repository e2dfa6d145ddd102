"""Foreign tables that `data make` once misread: each becomes the right rows, or is refused with the row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from made_tables import make, written
from PIL import Image

from video_r1.cli import main
from video_r1.data.answers import options_of, split_options
from video_r1.data.manifests.records import load_manifest
from video_r1.evaluation.ask import question_sample
from video_r1.settings.decoding import AskSettings

# --- layouts of other trainers ---------------------------------------------------------------------

CUP, SIGN = "cup.mp4", "sign.png"
SAID = {"from": "gpt", "value": "grey"}


def asked(text: str, *reply: dict[str, str], who: str = "human") -> list[dict[str, str]]:
    return [{"from": who, "value": text}, *(reply or [SAID])]


LAYOUTS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "ms-swift, query and response": (
        [
            {"query": "<image>Which?\n\nOptions:\nA) left\nB) all", "response": "<answer>B</answer>",
             "images": [SIGN]},
            {"query": "<video>Which?", "response": "<think>It rolls.</think><answer>a ball</answer>",
             "videos": [CUP]},
            {"query": "What is 2+2?", "response": "4", "images": [], "history": []},
        ],
        [
            {"problem": "Which?", "options": ["A. left", "B. all"], "solution": "<answer>B</answer>",
             "path": SIGN, "data_type": "image"},
            {"problem": "Which?", "process": "<think>It rolls.</think>", "path": CUP,
             "solution": "<answer>a ball</answer>", "data_type": "video"},
            {"problem": "What is 2+2?", "data_type": "text", "solution": "<answer>4</answer>"},
        ],
    ),
    "LLaMA-Factory, sharegpt": (
        [
            {"images": [SIGN], "conversations": asked("<image>\nColour?"), "system": "Be brief."},
            {"videos": [CUP], "conversations": [
                {"from": "system", "value": "Be brief."}, *asked("<video>Who?")]},
            {"conversations": asked("Capital of France?")},
            {"videos": [CUP], "conversations": [{"role": "user", "content": "<video>Who?"},
                                                {"role": "assistant", "content": "a man"}], "tools": "[]"},
        ],
        [
            {"problem": "Colour?", "path": SIGN, "solution": "<answer>grey</answer>", "system": "Be brief."},
            {"problem": "Who?", "path": CUP, "data_type": "video", "system": "Be brief."},
            {"problem": "Capital of France?", "data_type": "text"},
            {"problem": "Who?", "solution": "<answer>a man</answer>", "tools": "[]"},
        ],
    ),
    "LLaMA-Factory, alpaca": (
        [
            {"instruction": "<video>Count.", "input": "The cups.", "output": "3", "videos": [CUP]},
            {"instruction": "<image>Read.", "input": "", "output": "STOP", "images": [SIGN]},
        ],
        [
            {"problem": "Count.\nThe cups.", "problem_type": "numerical", "path": CUP},
            {"problem": "Read.", "path": SIGN, "data_type": "image"},
        ],
    ),
    "LLaVA, lists and text": (
        [
            {"id": 7, "image": [SIGN, SIGN], "conversations": asked("<image>\n<image>\nThe same?")},
            {"id": 8, "video": CUP, "start": 0.5, "end": 1.5, "conversations": asked("<image>\nWhen?")},
            {"id": 9, "conversations": asked("Hello?")},
        ],
        [
            {"problem_id": 7, "path": [SIGN, SIGN], "problem": "<image>\n<image>\nThe same?"},
            {"problem_id": 8, "path": CUP, "start": 0.5, "end": 1.5, "problem": "When?"},
            {"problem_id": 9, "data_type": "text"},
        ],
    ),
    "parts in their order": (
        [{"messages": [{"role": "user", "content": [
            {"type": "video", "video": "a/same.mp4"}, {"type": "text", "text": "first, then"},
            {"type": "video", "video": CUP}, {"type": "text", "text": "Which is longer?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "the first"}]}]},
         {"messages": [{"role": "user", "content": [
             {"type": "video_url", "video_url": {"url": CUP}, "video_start": 0.5},
             {"type": "text", "text": "What?"}]}], "solution": "a cup"}],
        [
            {"path": ["a/same.mp4", CUP], "problem": "<video>\nfirst, then\n<video>\nWhich is longer?"},
            {"path": CUP, "start": 0.5, "problem": "What?", "solution": "<answer>a cup</answer>"},
        ],
    ),
    "one clip twice": (
        [{"messages": [{"role": "user", "content": f"{'<video>' * 2}Equal?"},
                       {"role": "assistant", "content": reply}], "videos": clips}
         for reply, clips in (("yes", [CUP, CUP]), ("no", [CUP, "a/ball.mp4"]))],
        [{"path": [CUP, CUP]}, {"path": [CUP, "a/ball.mp4"], "problem": "<video><video>Equal?"}],
    ),
    "text rows of a manifest": (
        [{"problem": "2+2?", "data_type": "text", "problem_type": "numerical",
          "solution": "<answer>4</answer>", "path": ""},
         {"problem": "Who?", "data_type": "video", "problem_type": "free-form",
          "solution": "<answer>x y</answer>", "path": CUP}],
        [{"problem": "2+2?", "data_type": "text"}, {"problem": "Who?", "path": CUP}],
    ),
    "an image or a video in each row": (
        [{"question": "q", "answer": "yes", "image": "sign"},
         {"question": "q", "answer": "yes", "video": CUP}],
        [{"path": SIGN, "data_type": "image"}, {"path": CUP, "data_type": "video"}],
    ),
    "questions in lists": (
        [{"visual": "cup", "fps": 25, "qa_pairs": [{"question": "q", "answer": "yes"},
                                                   {"question": "p", "answer": "no"}]}],
        [{"problem": "q", "path": CUP, "fps": 25}, {"problem": "p", "path": CUP}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_cases_of_layouts(name: str, shelf: Path, tmp_path: Path) -> None:
    content, expected = LAYOUTS[name]
    rows, refused = make(shelf, written(tmp_path, "t.jsonl", content))
    assert refused == [] and len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert wanted.items() <= row.items()
        assert row["data_type"] != "text" or "path" not in row
    load_manifest(tmp_path / "out.json", shelf)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"conversations": asked("<video>q"), "videos": [CUP, CUP]}, "marks", "its text has <video>"),
    ({"conversations": asked("<video>q<video>"), "videos": [CUP]}, "marks", "<video> <video>"),
    ({"conversations": asked("<video>q")}, "no clip named", "its text has <video>"),
    ({"conversations": asked("<audio>q")}, "no clip named", "its text has <audio>"),
    ({"conversations": asked("q"), "videos": [CUP], "images": [SIGN]}, "several media", "cup.mp4, sign.png"),
    ({"conversations": asked("q"), "videos": [[SIGN, SIGN]]}, "frames", "a list of 2 files"),
    ({"conversations": asked("q", {"from": "function_call", "value": "x"})}, "message", "'function_call'"),
    ({"conversations": [SAID, *asked("q")]}, "several questions", "assistant, user, assistant"),
    ({"conversations": [], "videos": [CUP]}, "no question", "it has no messages"),
    ({"conversations": [{"from": "system", "value": "q"}], "videos": [CUP]}, "no question", "no messages"),
    ({"conversations": asked("q"), "history": [["a", "b"]]}, "several questions", "1 earlier"),
    ({"conversations": [{"from": "human", "value": [{"type": "audio", "audio": "x"}]}, SAID]}, "message",
     "'audio'"),
    ({"conversations": [{"from": "human", "value": [{"type": "video", "video": CUP, "fps": 1}]}, SAID]},
     "message", "a part with fps, which is not read"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "no answer", "no answer"),
    ({"conversations": asked("q"), "answer": ["one", "two"]}, "several answers", "['one', 'two']"),
    ({"conversations": asked("q"), "answer": [[0, 1], [2, 3]], "problem_type": "temporal grounding",
      "videos": [CUP]}, "several answers", "[[0, 1], [2, 3]]"),
]  # fmt: skip


def test_cases_of_chats_that_are_refused(shelf: Path, tmp_path: Path) -> None:
    good = {"conversations": asked("q"), "videos": [CUP]}
    rows, refused = make(shelf, written(tmp_path, "t.jsonl", [good, *(row for row, _, _ in REFUSED)]))
    assert len(rows) == 1
    for line, (number, (_, reason, found)) in zip(refused, enumerate(REFUSED, start=2), strict=True):
        assert (line["row"], line["reason"]) == (number, reason) and found in line["found"]


# --- the user's own table: words for columns and types, empty columns ------------------------------

OWN = """Nr;Type;Video;From;To;Question;Option A;Option B;Option C;Answer;Empty;;
1;multiple choice;cup;0:00;0:01;What?;he cooks;he leaves;;he leaves;;;
2;yes/no;ball;;;Is it a ball?;;;;yes;;;
3;count;ball;0.5;1.5;How many?;;;;1;;;
4;count;ball;;;How many?;one;two;;two;;;
5;open;ball;;;What?;;;;a red dot;;;
6;true/false;ball;;;It moves.;;;;TRUE;;;
7;other;ball;;;What?;;;;a ball;;;
8;essay;ball;;;Tell.;;;;a b;;;
9;yes/no;ball;;;Maybe?;;;;perhaps;;;
10;count;ball;;;How many?;;;;many;;;
11;open;ball;later;;What?;;;;a b;;;
"""
TASKS = "video,question,answer,type,from,to\ncup,q,a b,CW,Ann,Bob\ncup,q,a b,TC,Bob,Ann\n"


def test_cases_of_own_words(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, refused = make(shelf, written(tmp_path, "t.csv", OWN))
    assert [(row["Nr"], row["problem_type"], row["solution"][8:-9]) for row in rows] == [
        ("1", "multiple choice", "B"), ("2", "multiple choice", "A"), ("3", "numerical", "1"),
        ("4", "multiple choice", "B"), ("5", "free-form", "a red dot"), ("6", "multiple choice", "A"),
        ("7", "free-form", "a ball"),
    ]  # fmt: skip
    assert (rows[0]["start"], rows[0]["end"], rows[2]["start"]) == (0, 1, 0.5)
    assert rows[1]["options"] == ["A. Yes", "B. No"] and rows[5]["options"] == ["A. True", "B. False"]
    assert [(line["row"], line["reason"]) for line in refused] == [
        (8, "problem type"), (9, "answer is no option"), (10, "no manifest row"), (11, "times"),
    ]  # fmt: skip
    assert "'essay'" in refused[0]["found"] and "'perhaps'" in refused[1]["found"]
    said = capsys.readouterr().out
    assert "kept as they are: Nr\n" in said and "['A. Yes', 'B. No']: 1 (rows 2)" in said
    (tmp_path / "out.json").unlink()
    rows, _ = make(shelf, written(tmp_path, "t.csv", TASKS))  # here these are no types and no times
    assert rows[0]["type"] == "CW" and "start" not in rows[0]
    assert "kept as they are: type, from, to" in capsys.readouterr().out


PAIR = "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a b'}]"
QUESTION = '{"question": "q", "answer": "a b", "video": "cup"}'
FILES: list[tuple[str, str | bytes, int, str]] = [
    ("sep.csv", "sep=;\nquestion;answer;video\nq;a b;cup\n", 0, "1 questions from 1 rows"),
    ("chat.csv", f'messages,videos\n"{PAIR}","[\'cup\']"\n', 0, "layout: swift"),
    ("all.json", f'{{"info": {{"v": 1}}, "clips": [{{"id": 1}}], "qa": [{QUESTION}]}}', 0,
     "not repeated beside each: clips, info, qa"),
    ("t.xlsx", b"PK\x03\x04", 2, "save it as CSV"),
    ("wide.csv", "question,answer,video\nq,a b,cup\n".encode("utf-16"), 2, "iconv -f utf-16"),
    ("quote.csv", 'question,answer,video\nq,a b,cup\n"p,c d,cup\nr,e f,cup\n', 2, "row 2 cannot be read"),
    ("head.csv", "cup.mp4,What?,a cup\na/ball.mp4,What?,a ball\n", 2, "its first line names cup.mp4"),
    ("cut.json", f'[{QUESTION}, {{"question"', 2, "nothing after it was read"),
    ("texts.json", '["q", "a"]', 2, "no rows with fields"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "code", "said"), FILES, ids=[file[0] for file in FILES])
def test_cases_of_table_files(
    name: str, content: Any, code: int, said: str, shelf: Path, tmp_path: Path, capsys: Any
) -> None:
    """A table that cannot be read to its end makes no manifest."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out.json"
    assert main(["data", "make", str(tmp_path / name), "--media_root", str(shelf), "--out", str(out)]) == code
    assert said in "".join(capsys.readouterr()) and out.exists() == (code == 0)
    if code == 0:
        (row,) = json.loads(out.read_text())
        assert (row["solution"], row["path"]) == ("<answer>a b</answer>", CUP) and "info" not in row


# --- options in the question -----------------------------------------------------------------------

SPLIT = [
    ("Colour?A.red.B.blue.C.green", "B", "Colour?", ["red", "blue", "green"]),
    ("Colour?\nA. red\n\nB. blue", "B", "Colour?", ["red", "blue"]),
    ("Colour?\na) red\nb) blue", "b", "Colour?", ["red", "blue"]),
    ("Colour?\n1) red\n2) blue", "2", "Colour?", ["red", "blue"]),
    ("颜色？\nA、红\nB、蓝", "B", "颜色？", ["红", "蓝"]),
    ("颜色？（A）红；（B）蓝。", "（B）", "颜色？", ["红", "蓝"]),
    ("颜色？A：红 B：蓝。请选择", "蓝", "颜色？", ["红", "蓝"]),
    ("Colour? A. red B. blue", "A", "Colour?", ["red", "blue"]),
    ("Is it (A) red, (B) blue, or (C) green?", "(C) green", "Is it", ["red", "blue", "green"]),
    ("Colour? A) red; B) blue; C) green", "c", "Colour?", ["red", "blue", "green"]),
    ("Colour? [A] red [B] blue. Answer with the letter.", "B", "Colour?", ["red", "blue"]),
    ("How many? A.5 B.7", "B", "How many?", ["5", "7"]),
    ("Where? A. U.S.A. B. E.U.", "A", "Where?", ["U.S.A.", "E.U."]),
    ("A. red\nB. blue\nWhich one?", "", "Which one?", ["red", "blue"]),
    ("Who are A. Smith and B. Jones?", "singers", "Who are A. Smith and B. Jones?", []),
    ("At 1:30 or at 2:30?", "1:30", "At 1:30 or at 2:30?", []),
    ("Rate it. 1. Bad things 2. Good things", "it moves", "Rate it. 1. Bad things 2. Good things", []),
]  # fmt: skip


@pytest.mark.parametrize(("question", "answer", "asks", "options"), SPLIT)
def test_cases_of_options_in_the_question(question: str, answer: str, asks: str, options: list[str]) -> None:
    before, found = split_options(question, answer)
    assert (before, [option[3:] for option in options_of(found)]) == (asks, options)


OPTIONS: list[tuple[Any, Any, str | None]] = [
    ([{"choice_id": 0, "choice": "red"}, {"choice_id": 1, "choice": "blue"}], "blue", "B"),
    ({"1": "red", "2": "blue"}, "blue", "B"), ({"B": "blue", "A": "red", "C": None}, "B", "B"),
    (["1. red", "2. blue"], "red", "A"), ("A、red B、blue", "b) blue", "B"), ("A) red; B) blue", "B", "B"),
    ({"A": "", "B": ""}, "it is blue", None), ([], "it is blue", None),
]  # fmt: skip


def test_cases_of_options_and_bare_letters(shelf: Path, tmp_path: Path) -> None:
    """An answer that is a bare letter needs options, unless the row's type says otherwise."""
    good = [
        {"question": "q", "video": CUP, "options": given, "answer": answer} for given, answer, _ in OPTIONS
    ]
    good += [{"question": "Which letter?", "video": CUP, "answer": "B", "problem_type": "OCR"}]
    bad = [
        {"question": question, "video": CUP, "answer": answer}
        for question, answer in (("Colour?\nred\nblue", "B"), ("Colour?", "(b)"), ("q", "Ｃ."), ("q", "A, C"))
    ]
    rows, refused = make(shelf, written(tmp_path, "t.json", [*good, *bad]))
    letters = [f"<answer>{letter or answer}</answer>" for _, answer, letter in OPTIONS]
    assert [row["solution"] for row in rows] == [*letters, "<answer>B</answer>"]
    assert [line["reason"] for line in refused] == ["letter without options"] * len(bad)


# --- files -----------------------------------------------------------------------------------------


def test_cases_of_file_names(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files without extension, with a letter before a colon, with a prefix, and beside their thumbnail."""
    for name in ("clip_0001", "x:y.mp4", "a::b.mp4", "deep/er/9f3c", "v_abc.mp4", "video6513.mp4"):
        (shelf / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shelf / CUP, shelf / name)
    shutil.copy(shelf / SIGN, shelf / "cup.png")
    shutil.copy(shelf / SIGN, shelf / "picture")
    try:
        names = ["clip_0001", "x:y.mp4", "a::b.mp4", "9f3c", "abc", 6513, "cup", '["cup.mp4", "ball"]']
        content: list[dict[str, Any]] = [{"question": "q", "answer": "yes", "video": name} for name in names]
        content.append({"question": "q", "answer": "yes", "image": "picture"})
        rows, refused = make(shelf, written(tmp_path, "t.json", content))
        found = ["clip_0001", "x:y.mp4", "a::b.mp4", "deep/er/9f3c", "v_abc.mp4", "video6513.mp4", CUP]
        assert [row["path"] for row in rows] == [*found, [CUP, "a/ball.mp4"], "picture"] and refused == []
        assert rows[-1]["data_type"] == "image"
        assert "another name than in the table: 2 (such as v_abc.mp4 for 'abc')" in capsys.readouterr().out
        rows = [{**rows[0], "path": path} for path in ("C:\\x.mp4", "C:/x.mp4", "\\\\host\\x.mp4")]
        written(tmp_path, "m.json", [{**row, "problem_id": n} for n, row in enumerate(rows)])
        assert main(["data", "check", str(tmp_path / "m.json"), "--media_root", str(shelf)]) == 1
        assert capsys.readouterr().out.count("is absolute") == 3
    finally:
        for name in ("clip_0001", "x:y.mp4", "a::b.mp4", "v_abc.mp4", "video6513.mp4", "cup.png", "picture"):
            (shelf / name).unlink()
        shutil.rmtree(shelf / "deep")


def test_cases_of_animations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GIF that moves is a clip, one that does not an image, other animations are refused: by `data make`,
    `data check` and `ask` alike."""
    first, *others = (Image.new("RGB", (56, 56), (shade, 0, 0)) for shade in (0, 90, 200))
    for name in ("moves.gif", "moves.png", "moves.webp"):
        first.save(tmp_path / name, save_all=True, append_images=others, duration=500)
    first.save(tmp_path / "still.gif")
    first.save(tmp_path / "still.webp")
    names = {"moves.gif": "video", "still.gif": "image", "still.webp": "image"}
    content = [{"question": "q", "answer": "yes", "file": path.name} for path in sorted(tmp_path.iterdir())]
    rows, refused = make(tmp_path, written(tmp_path, "t.json", content))
    assert {row["path"]: row["data_type"] for row in rows} == names
    assert [line["found"].partition(" is an animation of 3 frames")[2] != "" for line in refused] == [
        True
    ] * 2
    for name in ("moves.gif", "moves.png", "moves.webp", "still.gif"):
        asks = question_sample(AskSettings(path=str(tmp_path / name), model="m", question=["q"]), "q")
        assert asks.data_type == names.get(name, "image")
        written(tmp_path, "m.json", [{**rows[0], "path": name, "data_type": asks.data_type}])
        assert main(["data", "check", str(tmp_path / "m.json")]) == (name not in names)
    (line,) = {line for line in capsys.readouterr().out.splitlines() if "moves.png" in line}
    assert "save" in line and "as a video (MP4 or GIF" in line
    with Image.open(tmp_path / "moves.png") as picture:  # what the message says
        picture.save(tmp_path / "moves.gif", save_all=True)
    written(tmp_path, "m.json", [{**rows[0], "path": "moves.gif", "data_type": "video"}])
    assert main(["data", "check", str(tmp_path / "m.json")]) == 0


@pytest.mark.parametrize("several", [False, True])
def test_cases_of_data_sets_saved_to_disk(several: bool, shelf: Path, tmp_path: Path, capsys: Any) -> None:
    row = {
        "problem": "q",
        "data_type": "video",
        "problem_type": "free-form",
        "solution": "<answer>x y</answer>",
    }
    made = datasets.Dataset.from_list([{**row, "problem_id": 1, "path": CUP}])
    shutil.copy(shelf / CUP, tmp_path / CUP)
    saved = tmp_path / "saved"
    (datasets.DatasetDict({"test": made}) if several else made).save_to_disk(str(saved))
    if several:  # the message's remedy is the split's folder
        assert main(["data", "check", str(saved)]) == 2 and "its folder" in capsys.readouterr().err
        saved = saved / "test"
    assert [Path(sample.path) for sample in load_manifest(saved)] == [tmp_path / CUP]
    rows, _ = make(tmp_path, saved)
    assert rows[0]["path"] == CUP and json.loads((saved.parent / "out.json").read_text()) == rows
