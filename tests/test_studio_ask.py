"""Questions in the studio: what is asked of which model, the stream of an answer, clips, and added rows."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import chat_endpoint
from tiny_models import moving_square, write_clip

pytest.importorskip("starlette", reason="the extra studio is not installed")
from scripted_engine import Forced
from starlette.testclient import TestClient
from studio_server import studio_client

from video_r1.lab.model import base_folder
from video_r1.rollout import engine_factory
from video_r1.studio import ask as ask_module
from video_r1.studio import clips
from video_r1.studio.answerer import Answerer

OWN = {"X-Video-R1": "1"}
ROW = {
    "problem_id": 1, "problem": "Where does it go?", "data_type": "video", "problem_type": "multiple choice",
    "options": ["A. left", "B. right"], "solution": "<answer>B</answer>", "path": "clips/one.mp4",
}  # fmt: skip
# Answers like answerer.py, and does with a word of the question what a model may do.
FAKE = """
import json, os, signal, sys, time
def say(**event):
    print(json.dumps(event), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked == "stop":
        continue
    word = asked["settings"]["question"][0]
    say(event="state", text=str(os.getpid()))
    if word == "hang":
        time.sleep(600)
    if word == "die":
        print("Segmentation fault", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "fail":
        say(event="error", error="no such layer")
    say(event="asked", asked=asked, keys=sorted(name for name in os.environ if name.endswith("_API_KEY")))
    say(event="end")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "clips").mkdir(parents=True)
    write_clip(folder / "clips" / "one.mp4", moving_square(16), fps=4)
    outside = ROW | {"problem_id": 2, "path": "../secret.mp4"}
    (folder / "train.json").write_text(
        json.dumps([ROW, outside, ROW | {"problem_id": 3, "path": "gone.mp4"}])
    )
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "model" / name).write_text("{}")
    return folder


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(ask_module, "ANSWERER", (sys.executable, "-c", FAKE))
    with studio_client(folder, headers=OWN) as opened:
        yield opened


def asked(**fields: Any) -> dict[str, Any]:
    clip = {"manifest": "train.json", "row": 0}
    return {"checkpoint": "model", "clip": clip, "question": "Where?", **fields}


def events(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    answer = client.post("/api/ask", json=asked(**fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.strip().split("\n\n")]


def test_a_question_reaches_the_model(client: TestClient, folder: Path) -> None:
    fields = {"options": ["left", " ", "right"], "answer": "right", "contrasts": ["blind", "shuffled", "x"]}
    state, told, end = events(client, **fields, samples=900, tokens=7, temperature=0.5, type="OCR")
    assert (state["event"], end) == ("state", {"event": "end"})
    assert told["asked"]["orders"] == ["ordered", "shuffled", "blind"]
    settings = told["asked"]["settings"]
    assert settings == {
        "model": str(folder / "model"), "engine": "transformers", "path": str(folder / "clips" / "one.mp4"),
        "question": ["Where?"], "samples": 64, "options": ["left", "right"], "max_new_tokens": 7,
        "problem_type": "OCR", "answer": "right", "temperature": 0.5, "top_p": 1.0, "play": "forward",
    }  # fmt: skip
    address = {"engine": "http://127.0.0.1:9/v1", "model": "big", "checkpoint": "model"}
    assert events(client, **address)[1]["asked"]["settings"]["model"] == "big"
    assert events(client, **address | {"model": " "})[1]["asked"]["settings"]["model"] == ""  # what it serves
    ours = events(client, engine="http://127.0.0.1:9", model="")[1]["asked"]["settings"]
    assert ours["model"] == str(folder / "model")


def test_api_keys_go_to_named_addresses_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask_module, "ANSWERER", (sys.executable, "-c", FAKE))
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "sk-own")
    named, other = "http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1"
    with studio_client(folder, headers=OWN, engines=["http://127.0.0.1:9"]) as client:
        assert events(client, engine=named)[1]["keys"] == ["OPENAI_API_KEY", "VLLM_API_KEY"]
        for engine in (other, f"{named},{other}", f"http://127.0.0.1:9@127.0.0.1:8/v1?{named}"):
            assert events(client, engine=engine)[1]["keys"] == []


