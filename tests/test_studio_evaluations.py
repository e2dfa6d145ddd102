"""Two evaluations side by side in the studio: figures over the questions of both, and who wins which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_lines

pytest.importorskip("starlette", reason="the extra studio is not installed")
from studio_server import get, studio_client

from video_r1.data.manifests.records import question_digest


def predictions(folder: Path, right: range, questions: range = range(20)) -> None:
    said = f"<answer>{folder.name}"
    lines = [
        {
            "problem_id": i, "order": order, "output": f"{said} {i}</answer>", "answer": str(i),
            "score": float(i in right) if order == "ordered" else 0.0, "problem_type": "numerical",
            "data_type": "video", "data_source": "lab", "task_type": ("count", "speed")[i % 2], "tokens": 7,
            "finish_reason": "stop", "strict_score": 0.0, "format": True, "prediction": "",
        }
        for order in ("ordered", "shuffled")
        for i in questions
    ]  # fmt: skip
    write_lines(folder / "predictions-8.jsonl", lines)


def direct(folder: Path) -> None:
    """The same questions answered without reasoning: half of the right ones, in two tokens."""
    lines = [json.loads(line) for line in (folder / "predictions-8.jsonl").read_text().splitlines()]
    half = [line | {"score": line["score"] * (line["problem_id"] % 2), "tokens": 2} for line in lines]
    write_lines(folder / "direct-8.jsonl", half)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    predictions(tmp_path / "sft", range(0, 8))
    predictions(tmp_path / "rl", range(4, 18), range(1, 20))
    row = {"problem": "How many?", "data_type": "video", "problem_type": "numerical", "path": "1.mp4"}
    rows = [row | {"problem_id": i, "solution": f"<answer>{i}</answer>"} for i in range(20)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    others = [row | {"problem_id": i, "solution": "<answer>99</answer>"} for i in range(20)]
    (tmp_path / "other.json").write_text(json.dumps(others))
    return tmp_path


def test_two_evaluations_side_by_side(folder: Path) -> None:
    with studio_client(folder) as client:
        assert [item["name"] for item in get(client, "/api/evaluations")["evaluations"]] == ["rl", "sft"]
        found = get(client, "/api/versus", left="sft", right="rl")
        assert found["frames"] == ["8"] and found["orders"] == ["ordered", "shuffled"]
        whole, ordered, shuffled, count, speed = found["rows"]
        assert (whole["questions"], whole["left_wins"], whole["right_wins"]) == (
            19,
            3,
            10,
        )  # 0 is in one only
        assert whole["left"]["mean"] == pytest.approx(7 / 19)
        assert whole["right"]["mean"] == pytest.approx(14 / 19)
        by = whole["difference"]  # right minus left: an improvement is positive
        assert by["mean"] == pytest.approx(7 / 19) and by["low"] < by["mean"] < by["high"]
        assert (count["name"], count["questions"], speed["name"]) == ("count", 9, "speed")
        assert ordered | {"group": "", "name": ""} == whole | {"gaps": [None, None]}
        assert whole["tokens"] == [7, 7]
        assert (shuffled["group"], shuffled["name"], shuffled["right_wins"]) == ("order", "shuffled", 0)
        assert [gap["mean"] for gap in shuffled["gaps"]] == pytest.approx([7 / 19, 14 / 19])
        assert all(gap["low"] < gap["mean"] < gap["high"] for gap in shuffled["gaps"])
        row, *_ = get(client, "/api/versus", left="sft", right="rl", order="shuffled")["rows"]
        assert row["right_wins"] == 0
        pair = {"left": "sft", "right": "rl"}
        won = get(client, "/api/questions", **pair)
        assert won["total"] == 10 and [item["id"] for item in won["shown"]][:2] == ["8", "9"]
        first = won["shown"][0]
        assert first["left"]["text"] == "<answer>sft 8</answer>"
        assert first["right"]["text"] == "<answer>rl 8</answer>"
        assert (first["row"]["manifest"], first["row"]["row"]) == ("test.json", 8)  # by its answer
        lost = get(client, "/api/questions", **pair, who="left", group="task", name="speed")
        assert [item["id"] for item in lost["shown"]] == ["1", "3"]
        assert get(client, "/api/questions", **pair, group="order", name="shuffled")["total"] == 0
        gone = client.get("/api/versus", params={"left": "../rl", "right": "sft"})
        assert gone.status_code == 404 and "no such evaluation" in gone.json()["error"]


def test_one_evaluation_in_order_against_shuffled(folder: Path) -> None:
    """Its page: the difference is the temporal gap; questions by where they are answered right."""
    own = {"left": "rl", "right": "rl", "against": "shuffled"}
    with studio_client(folder) as client:
        whole, count, speed = get(client, "/api/versus", **own)["rows"]
        assert (whole["questions"], whole["left"]["mean"]) == (19, 0.0)
        assert whole["difference"]["mean"] == whole["right"]["mean"] == pytest.approx(14 / 19)
        assert (count["name"], speed["name"]) == ("count", "speed")
        totals = [
            get(client, "/api/questions", **own, who=who)["total"]
            for who in ("right", "left", "both", "neither")
        ]
        assert totals == [14, 0, 0, 5]


def test_whose_clip_it_is(tmp_path: Path) -> None:
    """Manifests that all count from 1: an answer that another one begins with, another text, another clip."""
    row = {"problem_id": 1, "problem": "How many?", "data_type": "video", "problem_type": "multiple choice"}
    row |= {"options": ["A. 1", "B. 10"], "solution": " <answer>B. 10</answer>", "path": "shelf/7.mp4"}
    rows = {
        "a": row | {"options": [], "problem_type": "free-form", "solution": "<answer>Both</answer>"},
        "b": row | {"problem": "How many more?"},
        "c": row | {"path": "shelf/8.mp4"},
        "d": row,
        "e": row | {"pass_rates": {"blind": 0.5}},
        "f": row | {"start": 1.0},
    }
    for name in "abcde":
        (tmp_path / f"{name}.json").write_text(json.dumps([rows[name]]))
    run = {"step": 1, "frames": {}, "answer": "B", "path": "elsewhere/7.mp4"}
    write_lines(tmp_path / "run" / "rollouts.jsonl", [row | run])
    facts = (row["problem"], row["options"], "B", ["/elsewhere/7.mp4"])
    with studio_client(tmp_path) as client:

        def row_of(**said: Any) -> Any:
            for side, score in (("left", 1.0), ("right", 0.0)):
                line = {"problem_id": 1, "order": "ordered", "output": "", "answer": "B", "score": score}
                write_lines(tmp_path / side / "predictions-8.jsonl", [line | said])
            return get(client, "/api/questions", left="right", right="left")["shown"][0]["row"]

        found = row_of(question=question_digest(*facts))
        assert (found["manifest"], found["options"], found["others"]) == ("d.json", row["options"], 0)
        assert row_of(question=question_digest("Another?", *facts[1:])) is None
        found = row_of()  # of an older version
        assert (found["manifest"], found["problem"], found["others"]) == ("b.json", "How many more?", 2)
        assert row_of(answer="Bo") is None and row_of(answer="Both")["manifest"] == "a.json"

        place = {"run": "run", "at": 0, "life": get(client, "/api/entries", run="run")["life"]}
        clip = get(client, "/api/group", **place)["clip"]
        assert (clip["manifest"], clip["others"]) == ("d.json", 0)
        (tmp_path / "d.json").unlink()  # what is left has the same clip
        (tmp_path / "shelf").mkdir()
        (tmp_path / "shelf" / "7.mp4").write_bytes(b"0")
        (tmp_path / "f.json").write_text(json.dumps([rows["f"]]))  # and a part of it
        client.app.state.library.files.renew()  # type: ignore[attr-defined]
        clip = get(client, "/api/group", **place)["clip"]
        assert (clip["manifest"], clip["others"]) == ("e.json", 1)


def test_benchmarks_of_two_checkpoints(tmp_path: Path) -> None:
    for model, right in (("a", range(10)), ("b", range(5))):
        for benchmark in ("mvbench", "vsibench"):
            predictions(tmp_path / model / benchmark, right)
        (tmp_path / model / "summary.json").write_text('{"benchmarks": {}}')
    predictions(tmp_path / "b" / "mmvu", range(5))
    for name in ("eval-sft", "eval-rl"):  # evaluations beside each other are not one
        predictions(tmp_path / "demo" / name, range(5))
    (tmp_path / "demo" / "summary.json").write_text('{"seconds": {}}')
    direct(tmp_path / "a" / "mvbench")
    with studio_client(tmp_path) as client:
        listed = get(client, "/api/evaluations")["evaluations"]
        names = {item["name"]: item["benchmarks"] for item in listed}
        assert names["a/"] == ["mvbench", "vsibench"] and len(names["b/"]) == 3
        assert names["a/mvbench"] == [""] and "demo/" not in names
        assert "a/mvbench (direct)" in names and "a/ (direct)" not in names  # of one benchmark alone
        found = get(client, "/api/versus", left="a/", right="b/")
        assert found["benchmarks"] == ["mvbench", "vsibench"]
        assert [row["left_wins"] for row in found["rows"] if not row["group"]] == [5, 5]
        with (tmp_path / "a" / "vsibench" / "predictions-8.jsonl").open("a") as file:  # it goes on
            file.write('{"problem_id": 30, "order": "ordered", "score": 1.0}\n{"half": ')
        answer = client.get("/api/versus", params={"left": "a/", "right": "b/mmvu"})
        assert answer.status_code == 400 and "different benchmarks" in answer.json()["error"]


def test_question_texts_come_with_the_answers(tmp_path: Path) -> None:
    """Where no manifest below the folders has the question."""
    for name in ("a", "b"):
        predictions(tmp_path / name, range(3 if name == "a" else 5), range(5))
    path = tmp_path / "b" / "predictions-8.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [line | {"problem": "How many?", "options": ["A. 3", "B. 4"]} for line in lines])
    with studio_client(tmp_path) as client:
        shown = get(client, "/api/questions", left="a", right="b")["shown"]
        assert {(item["problem"], *item["options"], item["row"]) for item in shown} == {
            ("How many?", "A. 3", "B. 4", None)
        }


def test_direct_answers_stand_beside_reasoned_ones(folder: Path) -> None:
    direct(folder / "rl")
    (folder / "alone").mkdir()
    shutil.copy(folder / "rl" / "direct-8.jsonl", folder / "alone")
    with studio_client(folder) as client:
        names = [item["name"] for item in get(client, "/api/evaluations")["evaluations"]]
        assert names == ["alone (direct)", "rl", "rl (direct)", "sft"]
        whole = get(client, "/api/versus", left="rl", right="rl (direct)")["rows"][0]
        assert (whole["left_wins"], whole["right_wins"], whole["tokens"]) == (7, 0, [7, 2])
        won = get(client, "/api/questions", left="rl", right="rl (direct)", who="left")
        assert [item["right"]["tokens"] for item in won["shown"]] == [2] * 7
        kinds = {run["name"]: run["kind"] for run in get(client, "/api/runs")["runs"]}
        assert kinds["alone"] == "evaluation"


def test_cases_scores_that_are_no_scores(folder: Path) -> None:
    """They are left out and counted, and overflowing sums are no number: the files themselves can be read."""
    with studio_client(folder) as client:
        before = get(client, "/api/versus", left="sft", right="rl")
        assert before["notes"] == []
        path = folder / "rl" / "predictions-8.jsonl"
        line = json.loads(path.read_text().splitlines()[0])
        wrong = [{"problem_id": 2, "score": 1e308}, {"problem_id": 3, "score": -1}, {"order": "sideways"}]
        write_lines(folder / "more.jsonl", [line | each for each in wrong])
        with path.open("a") as file:
            file.write((folder / "more.jsonl").read_text())
        found = get(client, "/api/versus", left="sft", right="rl")
        assert found["rows"] == before["rows"]
        assert found["notes"] == [
            "rl/predictions-8.jsonl: skipped 3 answers without an order of frames or a score from 0 to 1"
        ]
        with path.open("a") as file:
            file.write(json.dumps(line | {"problem_id": 1, "tokens": 1.5e308}) + "\n")
            file.write(json.dumps(line | {"problem_id": 2, "tokens": 1.5e308}) + "\n")
        assert get(client, "/api/versus", left="sft", right="rl")["rows"][0]["tokens"] == [7, None]
