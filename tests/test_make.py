"""`video-r1 data make`: tables as people have them become manifests; what does not says how to mend it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_tables import make, written

from video_r1.cli import main
from video_r1.data.making.drafts import subtitle_lines
from video_r1.data.making.layouts import LAYOUTS, REMEDIES
from video_r1.data.manifests.records import load_manifest

# --- layouts: rows in the form that the published files have -------------------------------------

VIDEO_R1: list[dict[str, Any]] = [
    {
        "problem_id": 2, "problem": "What moves?", "data_type": "video", "problem_type": "multiple choice",
        "options": ["A. a cup", "B. a ball"], "process": "<think>It rolls.</think>",
        "solution": "<answer>B</answer>", "path": "a/ball.mp4", "data_source": "LLaVA-Video-178K/x",
    },
    {
        "problem_id": 3, "problem": "How far?", "data_type": "image", "problem_type": "regression",
        "options": [], "solution": "<answer>2.5</answer>", "path": "sign.png", "data_source": "SR-91k",
    },
]  # fmt: skip
PUBLISHED: dict[str, tuple[str, Any, list[dict[str, Any]]]] = {
    "video-r1": (
        "Video-R1-COT-165k.json",
        [{"process": "", **row, "path": f"./{row['path']}"} for row in VIDEO_R1],
        VIDEO_R1,
    ),
    "onethinker": (
        "onethinker_rl_train.json",
        [{
            "problem_id": 5, "problem": "<video>When does it roll?", "data_type": "video",
            "problem_type": "temporal grounding", "videos": ["./a/ball.mp4"], "images": [],
            "solution": '<answer>{"time": [1.5, 3]}</answer>', "data_source": "x",
        }, {
            "problem_id": 6, "problem": "<image>\nWhere is it?", "data_type": "image",
            "problem_type": "spatial grounding", "images": ["./sign.png"],
            "answer": '<answer>{"boxes": [10, 20, 300, 400]}</answer>',
        }, {
            "problem_id": 7, "problem": "What is it?", "data_type": "image", "problem_type": "open-ended",
            "images": ["./sign.png"], "solution": "<answer>A sign.</answer>",
        }],
        [
            {"problem_id": 5, "problem": "When does it roll?", "problem_type": "temporal grounding",
             "solution": '<answer>{"time": [1.5, 3.0]}</answer>', "path": "a/ball.mp4"},
            {"problem_id": 6, "problem": "Where is it?", "problem_type": "spatial grounding",
             "solution": '<answer>{"boxes": [10.0, 20.0, 300.0, 400.0]}</answer>', "path": "sign.png"},
            {"problem_id": 7, "problem_type": "free-form", "solution": "<answer>A sign.</answer>"},
        ],
    ),
    "llava-video": (
        "0_30_s_youtube_mc_v0_1_qa_processed.json",
        [{
            "id": "ytb_1", "data_source": "0_30_s_youtube_v0_1", "video": "youtube/a/ball.mp4",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat rolls?\nA. a cup\nB. a ball\nPlease respond with "
                                           "only the letter of the correct answer."},
                {"from": "gpt", "value": "B."},
                {"from": "human", "value": "Where does it go?\nA. left\nB. right\nPlease answer."},
                {"from": "gpt", "value": "A. left"},
            ],
        }, {
            "id": "ytb_2", "data_source": "0_30_s_youtube_v0_1", "video": "youtube/cup.mp4",
            "conversations": [{"from": "human", "value": "<image>\nWho is it?"},
                              {"from": "gpt", "value": "A man."}],
        }],
        [
            {"problem_id": "ytb_1-1", "problem": "What rolls?", "problem_type": "multiple choice",
             "options": ["A. a cup", "B. a ball"], "solution": "<answer>B</answer>", "path": "a/ball.mp4"},
            {"problem_id": "ytb_1-2", "problem": "Where does it go?", "solution": "<answer>A</answer>",
             "data_source": "0_30_s_youtube_v0_1"},
            {"problem_id": "ytb_2", "problem": "Who is it?", "problem_type": "free-form",
             "solution": "<answer>A man.</answer>", "path": "cup.mp4", "options": []},
        ],
    ),
    "nextqa": (
        "val.csv",
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        "4010069381,369,640,480,how do they play,0,6,CH,roll it,tap,strum,hit,pat\n"
        "4010069381,369,640,480,how many babies,4,7,DC,kitchen,four,two,three,one\n",
        [
            {"problem_id": "6", "problem": "how do they play", "path": "1164/4010069381.mp4",
             "options": ["A. roll it", "B. tap", "C. strum", "D. hit", "E. pat"], "type": "CH",
             "solution": "<answer>A</answer>"},
            {"problem_id": "7", "solution": "<answer>E</answer>"},
        ],
    ),
    "perception-test": (
        "all_train.json",
        {"video_0": {
            "metadata": {"video_id": "video_0", "split": "train", "frame_rate": 30.0},
            "object_tracking": [],
            "mc_question": [
                {"id": 7, "question": "What is opened?", "options": ["a door", "a cup", "a window"],
                 "answer_id": 1, "area": "semantics", "reasoning": "descriptive",
                 "tag": ["action recognition"]},
                {"id": 9, "question": "How often?", "options": ["2", "1", "0"], "answer_id": 0,
                 "area": "physics", "reasoning": "descriptive", "tag": ["counting"]},
            ],
        }},
        [
            {"problem_id": 7, "problem": "What is opened?", "solution": "<answer>B</answer>",
             "path": "video_0.mkv", "area": "semantics", "tag": ["action recognition"]},
            {"problem_id": 9, "solution": "<answer>A</answer>"},
        ],
    ),
    "swift": (
        "grpo.jsonl",
        [{
            "messages": [{"role": "system", "content": "You are helpful."},
                         {"role": "user", "content": "<video>What rolls?\nA. a cup\nB. a ball"}],
            "videos": ["/elsewhere/data/a/ball.mp4"], "solution": "<answer>B</answer>",
        }, {
            "messages": [{"role": "user", "content": "<image>What is written?"},
                         {"role": "assistant", "content": "<think>Grey.</think>\n<answer>nothing</answer>"}],
            "images": ["sign.png"],
        }],
        [
            {"problem_id": 1, "problem": "What rolls?", "solution": "<answer>B</answer>",
             "path": "a/ball.mp4"},
            {"problem_id": 2, "problem": "What is written?", "process": "<think>Grey.</think>",
             "solution": "<answer>nothing</answer>", "data_type": "image"},
        ],
    ),
    "trl": (
        "trl.jsonl",
        [{
            "prompt": [{"role": "user", "content": [{"type": "video"},
                                                     {"type": "text", "text": "How many?"}]}],
            "videos": ["cup.mp4"], "solution": "3",
        }, {
            "prompt": [{"role": "user", "content": [{"type": "image", "image": "sign.png"},
                                                     {"type": "text", "text": "Which colour?"}]}],
            "completion": [{"role": "assistant", "content": "Grey."}],
        }],
        [
            {"problem": "How many?", "problem_type": "numerical", "solution": "<answer>3</answer>"},
            {"problem": "Which colour?", "solution": "<answer>Grey.</answer>", "path": "sign.png"},
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_layouts(
    layout: str, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, expected = PUBLISHED[layout]
    rows, refused = make(shelf, written(tmp_path, name, content))
    assert refused == [] and len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert wanted.items() <= row.items()
    if layout == "video-r1":
        assert rows == expected  # nothing but the path is spelled otherwise
    assert (f"layout: {layout} (" in capsys.readouterr().out) == (layout in LAYOUTS)
    assert (
        main(["data", "check", str(tmp_path / "out.json"), "--media_root", str(shelf), "--workers", "1"]) == 0
    )


# --- refusals ------------------------------------------------------------------------------------

GOOD = {"question": "q", "answer": "yes", "video": "cup"}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"question": " "}, "no question", "there is no question"),
    ({"answer": None}, "no answer", "there is no answer"),
    ({"video": None}, "no clip named", "no file name"),
    ({"video": "cupp"}, "no such clip", "near it: cup.mp4"),
    ({"video": "same"}, "several clips", "a/same.mp4, b/same.mp4"),
    ({"video": "https://host/x.mp4"}, "clip elsewhere", "allow_urls"),
    ({"options": ["red"]}, "options", "there are 1 options"),
    ({"options": ["red", ""]}, "options", "one of the options is empty"),
    ({"options": [str(n) for n in range(27)]}, "options", "there are 27 options"),
    ({"options": ["red", "blue"]}, "answer is no option", "'yes' names none"),
    ({"problem_type": "essay"}, "problem type", "the type is 'essay'"),
    ({"problem_type": "mcq"}, "options", "without options"),
    ({"start": "soon"}, "times", "the time 'soon'"),
    ({"start": 3, "end": 2}, "no manifest row", "the window ends (2 s) before it starts"),
    ({"problem_type": "numerical"}, "no manifest row", "must be a finite number"),
    ({"video": "broken"}, "media", "not a video"),
    ({"start": 10}, "media", "its window starts at 10 s"),
]


def test_a_refused_row_says_what_was_found_and_how_to_mend_it(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [GOOD | {"id": f"bad-{number}"} | change for number, (change, _, _) in enumerate(BAD)]
    table = written(tmp_path, "t.json", [GOOD | {"id": "good"}, *bad])
    rows, refused = make(shelf, table)
    assert [row["problem_id"] for row in rows] == ["good"]
    said = capsys.readouterr().out
    for number, (line, (_, reason, found)) in enumerate(zip(refused, BAD, strict=True)):
        assert (line["row"], line["problem_id"], line["reason"]) == (number + 2, f"bad-{number}", reason)
        assert found in line["found"] and line["remedy"] == REMEDIES[reason]
        assert f"{reason}: {REMEDIES[reason]}" in said
    assert make(shelf, table, "--strict", code=1)[0] == rows


def test_rows_that_cannot_be_read(shelf: Path, tmp_path: Path) -> None:
    table = written(tmp_path, "t.csv", "question,answer,video\nq,yes,cup\nq,yes,cup,more\n")
    rows, (line,) = make(shelf, table)
    assert len(rows) == 1 and (line["row"], line["found"]) == (2, "it has 4 cells, and the header 3")
    table = written(tmp_path, "t.jsonl", json.dumps(GOOD) + "\n{broken\n[1]\n")
    _, refused = make(shelf, table)
    assert [(line["row"], line["reason"]) for line in refused] == [
        (2, "unreadable row"),
        (3, "unreadable row"),
    ]


def test_a_table_that_is_not_utf8_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("question,answer,video\nq,yes,cup\nq,Müller,cup\n".encode("cp1252"))
    assert main(["data", "make", str(table), "--out", str(tmp_path / "out.json")]) == 2
    assert "line 3, column 4 is not UTF-8" in capsys.readouterr().err


def test_conversations_that_are_no_question(shelf: Path, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "q"}]
    good = {"messages": asked, "videos": ["cup"], "solution": "yes"}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"messages": asked, "videos": ["cup"], "images": ["sign"]}, "several media"),
        ({"messages": asked * 2, "videos": ["cup"]}, "several questions"),
        ({"messages": asked, "images": [{"bytes": "x"}]}, "media inside the table"),
        ({"messages": ["q"]}, "unreadable row"),
        ({"messages": [{"role": "user", "content": 3}], "videos": ["cup"]}, "unreadable row"),
        ({"question": "q"}, "unreadable row"),
    ]
    table = written(tmp_path, "t.jsonl", [good, *({"solution": "x", **row} for row, _ in bad)])
    rows, refused = make(shelf, table)
    assert len(rows) == 1
    assert [(line["row"], line["reason"]) for line in refused] == list(
        enumerate((reason for _, reason in bad), start=2)
    )


def test_what_is_there_is_not_lost(shelf: Path, tmp_path: Path) -> None:
    """A file of another kind is not written over, nor is a manifest by one without a question."""
    table, out = written(tmp_path, "t.json", [GOOD]), tmp_path / "out.json"
    request = ["data", "make", str(table), "--media_root", str(shelf), "--out", str(out)]
    out.write_text("mine")
    assert main(request) == 2 and out.read_text() == "mine"
    assert main(["data", "make", str(table), "--media_root", str(shelf), "--out", str(table)]) == 2
    out.unlink()
    rows, _ = make(shelf, table)
    make(shelf, written(tmp_path, "t.json", [GOOD | {"video": "none"}]), code=1)
    assert json.loads(out.read_text()) == rows
    assert not list(tmp_path.glob(".*.partial"))
    for name, said in (("none.csv", 2), ("empty.csv", 2)):
        (tmp_path / "empty.csv").write_text("question,answer\n")
        assert main(["data", "make", str(tmp_path / name), "--out", str(tmp_path / "x.json")]) == said


def test_holdout_by_clip(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No clip is on both sides, whatever window or list it is in; other rows do not change sides."""
    clips = ["cup", "ball", "a/same", "b/same", "4010069381", "video_0", ["a/same", "b/same"], "sign"]
    content = [
        {"question": f"q{n}", "answer": "yes", "video": clip, **({} if n < 8 else {"start": 0.5})}
        for n, clip in enumerate([*clips, "cup", "ball", "video_0"])
    ]
    table, held_path = written(tmp_path, "t.json", content), tmp_path / "held-out.json"
    rows, _ = make(shelf, table, "--holdout", "0.4")
    held = json.loads(held_path.read_text())
    sides = [
        {path for row in side for path in (row["path"] if isinstance(row["path"], list) else [row["path"]])}
        for side in (rows, held)
    ]
    assert sides[0].isdisjoint(sides[1]) and len(rows) + len(held) == len(content) and 1 <= len(held) <= 4
    assert f"--train_manifest {tmp_path / 'out.json'} --eval_manifest {held_path}" in capsys.readouterr().out
    make(shelf, table, "--holdout", "0.4")  # again: the same
    assert json.loads(held_path.read_text()) == held
    assert make(shelf, table, "--holdout", "0.001")[0] and len(json.loads(held_path.read_text())) == 1
    other = ["data", "make", str(table), "--media_root", str(shelf), "--holdout", "0.4", "--out"]
    for out, said in (
        (tmp_path / "new.json", "exists"),
        (tmp_path / "x" / "held-out.json", "where --holdout"),
    ):
        assert main([*other, str(out)]) == 2 and said in capsys.readouterr().err and not out.exists()
    table = written(tmp_path, "t.json", content[:1])
    assert main([*other, str(tmp_path / "out.json")]) == 2
    assert "all questions are about the same clips" in capsys.readouterr().err