def test_a_model_that_breaks_is_told_of_and_the_next_question_is_answered(client: TestClient) -> None:
    first, *_ = events(client)
    again, *_ = events(client, question="And then?")
    assert again == first  # the model stays open
    failed = events(client, question="fail")
    assert failed[1] == {"event": "error", "error": "no such layer"} and failed[-1] == {"event": "end"}
    *_, died = events(client, question="die")
    assert died["event"] == "error"
    assert "ended by SIGKILL" in died["error"] and "Segmentation fault" in died["error"]
    revived, *_ = events(client)
    assert revived["event"] == "state" and revived != first
    assert client.get("/api/runs").status_code == 200


def test_an_answer_that_does_not_stop_does_not_hold_up_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a server that says nothing any more: its process is ended."""
    monkeypatch.setattr(ask_module, "ANSWERER", (sys.executable, "-c", FAKE))
    monkeypatch.setattr(ask_module, "STOPPING", 0.3)

    async def asked_thrice() -> list[dict[str, Any]]:
        model, said = ask_module.ModelProcess(), []
        for question in ("hang", "Where?", "And then?"):
            events = model.ask(("m",), {"settings": {"question": [question]}})
            said.append(await anext(events))
            await events.aclose()  # nobody listens any more
        await model.close()
        return said

    hung, first, second = asyncio.run(asked_thrice())
    assert hung["text"] != first["text"] and first["text"] == second["text"]


def test_another_model_takes_the_place_of_the_first(client: TestClient, folder: Path) -> None:
    first, *_ = events(client)
    other, *_ = events(client, checkpoint="the lab's base")
    (folder / "model" / "model.safetensors").write_text("{ }")  # a training wrote it anew
    anew, *_ = events(client)
    assert len({first["text"], other["text"], anew["text"]}) == 3


@pytest.mark.parametrize(("fields", "status", "said"), [
    ({"question": " "}, 400, "type a question"),
    ({"checkpoint": "../model"}, 404, "no such checkpoint"),
    ({"engine": "file:///etc/passwd"}, 400, "begins with http"),
    ({"checkpoint": "", "engine": "http://127.0.0.1:9"}, 400, "choose the checkpoint that the vLLM server"),
    ({"clip": {"manifest": "../train.json", "row": 0}}, 404, "no such manifest"),
    ({"clip": {"manifest": "train.json", "row": 1}}, 422, "leads out of the media root"),
    ({"clip": {"manifest": "train.json", "row": 9}}, 422, "not there any more"),
    ({"clip": {"upload": "../../etc/passwd"}}, 404, "was removed"),
    ({"clip": "x"}, 404, "no such manifest"),
])  # fmt: skip
def test_what_cannot_be_asked(client: TestClient, fields: dict[str, Any], status: int, said: str) -> None:
    answer = client.post("/api/ask", json=asked(**fields))
    assert answer.status_code == status and said in answer.json()["error"]


def test_clips_are_served_in_parts_and_from_the_media_root_alone(client: TestClient, folder: Path) -> None:
    whole = (folder / "clips" / "one.mp4").read_bytes()
    query = {"manifest": "train.json", "row": 0}
    part = client.get("/api/clip", params=query, headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole[10:20]
    assert part.headers["content-type"] == "video/mp4"
    assert client.get("/api/clip", params=query | {"row": 1}).status_code == 422
    assert client.get("/api/clip", params=query | {"row": 2}).status_code == 404
    (folder / "clips" / "one.mp4").unlink()
    (folder / "clips" / "one.mp4").symlink_to(folder.parent / "secret.mp4")
    assert client.get("/api/clip", params=query).status_code == 422


def test_a_clip_from_the_browser(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / "clips" / "one.mp4").read_bytes()
    name = client.post("/api/upload", params={"name": "../../my clip.MP4"}, content=whole).json()["upload"]
    assert name.startswith("my-clip-") and name.endswith(".mp4")
    assert client.get("/api/clip", params={"upload": name}).content == whole
    path = events(client, clip={"upload": name})[1]["asked"]["settings"]["path"]
    assert Path(path).read_bytes() == whole
    assert client.post("/api/upload", params={"name": "a.html"}, content=b"x").status_code == 415
    assert client.post("/api/upload", params={"name": "a.mp4"}, headers={"X-Video-R1": ""}).status_code == 403
    monkeypatch.setattr(clips, "LARGEST", 1000)
    assert client.post("/api/upload", params={"name": "a.mp4"}, content=b"x" * 1001).status_code == 413
    assert [other.name for other in Path(path).parent.iterdir()] == [name]


def test_uploads_count_while_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips sent at once cannot fill the disk: whole ones go, then further bytes are refused."""
    monkeypatch.setattr(clips, "TOGETHER", 1000)
    uploads = clips.Uploads()

    async def pieces(*sizes: int) -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes(size)
            await asyncio.sleep(0)

    async def send() -> tuple[str, list[Any]]:
        whole = await uploads.take("whole.mp4", pieces(500))
        sent = (uploads.take(f"{i}.mp4", pieces(300, 100)) for i in range(3))
        return whole, await asyncio.gather(*sent, return_exceptions=True)

    whole, sent = asyncio.run(send())
    names = [name for name in sent if isinstance(name, str)]
    assert len(names) == 2 and [error.status_code for error in sent if error not in names] == [413]
    folder = uploads.path(names[0]).parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(names) and whole not in names
    uploads.close()


