"""The studio's reading of run folders: state, progress, alerts, and what a hostile folder may not do."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from report_runs import HOSTILE, write_demo, write_hostile_run, write_lines, write_looks, write_rl_run

from video_r1.errors import VideoR1Error
from video_r1.files import Claim, claimed, parse_claim
from video_r1.lab.demo import MARK
from video_r1.report.reader import Found, Refused, last_lines
from video_r1.report.run_data import read_settings
from video_r1.studio.alerts import alert_of_silence, alerts_of
from video_r1.studio.folders import Library
from video_r1.studio.overview import DEMO_MARK, Progress, listing, overview, progress_of, state_of


def found_in(folder: Path) -> Found:
    return Found(folder.name, folder, folder)


@pytest.mark.parametrize(
    ("claim", "done", "silent", "alive", "word", "why"),
    [
        (Claim(7, "here"), False, 5, True, "running", ""),
        (Claim(7, "here"), False, 9e9, True, "running", ""),  # an alert says that it is silent
        (Claim(7, "here"), False, 90, False, "failed", "process 7 on here was killed after step 40: "),
        (Claim(7, "here"), True, 90, False, "finished", ""),
        (Claim(7, "there"), False, 90, None, "running", "on there"),
        (Claim(7, "there"), False, 7200, None, "failed", "process 7 on there has written nothing for 2.0 h"),
        (Claim(ended="failed", why="no space"), False, 90, None, "failed", "no space"),
        (Claim(ended="stopped", why="checkpoint-40"), False, 90, None, "stopped", "checkpoint-40"),
        (Claim(), True, 90, None, "finished", ""),
        (Claim(), False, 90, None, "stopped", "it ended after step 40 before its model"),
    ],
)
def test_state(claim: Claim, done: bool, silent: float, alive: bool | None, word: str, why: str) -> None:
    state = state_of(claim, done, Progress(step=40), silent, alive, "its model")
    assert state.word == word and state.why.startswith(why)


def test_the_lock_says_how_a_claim_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claimed(run):
        held = parse_claim((run / ".lock").read_text())
        assert held == Claim(os.getpid(), socket.gethostname())
    assert parse_claim((run / ".lock").read_text()) == Claim()
    for error, ended in (
        (VideoR1Error("none earns\na reward"), "failed"),
        (KeyboardInterrupt("why"), "stopped"),
    ):
        with pytest.raises(type(error)), claimed(run):
            raise error
        assert parse_claim((run / ".lock").read_text()) == Claim(
            ended=ended, why="none earns" if ended == "failed" else "why"
        )
    with claimed(run):  # the next one begins anew
        assert parse_claim((run / ".lock").read_text()).process == os.getpid()
    assert parse_claim("process 99999999999999 on x\nfailed: y") == Claim()


def test_progress() -> None:
    lines = [{"step": s, "time": 100.0 + 2.0 * s, "epoch": s / 50} for s in range(1, 31)]
    # an hour's break before the last steps does not count
    for line in lines[:5]:
        line["time"] -= 3600
    assert progress_of(lines, {"max_steps": "90"}) == Progress(30, 90, 160.0, 2.0)
    assert progress_of(lines, {"max_steps": "90"}).left == 120.0
    assert progress_of(lines, {"max_steps": "-1", "num_train_epochs": "3.0"}).steps == 150
    assert progress_of(lines, {"max_steps": "many"}).steps is None
    assert progress_of([], {"max_steps": "90"}) == Progress(steps=90)
    assert progress_of([{"step": "x"}, {"step": None, "time": "y"}], {}).left is None


def line(**series: float) -> dict[str, float]:
    return {name.replace("__", "/"): value for name, value in series.items()}


@pytest.mark.parametrize(
    ("before", "now", "name"),
    [
        (line(groups__no_variance=0.4), line(groups__no_variance=0.95), "no variance"),
        (line(reward__format=0.97), line(reward__format=0.1), "format"),
        (line(completion__truncated=0.0), line(completion__truncated=0.5), "truncation"),
        (line(policy__kl=0.04), line(policy__kl=1.5), "kl"),
        (line(sampler__logprob_difference=0.01), line(sampler__logprob_difference=0.2), "sampler"),
        (line(media__skipped=0.0), line(media__skipped=2.0), "media"),
        (line(answers__A=9, answers__B=8), line(answers__A=200, answers__B=1), "collapse"),
        (line(credit_sign__tidy=0.4), line(credit__tidy=0.3, credit_sign__tidy=-0.9), "credit sign"),
    ],
)
def test_alerts(before: dict[str, float], now: dict[str, float], name: str) -> None:
    lines = [before] * 60 + [now] * 10
    (alert,) = alerts_of(lines)
    assert alert.name == name and len(alert.advice) > 20
    assert alerts_of([before] * 70) == []
    assert alerts_of([now]) == [] or name in ("media", "collapse")


def test_a_reward_that_moves_nothing_in_twenty_steps_is_told() -> None:
    lines = [
        line(credit__accuracy=0.6, credit__temporal=0.004, credit__format=0.02 * (s < 10)) for s in range(20)
    ]
    (alert,) = alerts_of(lines)
    assert alert.name == "credit" and alert.title.startswith("the reward temporal moves 0.4% of")
    assert alerts_of(lines[1:]) == []
    # answers that all earn it are no fault; nor is a gate, which takes from right answers
    earned = [line(credit__format=0.0, reward_std__format=0.0) for _ in range(30)]
    gate = [line(temporal__drop=1.0, credit__temporal=0.2, credit_sign__temporal=-0.4) for _ in range(30)]
    assert alerts_of(earned) == alerts_of(gate) == []


@pytest.mark.parametrize(
    ("config", "files", "lock", "kind", "state"),
    [
        ("num_generations: 8\n", {"quarantine.jsonl": {}}, "failed: no clip", "rl", "failed"),
        ("num_generations: 8\n", {"metrics.jsonl": {"step": 9, "eval_loss": 1.0}}, None, "rl", "stopped"),
        ("seed: 1\n", {"metrics.jsonl": {"step": 9, "loss": 1.0}}, None, "sft", "stopped"),
        ("save_strategy: 'no'\n", {"metrics.jsonl": {"step": 9, "loss": 1.0}}, "", "sft", "finished"),
        ("save_strategy: no\nmax_steps: 9\n", {"metrics.jsonl": {"step": 9}}, None, "sft", "finished"),
        ("save_strategy: no\nmax_steps: 10\n", {"metrics.jsonl": {"step": 9}}, None, "sft", "stopped"),
        ("save_strategy: steps\n", {"metrics.jsonl": {"step": 9}}, "", "sft", "stopped"),
        (None, {"predictions-8.jsonl": {}}, None, "evaluation", "stopped"),
    ],
)  # fmt: skip
def test_what_a_folder_is_and_how_it_ended(
    tmp_path: Path, config: str | None, files: dict[str, dict[str, float]], lock: str | None, kind: str,
    state: str,
) -> None:  # fmt: skip
    for name, record in files.items():
        write_lines(tmp_path / name, [record])
    for name, text in (("config.yaml", config), (".lock", lock)):
        if text is not None:
            (tmp_path / name).write_text(text)
    row = overview(found_in(tmp_path))
    assert (row["kind"], row["state"]) == (kind, state)
    assert kind != "evaluation" or "before its summary" in row["why"]
    assert "model" not in row["why"] or "no" not in (config or "")


def test_groups_without_variance_teach_where_there_is_a_teacher() -> None:
    lines = [{"groups/no_variance": 1.0, "reward/total": 0.0}] * 20
    assert [alert.name for alert in alerts_of(lines)] == ["no variance"]
    assert alerts_of([line | {"teacher/kl": 0.2} for line in lines]) == []


def test_alerts_of_updates_and_of_silence() -> None:
    lines = [{"updates/skipped": max(0, step - 55)} for step in range(60)]
    assert [alert.name for alert in alerts_of(lines)] == ["updates"]
    assert alert_of_silence(700, 3.0) and not alert_of_silence(590, None)
    assert not alert_of_silence(700, 200.0)  # its steps are slow


def test_all_runs_of_a_demo_are_listed(tmp_path: Path) -> None:
    assert DEMO_MARK == MARK
    write_demo(tmp_path / "demo")
    (tmp_path / "demo" / "rl" / MARK).touch()
    rows = {row["name"]: row for row in listing(Library([tmp_path]).runs())}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "demo/rl": "rl", "demo/sft": "sft", "demo/eval-base": "evaluation", "demo/eval-sft": "evaluation",
        "demo/eval-rl": "evaluation",
    }  # fmt: skip
    assert rows["demo/rl"]["demo"] and not rows["demo/sft"]["demo"]
    assert [figure["caption"] for figure in rows["demo/rl"]["figures"]] == [
        "accuracy reward", "temporal gap", "format reward", "response length",
    ]  # fmt: skip
    assert rows["demo/eval-rl"]["state"] == "finished"
    gap = json.loads((tmp_path / "demo/eval-rl/summary.json").read_text())["frames"]["8"]["temporal_gap"]
    captions = ["accuracy, all questions", "accuracy, videos", "temporal gap"]
    assert [figure["caption"] for figure in rows["demo/eval-rl"]["figures"]] == captions
    assert rows["demo/eval-rl"]["figures"][2]["value"] == f"{gap['gap']:.2f}"
    assert rows["demo/sft"]["spark"]["name"] == "loss" and len(rows["demo/sft"]["spark"]["values"]) == 40


def test_an_evaluation_with_looks_has_its_gap_in_the_list(tmp_path: Path) -> None:
    write_looks(tmp_path / "eval-look", 0.8, 0.5)
    (row,) = listing(Library([tmp_path]).runs())
    assert [figure["caption"] for figure in row["figures"]] == ["accuracy, videos", "look gap"]


def test_a_long_run_is_told_by_its_end(tmp_path: Path) -> None:
    lines = [{"step": s, "time": float(s), "loss": 1.0 / s, "pad": "x" * 500} for s in range(1, 20_001)]
    write_lines(tmp_path / "long" / "metrics.jsonl", lines)
    found = found_in(tmp_path / "long")
    read = last_lines(found, "metrics.jsonl", sketched=60)
    steps = [record["step"] for record in read]
    assert len(read) < 1000 and steps == sorted(steps) and steps[0] == 1 and steps[-1] == 20_000
    assert overview(found)["step"] == 20_000


def test_names_are_those_that_tell_folders_apart(tmp_path: Path) -> None:
    for name in ("a/runs/rl", "b/runs/rl", "c/rl"):
        write_lines(tmp_path / name / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    assert set(Library([tmp_path / "c"]).runs()) == {"rl"}
    assert set(Library([tmp_path / "c/rl"]).runs()) == {"rl"}
    both = Library([tmp_path / "a/runs", tmp_path / "b/runs", tmp_path / "c"])
    assert set(both.runs()) == {f"{tmp_path}/a/runs/rl", f"{tmp_path}/b/runs/rl", "c/rl"}
    assert len(Library([tmp_path, tmp_path / "c"]).runs()) == 3  # none twice


@pytest.mark.slow
def test_a_hostile_folder_tells_nothing_of_others_and_hangs_nobody(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.yaml").write_text("passphrase: of-mine\n")
    write_lines(secret / "metrics.jsonl", [{"step": 77, "loss": 1.0}] * 3)
    runs = tmp_path / "runs"
    write_hostile_run(runs / HOSTILE[1])
    links = runs / "links"
    links.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (links / name).symlink_to(secret / name)
    (runs / "linked").symlink_to(secret)
    pipe = runs / "pipe"
    pipe.mkdir()
    os.mkfifo(pipe / "metrics.jsonl")
    os.mkfifo(pipe / "config.yaml")
    write_lines(pipe / "rollouts.jsonl", [{}])
    bomb = runs / "bomb"
    write_rl_run(bomb, steps=5)
    layers = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (bomb / "config.yaml").write_text(f"a0: &a0 x\n{layers}")
    deep = runs / "deep"
    write_rl_run(deep, steps=5)
    (deep / "config.yaml").write_text("[" * 100_000)
    (deep / ".lock").write_text("process 0 on \x00")
    with (deep / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n" + json.dumps({"step": "x" * 100_000, "time": []}) + "\n" + '{"ste')

    rows = {row["name"]: row for row in listing(Library([runs]).runs())}
    assert "linked" not in rows and rows["links"]["step"] is None and rows["pipe"]["step"] is None
    assert rows["bomb"]["step"] == 5 and rows["deep"]["step"] == 5
    text = json.dumps(rows)
    assert "of-mine" not in text and "77" not in [str(row["step"]) for row in rows.values()]
    with pytest.raises(Refused, match="leads out"):
        Found("links", links, runs).open("metrics.jsonl")
    with pytest.raises(Refused, match="not a regular file"):
        Found("pipe", pipe, runs).open("metrics.jsonl")
    assert read_settings(Found("bomb", bomb, runs)) == {}


def test_a_killed_run_and_one_that_runs(tmp_path: Path) -> None:
    write_rl_run(tmp_path / "rl", steps=30)
    lock = tmp_path / "rl" / ".lock"
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    row = overview(found_in(tmp_path / "rl"))
    assert row["state"] == "running" and row["step"] == 30 and row["alerts"] == []
    lock.write_text(f"process 999999999 on {socket.gethostname()}")
    row = overview(found_in(tmp_path / "rl"), now=row["written"] + 100)
    assert row["state"] == "failed" and "was killed after step 30" in row["why"]


def test_checkpoints_are_whole_and_the_newest_comes_first(tmp_path: Path) -> None:
    for age, (name, needed) in enumerate({"new": "a", "half": "b", "old": "a"}.items()):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.safetensors").touch()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"w": f"{needed}.safetensors"}})
        )
        (folder / "config.json").touch()
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "old" / "report.html").touch()  # a later file does not make a checkpoint newer
    assert list(Library([tmp_path]).checkpoints())[:2] == ["new", "old"]
