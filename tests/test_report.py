"""The report: what it reads, how much it holds, and that its values stay values."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from report_runs import (
    HOSTILE,
    data_of,
    plain_frames,
    write_controls,
    write_evaluation,
    write_hostile_run,
    write_lines,
    write_looks,
    write_rl_run,
)

from video_r1.cli import main
from video_r1.errors import RequestError
from video_r1.evaluation.question_loop import append_records
from video_r1.evaluation.summary import summarise
from video_r1.files import append_line, claimed, replace_text
from video_r1.report.page import build_report, duration, embed, page_data
from video_r1.report.run_data import read_groups, read_run
from video_r1.report.values import as_json
from video_r1.settings.frames import CONTROLS
from video_r1.training.recording import save_strip


def test_series_of_a_resumed_and_killed_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 2.0, "loss": 3.0, "reward/accuracy": 0.25}\n'
        '{"step": 2, "time": 4.0, "loss": NaN, "kl": null, "name": "text", "flag": true}\n'
        '{"step": 3, "loss": 1.0}\n{"step": 3, "time": 9.5, "loss": 2.0}\n'
        f'{{"step": 4, "loss": {"9" * 400}}}\n' + "[" * 5000 + '\n"text"\n{"step": 5, "lo'
    )
    run = read_run(tmp_path, tmp_path)
    assert (run.points["steps"], run.points["times"]) == ([1, 2, 3, 4], [2.0, 4.0, 9.5, 9.5])
    assert run.points["series"] == {
        "loss": [3.0, None, 2.0, None], "reward/accuracy": [0.25, None, None, None], "kl": [None] * 4
    }  # fmt: skip
    assert run.points["bad"] == {"loss": 1, "kl": 1}
    assert run.notes == ["metrics.jsonl: 3 unreadable lines skipped", "metrics.jsonl: kl was never finite"]


def test_strips_outside_the_run_or_of_another_kind_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    good = save_strip(plain_frames(10, 20), run / "frames" / "a.jpg")
    (tmp_path / "private.jpg").write_bytes((run / "frames" / "a.jpg").read_bytes())
    (run / "frames" / "text.jpg").write_text("not a picture")
    (run / "frames" / "link.jpg").symlink_to(tmp_path / "private.jpg")
    names = [
        "frames/a.jpg",
        "../private.jpg",
        str(tmp_path / "private.jpg"),
        "frames/link.jpg",
        "frames/text.jpg",
        "frames",
        "frames/none.jpg",
        "nul\0",
        5,
        None,
    ]
    write_lines(
        run / "rollouts.jsonl",
        [{"step": i, "problem_id": i, "frames": good | {"strip": name}} for i, name in enumerate(names)],
    )
    groups, total = read_groups(read_run(run, run), 10**6)
    assert total == len(groups) == len(names)
    assert [group["strip"] is not None for group in groups] == [True] + [False] * (len(names) - 1)


def test_groups_with_fields_of_wrong_types_do_no_harm(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "rollouts.jsonl",
        [
            {
                "step": "x",
                "problem_id": [1],
                "options": "A",
                "frames": [],
                "permutation": [0, 9],
                "ordered": ["text", {}],
            },
            {
                "step": 1e999,
                "problem": {"a": 1},
                "frames": {"count": 2, "strip": ".."},
                "ordered": None,
                "p": "high",
            },
        ],
    )
    groups, total = read_groups(read_run(tmp_path, tmp_path), 10**6)
    assert total == 2
    assert groups[0]["ordered"] == [
        {"text": "", "tokens": None, "truncated": False, "rewards": {}, "total": None, "advantage": None}
    ]
    json.loads(embed(groups))


def test_places_are_read_tolerantly_of_grounding_types_alone(tmp_path: Path) -> None:
    answers = ["<answer>2s to 4s</answer>", "nowhere", "<answer>[[[["]
    record = {
        "step": 1, "problem_type": "temporal grounding", "answer": '{"time": [1, 3]}',
        "ordered": [{"text": text} for text in answers],
    }  # fmt: skip
    write_lines(tmp_path / "rollouts.jsonl", [record, record | {"step": 2, "problem_type": "OCR"}])
    (first, second), _ = read_groups(read_run(tmp_path, tmp_path), 10**6)
    assert first["place"] == {"time": [1.0, 3.0]}
    assert [item.get("place") for item in first["ordered"]] == [{"time": [2.0, 4.0]}, None, None]
    assert "place" not in second and not any("place" in item for item in second["ordered"])


def test_scores_are_over_the_videos_where_there_are_images_too(tmp_path: Path) -> None:
    summary = write_evaluation(tmp_path / "eval-rl", 0.7, 0.3)
    videos = summary["frames"]["8"]["by_modality"]["video"]
    (row,) = page_data(tmp_path / "eval-rl")["scores"]
    assert (row["name"], row["about"], row["orders"]["ordered"]["n"]) == ("rl", "videos", 200)
    assert row["orders"]["ordered"]["mean"] == videos["ordered"]["accuracy"]
    assert [row["gaps"]["shuffled"]["low"], row["gaps"]["shuffled"]["high"]] == videos["temporal_gap"][
        "interval95"
    ]
    assert {part["name"] for part in row["by"]["by_modality"]} == {"video", "image"}


def test_a_demo_s_last_stage_stands_beside_the_one_before_for_each_test(tmp_path: Path) -> None:
    for name, rate in {"tgrpo": 0.7, "tgrpo-lying": 0.6, "grpo-lying": 0.2, "sft": 0.4, "grpo": 0.5}.items():
        write_evaluation(tmp_path / f"eval-{name}", rate, rate)
    data = page_data(tmp_path)
    names = [row["name"] for row in data["scores"]]
    assert names == ["sft", "grpo", "tgrpo", "grpo-lying", "tgrpo-lying"]
    shown = {figure["caption"].partition(",")[0]: figure["note"].split()[0] for figure in data["figures"]}
    assert shown["tgrpo accuracy"] == "grpo" and shown["tgrpo-lying accuracy"] == "grpo-lying"


def test_scores_of_an_unfinished_evaluation(tmp_path: Path) -> None:
    finished = write_evaluation(tmp_path, 0.7, 0.3)["frames"]["8"]["by_modality"]["video"]
    (tmp_path / "summary.json").unlink()
    with (tmp_path / "predictions-8.jsonl").open("a") as file:
        file.write('{"problem_id": 1, "order": "ord')
    data = page_data(tmp_path)
    assert data["scores"][0]["orders"]["ordered"]["mean"] == finished["ordered"]["accuracy"]
    assert any("not finished" in note for note in data["notes"])


def test_the_look_gap_stands_beside_the_temporal_gap(tmp_path: Path) -> None:
    """With its interval, finished or not."""
    write_looks(tmp_path, 0.8, 0.5)
    gap = json.loads((tmp_path / "summary.json").read_text())["frames"]["8"]["look_gap"]
    low, high = gap["interval95"]
    for name in ("summary.json", None):
        (row,) = page_data(tmp_path)["scores"]
        assert (
            row["gaps"] == {"elsewhere": {"mean": gap["gap"], "low": low, "high": high, "n": 120}}
            and low < high
        )
        assert set(row["orders"]) == {"ordered", "elsewhere"}
        if name:
            (tmp_path / name).unlink()
    write_evaluation(tmp_path / "eval-rl", 0.7, 0.3)
    assert page_data(tmp_path / "eval-rl")["scores"][0]["gaps"].keys() == {"shuffled"}


def test_scores_of_several_frame_counts(tmp_path: Path) -> None:
    figures = {"ordered": {"accuracy": 0.5, "interval95": [0.4, 0.6], "questions": 9, "format_rate": 1.0}}
    (tmp_path / "predictions-16.jsonl").touch()
    (tmp_path / "summary.json").write_text(json.dumps({"frames": {"16": figures, "32": figures}}))
    name = tmp_path.name
    first, second = page_data(tmp_path)["scores"]
    assert (first["name"], second["name"]) == (f"{name}, 16 frames", f"{name}, 32 frames")
    assert first["orders"] == {"ordered": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
    assert first["format"] == 1.0 and first["gaps"] == {}


@pytest.mark.parametrize("finished", [False, True])
def test_direct_answers_have_a_row(tmp_path: Path, finished: bool) -> None:
    write_controls(tmp_path / "x", 0.8, 0.4)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "x" / "direct-16.jsonl", tmp_path / "alone")
    if finished:
        records = [
            [json.loads(line) for line in (tmp_path / "x" / f"{begin}-16.jsonl").open()]
            for begin in ("predictions", "direct")
        ]
        summary = {"frames": {"16": summarise(*records)}}
        (tmp_path / "x" / "summary.json").write_text(json.dumps(summary))
    rows = {row["name"]: row for row in page_data(tmp_path)["scores"]}
    assert list(rows) == ["alone", "x", "x, direct"]
    captions = [figure["caption"] for figure in page_data(tmp_path / "x")["figures"]]
    assert captions[:3] == ["x accuracy, in order", "x temporal gap", "x gap to reversed"]
    assert len(captions) == len(CONTROLS)
    assert rows["alone"]["orders"] == rows["x, direct"]["orders"]
    assert rows["x"]["orders"]["ordered"]["mean"] - rows["x, direct"]["orders"]["ordered"]["mean"] > 0.2
    assert list(rows["x"]["orders"]) == [*CONTROLS] and rows["x"]["gaps"].keys() == {*CONTROLS[1:]}


def test_header_of_a_run(tmp_path: Path) -> None:
    write_rl_run(tmp_path / "run", steps=20, every=10)
    data = page_data(tmp_path / "run")
    (run,) = data["runs"]
    assert {"20 steps", "1 min 8 s", "data rl.json", "G 8"} < {*run["about"]} and len(data["figures"]) == 4
    assert run["config"]["hub_token"] == "(not shown)"
    assert [duration(s) for s in (59.6, 75, 4000)] == ["1 min 0 s", "1 min 15 s", "1 h 6 min"]


def test_runs_that_are_laid_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named by their paths below the folder that all are in; what is the same in all is left out."""
    for name, rule in (("a/rl", "margin"), ("b/rl", "off")):
        write_rl_run(tmp_path / name, steps=20, every=10)
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace("margin", f"'{rule}'") + f"output_dir: runs/{name}\n")
        write_evaluation(tmp_path / name / "eval-last", 0.7, 0.4)
    runs = [tmp_path / "a" / "rl", tmp_path / "b" / "rl"]
    data = page_data(*runs)
    assert (data["title"], data["overlay"], data["figures"]) == ("a/rl, b/rl", True, [])
    assert [run["name"] for run in data["runs"]] == ["a/rl", "b/rl", "a/rl/eval-last", "b/rl/eval-last"]
    assert [row["name"] for row in data["scores"]] == ["a/rl last", "b/rl last"]
    assert data["differing"] == [{"setting": "temporal_rule", "a/rl": "margin", "b/rl": "off"}]
    curve = data["runs"][0]["points"]["series"]["reward/accuracy"]
    shown = f"{sum(curve[-2:]) / 2:.2f}"
    assert data["ends"][0] == {"series": "accuracy reward", "a/rl": shown, "b/rl": shown}
    assert page_data(tmp_path / "a")["overlay"] is False
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "comparison.html")
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "x.html")]) == 0
    assert len(data_of(tmp_path / "x.html")["runs"]) == 4
    for words, problem in (
        ([runs[0], runs[0]], "named twice"),
        ([runs[0], tmp_path / "c"], "no such run folder"),
    ):
        assert main(["report", *map(str, words)]) == 2
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize("content", ["nothing", "an empty folder", "a file"])
def test_requests_that_cannot_be_met(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run"
    if content == "an empty folder":
        path.mkdir()
    elif content == "a file":
        path.touch()
    with pytest.raises(RequestError, match=r"no such run folder|nothing to report"):
        build_report(path)


def test_nothing_is_written_through_links_of_a_downloaded_run(tmp_path: Path) -> None:
    run, own = tmp_path / "run", tmp_path / "own.txt"
    write_rl_run(run, steps=3, every=3)
    own.write_text("mine")
    names = ("report.html", ".report.html.partial", "out.txt", ".out.txt.partial", ".lock", "answers.jsonl")
    for name in names:
        (run / name).symlink_to(own)
    build_report(run)
    replace_text(run / "out.txt", "new")
    assert (run / "report.html").read_text("utf-8").startswith("<!DOCTYPE") and own.read_text() == "mine"
    assert (run / "out.txt").read_text() == "new" and not (run / "report.html").is_symlink()
    with pytest.raises(PermissionError, match="is a symbolic link"), claimed(run):
        pass
    for append in (append_line, lambda path, line: append_records(path, [line])):
        with pytest.raises(PermissionError, match="is a symbolic link"):
            append(run / "answers.jsonl", {})
    assert own.read_text() == "mine"


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_values_cannot_leave_their_element(text: str) -> None:
    embedded = embed({text: [text]})
    assert embedded.isascii() and not re.search("[<>&]", embedded)
    assert json.loads(embedded) == {text: [text]}


def test_page_is_self_contained_and_only_its_own_script_may_run(tmp_path: Path) -> None:
    write_hostile_run(tmp_path / "run")
    page = build_report(tmp_path / "run", tmp_path / "out" / "page.html").read_text("utf-8")
    assert len(re.findall("<script", page)) == 2 and len(re.findall("</script", page)) == 2
    assert not re.search(
        r"""(?:src|href|action)\s*=\s*["']?(?!#)\S""", page.split("<body>")[0].split("<style>")[0]
    )
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page and "document.write" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert policy and script and style and "default-src &#x27;none&#x27;" in policy[1]
    for element in (script, style):
        digest = base64.b64encode(hashlib.sha256(element[1].encode()).digest()).decode()
        assert f"sha256-{digest}" in policy[1]


def test_a_long_run_stays_small_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    write_rl_run(tmp_path / "short", steps=1, every=1, size=(16, 84, 112))
    (tmp_path / "run" / "frames").mkdir(parents=True)
    group = json.loads((tmp_path / "short" / "rollouts.jsonl").read_text().splitlines()[0])
    strip = next(iter((tmp_path / "short" / "frames").glob("*.jpg")))
    metrics = json.loads((tmp_path / "short" / "metrics.jsonl").read_text())
    for completion in group["ordered"] + group["shuffled"]:
        completion["text"] = "<think>" + "The disc moves on. " * 60 + "</think><answer>B</answer>"
    groups = []
    for step in range(1, 1201):
        for k in (0, 1):
            name = f"frames/{step}-{k}.jpg"
            os.link(strip, tmp_path / "run" / name)
            groups.append(
                group
                | {"step": step, "problem_id": 2 * step + k, "frames": group["frames"] | {"strip": name}}
            )
    write_lines(tmp_path / "run" / "rollouts.jsonl", groups)
    write_lines(tmp_path / "run" / "metrics.jsonl", [metrics | {"step": step} for step in range(1, 1201)])
    page = build_report(tmp_path / "run")
    assert page.stat().st_size < 30_000_000
    run = data_of(page)["runs"][0]
    steps = [group["step"] for group in run["groups"]]
    assert run["groupsTotal"] == 2400 and 200 < len(steps) < 1200
    assert (steps[0], steps[-1]) == (1, 1200)
    apart = [b - a for a, b in pairwise(steps)]
    assert max(apart) - min(apart) <= 1


def test_cases_renamed_series_are_read_under_both_names(tmp_path: Path) -> None:
    """In curves, groups and the studio's list; the end of early stopping is a fact, no curve."""
    for name in ("temporal/p_shuffled", "temporal/p_contrast"):
        run = tmp_path / name.replace("/", "-")
        write_lines(
            run / "metrics.jsonl",
            [{"step": s, name: 0.5} for s in (1, 2)] + [{"step": 2, "stopped_early": 3.0}],
        )
        write_lines(run / "rollouts.jsonl", [{"step": 1, name.partition("/")[2]: 0.25}])
        (found,) = page_data(run)["runs"]
        assert found["points"]["series"] == {"temporal/p_contrast": [0.5, 0.5]}
        assert found["groups"][0]["pShuffled"] == 0.25
        assert "stopped early: 3 validations in a row brought no better model" in found["about"]


LINKED = (
    "config.yaml",
    "metrics.jsonl",
    "rollouts.jsonl",
    "left_out.jsonl",
    "summary.json",
    "predictions-8.jsonl",
)


@pytest.mark.parametrize("name", LINKED)
def test_cases_links_out_of_a_run_and_huge_files(tmp_path: Path, name: str) -> None:
    """A stranger's run shows nothing of other folders, and takes no memory for a file's size."""
    run = tmp_path / "run"
    write_evaluation(run, 0.7, 0.3)
    (run / name).unlink(missing_ok=True)
    (run / ("summary.json" if name.startswith("pred") else "none")).unlink(missing_ok=True)
    write_lines(run / "quarantine.jsonl", [{"reason": "seen"}])
    private = {
        "step": 1,
        "note": "PRIVATE",
        "score": 1.0,
        "problem": "PRIVATE",
        "frames": {"8": {"ordered": {}}},
    }
    (tmp_path / "private").write_text(json.dumps(private) + "\n")
    (run / name).symlink_to(tmp_path / "private")
    page = build_report(run)
    assert "PRIVATE" not in page.read_text("utf-8") and "seen" in page.read_text("utf-8")
    notes = data_of(page)["notes"]
    assert any(f"{name} cannot be read: {name} is a link that leads out" in note for note in notes)
    (run / name).unlink()
    with (run / name).open("wb") as file:
        file.truncate(200 << 20)
    tracemalloc.start()
    try:
        build_report(run)
        assert tracemalloc.get_traced_memory()[1] < 120 << 20
    finally:
        tracemalloc.stop()


def test_cases_numbers_that_are_too_large(tmp_path: Path) -> None:
    """Scores out of [0, 1] are left out; sums that overflow become null, here and in the studio."""
    write_evaluation(tmp_path, 0.7, 0.3)
    (tmp_path / "summary.json").unlink()
    before = page_data(tmp_path)["scores"]
    with (tmp_path / "predictions-8.jsonl").open("a") as file:
        line = json.loads((tmp_path / "predictions-8.jsonl").read_text().splitlines()[0])
        file.writelines(
            json.dumps(line | {"problem_id": n, "score": s}) + "\n" for n, s in (("x", 1e308), ("y", -1))
        )
    assert page_data(tmp_path)["scores"] == before
    with (tmp_path / "predictions-8.jsonl").open("a") as file:
        file.write(json.dumps(line | {"strict_score": "none"}) + "\n")
    data = page_data(tmp_path)
    assert data["scores"] == [] and any("cannot be counted" in note for note in data["notes"])
    assert as_json({"sum": [1e308 * 10, float("nan"), 1.5]}) == '{"sum":[null,null,1.5]}'