def test_a_question_becomes_a_row(client: TestClient, folder: Path) -> None:
    fields = {"question": "Where to?", "options": ["left", "right"], "answer": "right"}
    row = asked(**fields)
    assert client.post("/api/add", json=row, headers={"X-Video-R1": ""}).status_code == 403
    refused = client.post("/api/add", json=row | {"answer": "up"})
    assert refused.status_code == 422 and "must be one of the options" in refused.json()["error"]
    assert client.post("/api/add", json=asked(question="Where to?")).status_code == 422
    lettered = client.post("/api/add", json=row | {"type": "OCR"})
    assert lettered.status_code == 422 and "options are given" in lettered.json()["error"]
    added = client.post("/api/add", json=row).json()
    assert added["manifest"] == str(folder / "asked.jsonl")
    (line,) = map(json.loads, (folder / "asked.jsonl").read_text().splitlines())
    assert line["path"] == "clips/one.mp4" and line["options"] == ["A. left", "B. right"]
    assert line["solution"] == "<answer>B</answer>" and line["problem_id"] == added["problem_id"]
    assert client.post("/api/add", json=row | {"answer": "B"}).status_code == 409
    assert "asked.jsonl" in client.get("/api/choices").json()["manifests"]
    # A clip of the browser is kept beside the manifest.
    clip = (folder / "clips" / "one.mp4").read_bytes()
    name = client.post("/api/upload", params={"name": "my.mp4"}, content=clip).json()["upload"]
    assert client.post("/api/add", json=row | {"answer": "A", "clip": {"upload": name}}).status_code == 200
    *_, last = map(json.loads, (folder / "asked.jsonl").read_text().splitlines())
    assert (folder / last["path"]).read_bytes() == clip
    (folder / "asked.jsonl").unlink()
    (folder / "asked.jsonl").symlink_to(folder.parent / "elsewhere.jsonl")
    assert client.post("/api/add", json=row | {"answer": "A"}).status_code == 409
    assert not (folder.parent / "elsewhere.jsonl").exists()


def test_a_question_of_text_alone(client: TestClient, folder: Path) -> None:
    """It is asked without a file, looks or contrasts, and becomes a row without a path."""
    words = {"problem_id": 1, "problem": "2 + 2?", "data_type": "text", "problem_type": "numerical"}
    words["solution"] = "<answer>4</answer>"
    (folder / "words.json").write_text(json.dumps([words, words | {"problem_id": 2, "path": ""}]))
    for row in (0, 1):
        clip = {"clip": {"manifest": "words.json", "row": row}, "type": "numerical"}
        told = events(client, **clip, contrasts=["shuffled", "blind"], tools=True)[1]["asked"]
        assert told["orders"] == ["ordered"]
        assert told["settings"]["path"] == "" and "tools" not in told["settings"]
        added = client.post("/api/add", json=asked(**clip, question=f"{row} + 1?", answer=str(row + 1)))
        assert added.status_code == 200, added.text
    lines = [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]
    assert [(line["data_type"], line["solution"]) for line in lines] == [
        ("text", "<answer>1</answer>"), ("text", "<answer>2</answer>"),
    ]  # fmt: skip
    assert len({line["problem_id"] for line in lines}) == 2