# --- subtitles -----------------------------------------------------------------------------------

SRT = (
    "1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>Hello</i>\r\nthere.\r\n\r\n"
    "2\r\n00:01:05,250 --> 00:01:07,000\r\n{\\an8}Bye.\r\n\r\nno cue\r\n"
)


@pytest.mark.parametrize(
    ("window", "timed", "lines"),
    [
        ({}, True, "0:01 Hello there.\n1:05 Bye."), ({}, False, "Hello there.\nBye."),
        ({"start": 2.0}, True, "0:00 Hello there.\n1:03 Bye."), ({"start": 3.0, "end": 60.0}, True, ""),
        ({"end": 60.0}, True, "0:01 Hello there."),
    ],
)  # fmt: skip
def test_subtitles_of_a_window(window: dict[str, float], timed: bool, lines: str) -> None:
    assert subtitle_lines(SRT, timed, **window) == lines


def test_rolling_captions_are_said_once() -> None:
    text = "WEBVTT\n\n00:01.000 --> 00:02.000\none\n\n00:02.000 --> 00:03.000 align:start\none\n<c>two</c>\n"
    assert subtitle_lines(text, False) == "one\ntwo"


def test_subtitles_beside_the_clip_or_from_a_column(shelf: Path, tmp_path: Path) -> None:
    made = [
        GOOD,
        GOOD | {"video": "ball"},
        GOOD | {"video": "sign.png"},
        GOOD | {"subtitles": "He says yes."},
    ]
    made += [
        GOOD | {"video": "sign.png", "subtitles": "cup.srt"},
        GOOD | {"start": 1.5},
        GOOD | {"subtitles": "no.srt"},
    ]
    table = written(tmp_path, "t.json", made)
    rows, (line,) = make(shelf, table, "--subtitles", "timed")
    said = ["0:00 Look here.", "0:01 It rolls.", None, "He says yes.", "0:00 Look here.", None]
    assert [row.get("subtitles") for row in rows] == said
    assert line["reason"] == "subtitles" and "UTF-8" in line["remedy"]
    assert load_manifest(tmp_path / "out.json", shelf)[0].subtitles == "0:00 Look here."
    rows, refused = make(shelf, table)
    assert refused == [] and not any("subtitles" in row for row in rows)
