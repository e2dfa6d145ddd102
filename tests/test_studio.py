"""The studio's server: live curves, recorded groups, and who may ask for what."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_lines, write_rl_run
from studio_server import AUTHORIZED, TOKEN, get, studio_client

pytest.importorskip("starlette", reason="the extra studio is not installed")
from starlette.testclient import TestClient

from video_r1.cli import main
from video_r1.report import reader as tail_module
from video_r1.report.curves import Curves
from video_r1.studio.requests import POLICY, token_of

OWN = {"X-Video-R1": "1"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_rl_run(tmp_path / "runs" / "rl", steps=30, every=5)
    return tmp_path / "runs"


@pytest.fixture
def client(runs: Path) -> Iterator[TestClient]:
    with studio_client(runs) as opened:
        yield opened


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


# Curves -------------------------------------------------------------------------------------------


def test_curves_grow_with_the_file(client: TestClient, runs: Path) -> None:
    metrics = runs / "rl" / "metrics.jsonl"
    first = get(client, "/api/curves", run="rl")
    assert first["points"]["steps"] == list(range(1, 31)) and first["more"] is False
    assert "points" not in get(client, "/api/curves", run="rl", stamp=first["stamp"])  # nothing is new
    with metrics.open("a") as file:
        file.write('{"step": 31, "loss": 0.5}\n{"step": 32, "lo')
    more = get(client, "/api/curves", run="rl", stamp=first["stamp"])
    assert more["points"]["steps"][-1] == 31 and more["points"]["series"]["loss"][-1] == 0.5
    assert more["more"] is False and more["notes"] == []
    with metrics.open("a") as file:
        file.write('ss": 0.25}\n')
    more = get(client, "/api/curves", run="rl", stamp=more["stamp"])["points"]
    assert more["steps"][-2:] == [31, 32] and more["series"]["loss"][-2:] == [0.5, 0.25]
    assert more["series"]["policy/kl"][-2:] == [None, None]


def test_a_file_that_was_replaced_is_read_from_its_start(client: TestClient, runs: Path) -> None:
    metrics = runs / "rl" / "metrics.jsonl"
    first = get(client, "/api/curves", run="rl")
    write_lines(metrics.with_name("draft"), [{"step": s, "loss": float(s)} for s in range(1, 6)])
    metrics.with_name("draft").replace(metrics)
    second = get(client, "/api/curves", run="rl", stamp=first["stamp"])
    assert list(second["points"]["series"]) == ["loss"]
    # Cut short and grown beyond its former size, in the same file.
    metrics.write_text("".join(f'{{"step": {s}, "kl": 1.0}}\n' for s in range(1, 40)))
    third = get(client, "/api/curves", run="rl", stamp=second["stamp"])
    assert third["points"]["steps"] == list(range(1, 40)) and list(third["points"]["series"]) == ["kl"]
    metrics.unlink()
    assert get(client, "/api/curves", run="rl", stamp=third["stamp"])["points"]["steps"] == []


def test_unreadable_lines_are_skipped_and_counted(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_module, "BLOCK", 1000)
    monkeypatch.setattr(tail_module.Tail.__init__, "__defaults__", (5000,))
    metrics = runs / "rl" / "metrics.jsonl"
    metrics.write_text(
        '{"step": 1, "loss": 1}\nnone\n[' + "9" * 20_000 + ']\n{"step": 2, "loss": 2}\n\n{"step": 3, "pad": "'
        + "x" * 4500 + '", "loss": 3}\n\xff\n{"step": 4, "loss": NaN}\n{"step": 5, "loss": 1e999}\n'
    )  # fmt: skip
    with studio_client(runs) as client:
        read = get(client, "/api/curves", run="rl", stamp="old")  # the first answer reads one block
    assert read["points"]["steps"] == [1, 2, 3, 4, 5]
    assert read["points"]["series"]["loss"] == [1, 2, 3, None, None] and read["points"]["bad"] == {"loss": 2}
    assert read["notes"] == [
        "metrics.jsonl: 2 unreadable lines skipped",
        "metrics.jsonl: 1 far too long line skipped",
    ]


def test_points_are_means() -> None:
    curves = Curves()
    for step in range(1, 4002):
        rare = 1.0 if step % 8 == 0 else None
        curves.add({"step": step, "time": step / 2, "loss": float(step), "rare": rare})
    points = curves.points()
    assert points["averaged"] == 4 and points["steps"][:2] == [4, 8] and points["steps"][-2:] == [4000, 4001]
    assert points["series"]["loss"][:2] == [2.5, 6.5] and points["times"][:2] == [2.0, 4.0]
    assert points["series"]["loss"][-2:] == [3998.5, 4001]
    assert points["series"]["rare"][:4] == [None, 1.0, None, 1.0] and points["bad"]["rare"] == 3501


def test_validation_joins_its_step_and_a_resumed_run_goes_on_from_its_checkpoint() -> None:
    curves = Curves()
    for step in (1, 2, 3):
        curves.add({"step": step, "loss": float(step)})
    curves.add({"step": 3, "eval_loss": 7.0})
    assert curves.points()["series"] == {"loss": [1, 2, 3], "eval_loss": [None, None, 7]}
    curves.add({"step": 2, "loss": 20.0})
    assert curves.points()["series"]["loss"] == [1, 20]


def test_memory_of_curves_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("video_r1.report.curves.MAX_CELLS", 400)
    monkeypatch.setattr("video_r1.report.curves.MAX_SERIES", 3)
    curves = Curves()
    for step in range(1, 301):
        curves.add({"step": step, f"name{step}": 1.0, "loss": 2.0})
    points = curves.points()
    assert len(points["steps"]) <= 67 and len(points["series"]) == 3
    assert points["steps"][-1] == 300 and set(points["series"]["loss"]) == {2.0} and points["averaged"] >= 4


# Groups ---------------------------------------------------------------------------------


def test_groups_are_read_one_by_one(client: TestClient, runs: Path) -> None:
    listed = get(client, "/api/entries", run="rl")
    assert len(listed["entries"]) == 12 and listed["more"] is False
    lines = [json.loads(line) for line in (runs / "rl" / "rollouts.jsonl").read_text().splitlines()]
    assert [(e["step"], e["id"], e["p"]) for e in listed["entries"]] == [
        (line["step"], str(line["problem_id"]), line["p"]) for line in lines
    ]
    group = get(client, "/api/group", run="rl", life=listed["life"], at=3)
    assert group["problem"] == lines[3]["problem"] and len(group["ordered"]) == 8
    picture = client.get(group["strip"])
    assert picture.headers["content-type"] == "image/jpeg" and picture.content[:3] == b"\xff\xd8\xff"
    append(runs / "rl" / "rollouts.jsonl", lines[0] | {"step": 99})
    more = get(client, "/api/entries", run="rl", life=listed["life"], have=12)
    assert more["from"] == 12 and [entry["step"] for entry in more["entries"]] == [99]
    # One that is recorded again takes the place of the earlier one.
    append(runs / "rl" / "rollouts.jsonl", lines[0] | {"p": 0.123})
    again = get(client, "/api/entries", run="rl", life=more["life"], have=13)
    assert again["from"] == 0 and again["entries"][0]["p"] == 0.123 and len(again["entries"]) == 13
    assert client.get("/api/group", params={"run": "rl", "life": more["life"], "at": 0}).status_code == 409
    for at in (-1, 13, 10**20):
        params = {"run": "rl", "life": again["life"], "at": at}
        assert client.get("/api/group", params=params).status_code == 404


# Who may ask --------------------------------------------------------------------------------------


def test_every_answer_has_the_policy(client: TestClient) -> None:
    for path in ("/", "/api/runs", "/page/charts.js", "/none", "/api/curves?run=../../etc"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY and "http" not in POLICY
    page = client.get("/").text
    assert "<style" not in page and "http" not in page and " on" + "click" not in page


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""])
def test_a_name_that_was_turned_to_this_address_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"Host": host}).status_code == 421


def test_only_the_own_page_writes(client: TestClient) -> None:
    routes: Any = client.app
    writing = {route.path for route in routes.routes if "POST" in (route.methods or ())}
    assert writing == {"/api/ask", "/api/upload", "/api/add"}
    own = {**OWN, "Origin": "http://127.0.0.1:7860"}
    for headers in ({}, {**OWN, "Origin": "http://evil.example"}, {**OWN, "Origin": "null"}):
        assert client.post("/api/add", json={}, headers=headers).status_code == 403
    assert client.get("/api/add").status_code == 405
    assert client.post("/api/add", json={}, headers=own).status_code == 404  # no such clip
    assert client.post("/api/add", content=b"[" * 90_000, headers=own).status_code == 400
    assert client.post("/api/add", content=b"x" * 200_000, headers=own).status_code == 413


def test_another_page_may_link_here_and_no_more(client: TestClient) -> None:
    """Not even begin a search whose answer it could not read."""
    for site in ("cross-site", "same-site", "odd"):
        for path in ("/api/runs", "/api/rows?manifest=x&words=y", "/page/charts.js", "/api/clip?upload=x"):
            assert client.get(path, headers={"Sec-Fetch-Site": site}).status_code == 403
        assert client.get("/", headers={"Sec-Fetch-Site": site}).status_code == 200
    for site in ("same-origin", "none"):
        assert client.get("/api/runs", headers={"Sec-Fetch-Site": site}).status_code == 200


def test_every_request_needs_the_token(runs: Path) -> None:
    """Also on 127.0.0.1: every account of the machine can reach it."""
    with studio_client(runs, headers={"Authorization": ""}) as client:
        wrong = {"Cookie": "video_r1_studio_7860=wrong"}, {"Authorization": f"Bearer {TOKEN[:-1]}"}
        for headers in ({}, *wrong, {**OWN, "Cookie": "video_r1_studio_7860="}):
            for path in ("/", "/api/runs", "/page/charts.js", "/api/clip?upload=x"):
                assert client.get(path, headers=headers).status_code == 401
            assert client.post("/api/ask", headers={**OWN, **headers}, json={}).status_code == 401
        assert client.get("/", params={"token": "wrong"}).status_code == 401
        assert client.get("/api/runs", headers=AUTHORIZED).status_code == 200
        entered = client.get("/", params={"token": TOKEN})
        assert entered.status_code == 303 and entered.headers["location"] == "/"
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/api/runs").status_code == 200
    with studio_client(runs, any_host=True) as client:
        assert client.get("/api/runs", headers={"Host": "node3:7860"}).status_code == 200


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, is_new = token_of(None, None)
    assert is_new and len(made) >= 43 and made != token_of(None, None)[0]
    monkeypatch.setenv("VIDEO_R1_STUDIO_TOKEN", "of-the-environment")
    (tmp_path / "token").write_text("of-a-file-0123456789\n")
    assert token_of(None, None) == ("of-the-environment", False)
    assert token_of(None, str(tmp_path / "token")) == ("of-a-file-0123456789", False)
    assert token_of("of-the-command-line", str(tmp_path / "token"))[0] == "of-the-command-line"


@pytest.mark.parametrize("given", [["--token", ""], ["--token", "s3cret"], ["--token_file", "token"], []])
def test_short_and_empty_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDEO_R1_STUDIO_TOKEN", "")
    (tmp_path / "token").write_text("\n")
    assert main(["studio", ".", "--host", "203.0.113.1", *given]) == 2  # nobody can listen on that address
    (line,) = capsys.readouterr().err.splitlines()
    assert "at least 16" in line


def test_no_path_leads_out(client: TestClient, runs: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "secret" / "metrics.jsonl", [{"step": 1, "loss": 1.0}] * 2)
    for name in ("../secret", str(tmp_path / "secret"), "..", "rl/../../secret", "rl\x00", "", "."):
        for path in ("/api/curves", "/api/run", "/api/entries", "/api/compare"):
            assert client.get(path, params={"run": name}).status_code == 404
    for path in ("/page/../server.py", "/page/%2e%2e%2fserver.py", "/page/server.py"):
        assert client.get(path).status_code == 404
    (runs / "rl" / "metrics.jsonl").unlink()
    (runs / "rl" / "metrics.jsonl").symlink_to(tmp_path / "secret" / "metrics.jsonl")
    read = get(client, "/api/curves", run="rl")
    assert read["points"]["steps"] == [] and "leads out" in read["notes"][0]


def test_names_and_values_beyond_all_bounds(client: TestClient, runs: Path, tmp_path: Path) -> None:
    """Strips outside the run, links in a circle, names of kilobytes, brackets a thousand deep, numbers of
    thousands of digits."""
    run, private = runs / "rl", tmp_path / "private.jpg"
    private.write_bytes(next((run / "frames").glob("*.jpg")).read_bytes())
    (run / "linked.jpg").symlink_to(private)
    line = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    (run / "loop.jpg").symlink_to("loop.jpg")
    names = ["loop.jpg", "x" * 5000, "a/" * 3000, "frames", ".", "", "../../private.jpg", str(private)]
    names += ["linked.jpg", "config.yaml", "\x00", 7]
    append(
        run / "rollouts.jsonl",
        *(line | {"step": 100 + i, "frames": line["frames"] | {"strip": n}} for i, n in enumerate(names)),
    )
    nested = "[" * 900 + "]" * 900
    deep = (
        '{"step": 7, "problem_id": %s, "problem": %s, "reason": %s, "path": %s, "text": %s, "ordered": %s}\n'
    )
    for name in ("rollouts", "left_out", "quarantine", "skipped_updates"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write(deep % ((nested,) * 6) + deep % (("[" * 90_000,) * 6))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 50, "loss": ' + "9" * 5000 + '}\n{"step": 1e999}\n{"step": -1e308, "time": 1e308}\n'
        )
    (run / "config.yaml").write_text("a: " + "[" * 3000 + "]" * 3000)
    for path in ("/api/run", "/api/curves", "/api/entries", "/api/compare", "/api/runs"):
        assert get(client, path, run="rl")
    listed = get(client, "/api/entries", run="rl")
    for at in range(12, len(listed["entries"])):
        assert get(client, "/api/group", run="rl", life=listed["life"], at=at)["strip"] is None
        params = {"run": "rl", "life": listed["life"], "at": at}
        assert client.get("/api/frames", params=params).status_code == 404


def test_a_broken_run_is_a_row_that_says_so(
    client: TestClient, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of frames and a number of 5,000 digits, settings 900 deep, half a surrogate pair; any other."""
    (runs / "eval").mkdir()
    many, deep = "9" * 5000, '{"a": ' * 900 + "1" + "}" * 900
    (runs / "eval" / "predictions-8.jsonl").write_text("{}\n")
    (runs / "eval" / "summary.json").write_text(
        f'{{"frames": {{"{many}": {{}}, "8": {{"ordered": {many}}}}}}}'
    )
    (runs / "eval" / "evaluation.json").write_text(deep)
    line = json.loads((runs / "rl" / "rollouts.jsonl").read_text().splitlines()[0])
    append(runs / "rl" / "rollouts.jsonl", line | {"step": 99, "frames": {"strip": "\ud83d", "count": 2}})
    row = {"problem_id": "\ud83d", "problem": "\ud83d?", "data_type": "video", "problem_type": "\ud83d"}
    row |= {"solution": "<answer>\ud83d</answer>", "path": "\ud83d.mp4"}
    fine = row | {"problem_id": 2, "problem_type": "free-form"}
    nested = json.dumps(row)[:-1] + ', "x": ' + deep + "}"
    (runs / "m.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(fine)}\n{nested}\n")
    time.sleep(2.1)  # a listing is good for two seconds
    assert {run["name"] for run in get(client, "/api/runs")["runs"]} == {"eval", "rl"}
    assert get(client, "/api/run", run="eval")["kind"] == "evaluation"
    life = get(client, "/api/entries", run="rl")["life"]
    assert get(client, "/api/group", run="rl", life=life, at=12)["strip"] is None
    page = get(client, "/api/rows", manifest="m.jsonl")
    assert page["rows"] == page["bad"] == len(page["shown"]) == 3
    monkeypatch.setattr("video_r1.studio.overview.alerts_of", lambda lines: 1 // len(lines))
    (runs / "eval" / "config.yaml").touch()  # so that it is read again
    other, broken = get(client, "/api/runs")["runs"]
    assert (broken["name"], broken["state"]) == ("eval", "failed") and other["name"] == "rl"
    assert "cannot be read: ZeroDivisionError" in broken["why"]


def test_settings_that_differ_and_skipped_groups(client: TestClient, runs: Path) -> None:
    write_rl_run(runs / "other", steps=5)
    config = runs / "other" / "config.yaml"
    config.write_text(config.read_text().replace("margin", "threshold"))
    time.sleep(2.1)  # a listing is good for two seconds
    rows = client.get("/api/compare", params={"run": ["rl", "other"]}).json()["differing"]
    assert rows == [{"setting": "temporal_rule", "rl": "margin", "other": "threshold"}]
    run = get(client, "/api/run", run="rl")
    assert run["skipped_updates"]["shown"] == [] and run["config"]["hub_token"] == "(not shown)"
    newest, *_ = run["left_out"]["shown"]
    assert (newest["step"], newest["problem_id"], newest["reason"]) == ("30", "1302", "no variance")
    assert len(run["left_out"]["shown"]) == 30
    reasons = [row["reason"] for row in run["quarantine"]["shown"]]
    assert reasons == ["there is no video stream", "the file ends in the middle of a frame"]


EVERY_ADDRESS = """
import sys
from starlette.testclient import TestClient
from video_r1.studio.server import application
headers = {"Authorization": "Bearer sixteen-characters"}
app = application([sys.argv[1]], "sixteen-characters")
with TestClient(app, base_url="http://127.0.0.1:7860", headers=headers) as client:
    for address in (
        "", "api/runs", "api/run?run=rl", "api/curves?run=rl", "api/compare?run=rl&run=rl",
        "api/entries?run=rl", "api/group?run=rl&life=1&at=0", "api/frames?run=rl&life=1&at=0",
        "api/choices", "api/rows?manifest=m.json&counts=1",
        "api/clip?manifest=m.json&row=0", "api/evaluations", "api/versus?left=a&right=b",
        "api/questions?left=a&right=b",
    ):
        answer = client.get("/" + address)
        assert answer.status_code == 200, (address, answer.text)
print(sorted({"torch", "transformers", "datasets", "pyarrow", "av", "PIL"} & sys.modules.keys()))
"""


def test_the_server_needs_none_of_the_large_packages(runs: Path) -> None:
    """They are two thirds of what it would hold; whoever looks at runs while they train has other uses."""
    row = {"problem_id": 1, "problem": "?", "data_type": "video", "problem_type": "numerical",
           "solution": "<answer>1</answer>", "path": "1.mp4"}  # fmt: skip
    (runs / "m.json").write_text(json.dumps([row]))
    (runs / "1.mp4").write_bytes(b"0")
    for name, score in (("a", 1.0), ("b", 0.0)):
        line = {"problem_id": 1, "order": "ordered", "score": score, "output": "1", "answer": "1"}
        write_lines(runs / name / "predictions-8.jsonl", [line])
    said = subprocess.run(
        [sys.executable, "-c", EVERY_ADDRESS, str(runs)], check=True, capture_output=True, text=True
    )
    assert said.stdout.strip() == "[]"