def said_by(
    answerer: Answerer, out: io.StringIO, orders: Sequence[str] = (), stopped: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """The events of one question to a process that answers. stopped: nobody listens from the start."""
    out.seek(0)
    out.truncate()
    listening = threading.Event()
    if stopped:
        listening.set()
    answerer.answer({"settings": settings, "orders": ["ordered", "shuffled", *orders]}, listening)
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.slow
def test_the_process_hears_an_engine_at_an_address(folder: Path) -> None:
    """An endpoint that fails becomes a message, and the next question is answered."""
    out = io.StringIO()
    answerer = Answerer(out)
    settings = {
        "engine": "", "model": "", "path": str(folder / "clips" / "one.mp4"), "samples": 2, "answer": "B",
        "question": ["Question 1: where?"], "options": ["left", "right"],
    }  # fmt: skip
    with chat_endpoint() as server:
        settings["engine"] = server.url
        said = said_by(answerer, out, **settings)
        texts = [event for event in said if event["event"] == "text"]
        assert {event["view"] for event in texts} == {0, 1}
        (answers,) = (event for event in said if event["event"] == "answers")
        assert [view["counted"] for view in answers["views"]] == [2, 2]
        server.always = 400
        said = said_by(answerer, out, **settings)
        assert [event["event"] for event in said[-2:]] == ["error", "end"]
        assert "refused a request: HTTP 400" in said[-2]["error"]
        server.always = None
        assert said_by(answerer, out, **settings)[-2]["event"] == "answers"
        said = said_by(answerer, out, stopped=True, **settings)
        assert [event["event"] for event in said[-2:]] == ["state", "end"]
    said = said_by(answerer, out, **settings)  # the engine is gone
    assert said[-2]["event"] == "error" and server.url in said[-2]["error"]


def test_the_process_answers_with_the_lab_base(folder: Path) -> None:
    """Frames once, pieces of text that make the whole, shares; a follow-up decodes nothing."""
    out = io.StringIO()
    answerer = Answerer(out)
    settings = {
        "model": str(base_folder()), "engine": "transformers", "path": str(folder / "clips" / "one.mp4"),
        "options": ["left", "right"], "answer": "B", "samples": 3, "max_new_tokens": 12, "device": "cpu",
    }  # fmt: skip

    def ask(**more: Any) -> list[dict[str, Any]]:
        return said_by(answerer, out, ["blind"], **(settings | more))

    said = ask(question=["Where to, left or right?"])
    (frames,) = (event for event in said if event["event"] == "frames")
    assert frames["decoded"] and frames["count"] == 8 and frames["media"] == "video"
    in_order, shuffled, blind = frames["views"]
    assert in_order["permutation"] is None and blind["permutation"] == []
    assert sorted(shuffled["permutation"]) == list(range(8)) != shuffled["permutation"]
    assert len(frames["timestamps"]) == 8
    (answers,) = (event for event in said if event["event"] == "answers")
    for number, view in enumerate(answers["views"]):
        pieces = [event["text"] for event in said if event["event"] == "text" and event["view"] == number]
        assert len(pieces) > 3 and "".join(pieces) == view["completions"][0]["text"]
        assert len(view["completions"]) == view["share"]["questions"] == 3
        assert (view["gap"] is None) == (number == 0)
    assert said[-1]["event"] == "end"
    (frames,) = (event for event in ask(question=["And then?"]) if event["event"] == "frames")
    assert not frames["decoded"]
    error, end = ask(question=["What?"], path=str(folder / "gone.mp4"))
    assert "gone.mp4: no such file" in error["error"] and end["event"] == "end"
    stopped = ask(question=["Why?"], stopped=True)
    assert [event["event"] for event in stopped[-2:]] == ["state", "end"]


def test_the_process_answers_about_text_alone() -> None:
    out = io.StringIO()
    answerer = Answerer(out)
    answerer.answer({
        "settings": {
            "model": str(base_folder()), "engine": "transformers", "path": "", "question": ["2 + 2?"],
            "samples": 2, "max_new_tokens": 4, "device": "cpu",
        },
        "orders": ["ordered"],
    }, threading.Event())  # fmt: skip
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    (frames,) = (event for event in said if event["event"] == "frames")
    assert (frames["media"], frames["count"], frames["decoded"]) == ("text", 0, False)
    assert len(said[-2]["views"][0]["completions"]) == 2 and said[-1] == {"event": "end"}


def test_turns_with_calls_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_factory, "ToolEngine", Forced)
    out = io.StringIO()
    settings = {
        "model": str(base_folder()), "engine": "transformers", "path": str(folder / "clips" / "one.mp4"),
        "question": ["What?"], "samples": 2, "max_new_tokens": 12, "device": "cpu", "tools": "look",
    }  # fmt: skip
    said = said_by(Answerer(out), out, **settings)
    (answers,) = (event for event in said if event["event"] == "answers")
    first, second = answers["views"][0]["completions"]
    (turn,) = second["turns"]
    assert "turns" not in first and turn["strip"].startswith("data:image/jpeg;base64,")
    assert turn["results"] == ["1 to 3 s:"] and turn["count"] > 1 and turn["times"][0] == 1.0
