"""The studio in a real browser: every page as a person meets it, also by keyboard and on a phone."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import fits
from chat_endpoint import chat_endpoint
from media_files import write_video
from PIL import Image
from report_runs import (
    HOSTILE,
    group_line,
    metrics_line,
    write_controls,
    write_demo,
    write_evaluation,
    write_hostile_run,
    write_lines,
    write_rl_run,
)
from studio_screenshots import ask_lab_questions
from studio_server import studio

from video_r1.data.manifests.records import load_manifest
from video_r1.files import append_line
from video_r1.lab.clips import write_lab
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import CONTROLS

pytest.importorskip("starlette", reason="the extra studio is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Locator, Page, expect

SLOW = 60_000
LIVE = 2000  # milliseconds from a written line to the screen


def fits_at(page: Page, *widths: int) -> None:
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        fits(page)


def write_question_about_two(folder: Path) -> None:
    """A row with two clips, and a run that has recorded it: four frames of each."""
    rows = [r for r in json.loads((folder / "lab" / "test.json").read_text()) if r["data_type"] == "video"]
    both = {"problem_id": "two", "path": [row["path"] for row in rows[:2]], "problem_type": "free-form"}
    row = rows[0] | both | {"problem": "Do they go the same way?", "solution": "<answer>yes</answer>"}
    row.pop("options", None)
    (folder / "lab" / "two.json").write_text(json.dumps([row]))
    copied = row | {"path": [f"again/{path}" for path in row["path"]]}
    for path in row["path"]:
        (folder / "lab" / "again" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "lab" / path, folder / "lab" / "again" / path)
    (folder / "lab" / "two_again.json").write_text(json.dumps([copied]))
    shutil.copytree(folder / "rl", folder / "two")
    line = json.loads((folder / "two" / "rollouts.jsonl").read_text().splitlines()[0])
    line["frames"] |= {"clips": [4, 4], "timestamps": [0.0, 1.0, 2.0, 3.0] * 2}
    line |= both | {"problem": row["problem"], "answer": "yes", "options": []}
    write_lines(folder / "two" / "rollouts.jsonl", [line | {"permutation": [2, 0, 3, 1, 5, 4, 7, 6]}])


def write_question_backwards(folder: Path) -> None:
    """A row whose clip is played backwards, a row of text alone, and a run that has recorded the first."""
    row = next(r for r in json.loads((folder / "lab" / "test.json").read_text()) if r["data_type"] == "video")
    back = row | {"problem_id": "back", "play": "reversed"}
    words = {"problem_id": "words", "problem": "How much is 2 + 2?", "data_type": "text"}
    words |= {"problem_type": "numerical", "solution": "<answer>4</answer>"}
    (folder / "lab" / "back.json").write_text(json.dumps([back, words]))
    shutil.copytree(folder / "rl", folder / "back")
    line = json.loads((folder / "back" / "rollouts.jsonl").read_text().splitlines()[0])
    line |= back | {"answer": back["solution"].removeprefix("<answer>").removesuffix("</answer>")}
    line["frames"] |= {"timestamps": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5]}
    write_lines(
        folder / "back" / "rollouts.jsonl",
        [line | {"options": back.get("options", []), "permutation": [2, 0, 3, 1, 5, 4, 7, 6]}],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's clips, a run that was asked about them and others, two evaluations, a broken checkpoint."""
    folder = tmp_path_factory.mktemp("pages")
    lab = folder / "lab"
    write_lab(LabSettings(folder=str(lab), train=8, test=12, seed=1))
    samples = [sample for sample in load_manifest(lab / "test.json") if sample.options]
    write_rl_run(folder / "rl", steps=10, every=5)
    ask_lab_questions(folder / "rl", [sample for sample in samples if sample.data_type == "video"])
    write_question_about_two(folder)
    write_question_backwards(folder)
    write_demo(folder / "demo")
    write_rl_run(folder / "live", steps=20, every=5)
    write_rl_run(folder / "other", steps=40, every=5)
    config = folder / "other" / "config.yaml"
    config.write_text(config.read_text().replace("margin", "threshold"))
    for name, rates in (("eval-sft", (0.6, 0.5)), ("eval-rl", (0.8, 0.55))):
        write_controls(folder / name, *rates)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "broken" / "model.safetensors").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with studio(folder) as (opened, _):
        yield opened


def test_studio_curves_and_groups_grow_while_a_run_trains(page: Page, address: str, folder: Path) -> None:
    page.goto(address)
    page.get_by_role("link", name="live").click()
    readout = page.locator(".headline output").first
    expect(readout).to_contain_text("step 20")
    expect(page.locator(".position")).to_have_text("7 of 8")
    random_ = random.Random(3)
    append_line(folder / "live" / "metrics.jsonl", metrics_line(21, 40, random_))
    append_line(
        folder / "live" / "rollouts.jsonl", group_line(folder / "live", 21, 900, random_, 0.5, (8, 56, 56))
    )
    expect(readout).to_contain_text("step 21", timeout=LIVE)
    expect(page.locator(".rollouts .lead")).to_contain_text("9 recorded questions", timeout=LIVE)
    expect(page.locator(".position")).to_have_text("7 of 9")  # the one that is read stays
    for _ in range(2):
        page.get_by_role("button", name="Next →").click()
    expect(page.locator(".facts")).to_contain_text("step 21 · question 900")
    # A series that was not there before gets a chart.
    for step in (22, 23):
        append_line(
            folder / "live" / "metrics.jsonl", metrics_line(step, 40, random_) | {"reward/tidy": step / 40}
        )
    expect(page.get_by_role("button", name="tidy", exact=True)).to_be_visible(timeout=LIVE + 1000)
    # Half a line waits for its end.
    with (folder / "live" / "metrics.jsonl").open("a") as file:
        text = json.dumps(metrics_line(24, 40, random_)) + "\n"
        file.write(text[:200])
        file.flush()
        time.sleep(1.5)
        expect(readout).to_contain_text("step 23")
        file.write(text[200:])
    expect(readout).to_contain_text("step 24", timeout=LIVE)


@pytest.mark.slow
def test_studio_runs_over_each_other(page: Page, address: str) -> None:
    page.goto(address)
    for name in ("compare other", "compare demo/rl"):
        page.get_by_label(name).check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".headline .line")).to_have_count(6)
    row = page.locator("#comparison tbody tr", has_text="temporal_rule")
    expect(row).to_have_text("temporal_rulethresholdmargin")


@pytest.mark.slow
def test_studio_rollouts_and_axes(page: Page, address: str, folder: Path) -> None:
    """Frames are in both orders and play; completions are filtered; charts have two axes."""
    page.goto(f"{address}#/run/other")
    expect(page.locator(".column.shuffled .tile")).to_have_count(8)
    line: dict[str, Any] = next(
        line for line in map(json.loads, (folder / "other" / "rollouts.jsonl").read_text().splitlines())
        if f"question {line['problem_id']} " in page.locator(".facts").inner_text()
    )  # fmt: skip
    for order, frames in (("ordered", list(range(8))), ("shuffled", line["permutation"])):
        shown = page.locator(f".column.{order} .tile").evaluate_all(
            "tiles => tiles.map(t => +t.dataset.frame)"
        )
        assert shown == frames
    page.wait_for_timeout(500)
    painted = "all => all.every(canvas => canvas.getContext('2d').getImageData(9, 9, 1, 1).data[3] > 0)"
    assert page.locator(".tile canvas").evaluate_all(painted)
    page.locator(".column.shuffled .tile button").first.click()
    page.get_by_role("button", name="Play").click()
    for frame in line["permutation"][1:3]:
        expect(page.locator("dialog output")).to_contain_text(f"frame {frame + 1} of 8")
    page.get_by_role("button", name="Close").click()
    page.get_by_label("Outcome").select_option("some")
    recorded = map(json.loads, (folder / "other" / "rollouts.jsonl").read_text().splitlines())
    expect(page.locator(".position")).to_contain_text(f"of {sum(0 < line['p'] < 1 for line in recorded)}")
    page.get_by_label("Across").select_option("time")
    expect(page.locator(".headline output").first).to_contain_text("after 2 min")
    ticks = page.locator(".headline .plot").first.locator("text[y='246']").all_text_contents()
    assert len(ticks) > 3 and len(set(ticks)) == len(ticks), ticks


@pytest.mark.slow
def test_studio_an_answer_streams_beside_other_orders(page: Page, address: str, folder: Path) -> None:
    page.goto(f"{address}#/ask")
    page.get_by_label("Clip from").select_option("lab/test.json")
    rows = page.get_by_label("Question of the manifest")
    expect(rows.locator("option")).to_have_count(12)
    lab = json.loads((folder / "lab" / "test.json").read_text())
    rows.select_option(index=[row["data_type"] for row in lab].index("video"))
    expect(page.get_by_label("Question", exact=True)).not_to_have_value("")
    video = page.locator("video")
    video.evaluate("video => video.play()")
    page.wait_for_timeout(700)
    assert video.evaluate("video => video.currentTime") > 0.2
    # A model that cannot be opened says so, and the page goes on.
    page.get_by_label("Checkpoint").select_option("broken")
    ask = page.get_by_role("button", name="Ask", exact=True)
    ask.click()
    expect(page.locator(".state-line.bad")).to_contain_text("broken", timeout=SLOW)
    page.get_by_label("Checkpoint").select_option("the lab's base")
    page.get_by_label("Answers to each").fill("4")
    page.evaluate(
        "window.seen = {};"
        "const look = () => document.querySelectorAll('.views .text').forEach("
        "  (text, place) => (seen[place] ??= new Set()).add(text.textContent.length));"
        "new MutationObserver(look).observe(document.body, {subtree: true, childList: true})"
    )
    ask.click()
    expect(page.locator(".tally b")).to_have_count(5, timeout=SLOW)
    lengths = page.evaluate("Object.values(window.seen).map(lengths => lengths.size)")
    assert max(lengths) >= 3  # nothing, a part, the whole
    assert page.locator(".answers").get_attribute("data-decoded") == "true"
    frames = "all => all.map(tile => +tile.dataset.frame)"
    orders = [page.locator(f".column:nth-child({n}) .tile").evaluate_all(frames) for n in (1, 2, 3, 4)]
    assert orders[0] == sorted(orders[1]) and orders[1] != orders[0] and orders[2] == orders[0][::-1]
    assert len(set(orders[3])) == 1
    page.get_by_label("Question", exact=True).fill("And what came after it?")
    page.keyboard.press("Enter")
    expect(page.locator(".answers").first.locator(".tally b")).to_have_count(5, timeout=SLOW)
    assert page.locator(".answers").first.get_attribute("data-decoded") == "false"
    page.get_by_role("button", name="Add to manifest").click()
    expect(page.locator(".state-line")).to_contain_text("asked.jsonl")
    assert json.loads((folder / "lab/asked.jsonl").read_text())["problem"] == "And what came after it?"
    # The click on "Stop" comes from the page itself, as soon as it answers: ours could come after the end.
    ask.evaluate(
        "button => {"
        "  const state = document.querySelector('.state-line');"
        "  const stop = (_, watch) => {"
        "    if (state.textContent.startsWith('Answering')) { watch.disconnect(); button.click(); }"
        "  };"
        "  new MutationObserver(stop).observe(state, {childList: true});"
        "  button.click();"
        "}"
    )
    expect(page.locator(".state-line")).to_have_text("Stopped.", timeout=SLOW)
    rows.select_option(index=11)  # answers about another clip go
    expect(page.locator(".answers")).to_have_count(0)
    fits_at(page, 390, 2560)


@pytest.mark.slow
def test_studio_pages_through_a_manifest(page: Page, folder: Path, tmp_path: Path) -> None:
    clips = folder / "lab"
    videos = [row for row in json.loads((clips / "test.json").read_text()) if row["data_type"] == "video"]
    rows = [videos[i % len(videos)] | {"problem_id": i, "data_source": f"set {i % 2}"} for i in range(3000)]
    for row in rows:
        row["pass_rates"] = {"ordered": 0.875, "shuffled": 0.375, "one frame": 0.25}
    rows[0]["problem"] = HOSTILE[1]
    rows[1] |= {"problem": HOSTILE[0] * 50, "problem_type": HOSTILE[1]}
    rows[2999]["problem"] = "Where does the very last one go?"
    (tmp_path / "videos").mkdir()
    for row in videos:
        (tmp_path / row["path"]).write_bytes((clips / row["path"]).read_bytes())
    write_lines(tmp_path / "many.jsonl", rows)
    with studio(tmp_path) as (address, _):
        page.goto(f"{address}#/data")
        expect(page.locator(".position")).to_have_text("1 to 50 of 3\u2009000")
        expect(page.locator(".question")).to_have_text(HOSTILE[1])
        page.get_by_role("button", name="Next →").click()
        expect(page.locator(".position")).to_have_text("51 to 100 of 3\u2009000")
        page.locator(".rows button").nth(4).click()
        expect(page.locator(".facts")).to_contain_text("row 55 · question 54")
        video = page.locator("video")
        video.evaluate("video => video.play()")
        page.wait_for_timeout(700)
        assert video.evaluate("video => video.currentTime") > 0.2
        page.get_by_label("Source").select_option("set 1")
        expect(page.locator(".position")).to_have_text("1 to 50 of 1\u2009500")
        page.get_by_label("with problems").check()
        expect(page.locator(".position")).to_have_text("1 to 1 of 1")
        expect(page.locator(".stage .alerts")).to_contain_text("problem_type is")
        page.get_by_label("with problems").uncheck()
        page.get_by_label("Find").fill("VERY LAST")
        expect(page.locator(".facts")).to_contain_text("row 3\u2009000")
        fits_at(page, 390, 1280, 2560)
        page.get_by_role("link", name="Ask a model about it").click()
        expect(page.get_by_label("Question", exact=True)).to_have_value(rows[2999]["problem"])
        assert page.locator("main img, main script, iframe").count() == 0


@pytest.mark.slow
def test_clips_that_no_browser_plays_are_shown_as_frames(chromium: Browser, tmp_path: Path) -> None:
    """HEVC, MPEG-TS and TIFF on the page Data, in Ask; a damaged file with the reason."""
    row = {"problem": "Which way?", "data_type": "video", "problem_type": "free-form"}
    names = ("hevc.mp4", "plain.ts", "one.tiff", "rotten.mp4")
    rows = [row | {"problem_id": n, "solution": "<answer>left</answer>", "path": n} for n in names]
    rows[2] |= {"data_type": "image"}
    (tmp_path / "clips.json").write_text(json.dumps(rows))
    write_video(tmp_path / "hevc.mp4", frames=16, fps=8, codec="libx265")
    write_video(tmp_path / "plain.ts", frames=16, fps=8)
    Image.new("RGB", (64, 48), (200, 80, 60)).save(tmp_path / "one.tiff")
    (tmp_path / "rotten.mp4").write_bytes(b"nothing")
    page = chromium.new_page()  # its console names the files that it does not play
    with studio(tmp_path) as (address, _):
        page.goto(f"{address}#/data/clips.json")
        for number, frames in enumerate((4, 4, 1)):
            page.locator(".rows button").nth(number).click()
            expect(page.locator(".stage .tile"), names[number]).to_have_count(frames, timeout=SLOW)
        page.locator(".rows button").nth(3).click()
        expect(page.locator(".stage .quiet").first).to_contain_text("rotten.mp4: is not a video")
        fits_at(page, 390, 1280)
        page.goto(f"{address}#/ask/clips.json/0")
        expect(page.locator(".panel .tile")).to_have_count(4, timeout=SLOW)
    page.close()


@pytest.mark.slow
def test_cases_another_axis_of_a_run_that_is_not_there(chromium: Browser, address: str) -> None:
    page, problems = chromium.new_page(), []
    page.on("pageerror", lambda error: problems.append(error))
    page.goto(f"{address}#/run/nothing")
    expect(page.get_by_role("alert")).to_contain_text("there is no such run")
    page.get_by_label("Across").select_option("time")
    page.wait_for_timeout(200)
    assert problems == []
    page.close()


@pytest.mark.slow
def test_evaluations_opens_on_two_that_asked_the_same_questions(page: Page, tmp_path: Path) -> None:
    """The newest answered others; beside them lies their parent, which is none."""
    for age, (name, questions) in enumerate({"other": "y", "new": "x", "old": "x"}.items()):
        write_evaluation(tmp_path / "demo" / name, 0.6, 0.4)
        (tmp_path / "demo" / name / "evaluation.json").write_text(json.dumps({"questions": questions}))
        predictions = tmp_path / "demo" / name / "predictions-8.jsonl"
        os.utime(predictions, (1e9 - age, 1e9 - age))
    with studio(tmp_path) as (address, _):
        page.goto(f"{address}#/evaluations")
        expect(page.get_by_label("Left")).to_have_value("demo/old")
        expect(page.get_by_label("Right")).to_have_value("demo/new")


@pytest.mark.slow
def test_studio_says_that_its_server_is_gone_and_goes_on(chromium: Browser, folder: Path) -> None:
    shown = chromium.new_page()
    with studio(folder) as (address, _):
        shown.goto(address)
        expect(shown.locator(".runs tbody tr")).not_to_have_count(0)
    expect(shown.get_by_role("alert")).to_contain_text("still running?", timeout=6000)
    shown.close()


@pytest.mark.slow
def test_studio_hostile_folder_is_harmless(page: Page, tmp_path: Path) -> None:
    run = tmp_path / "runs" / HOSTILE[1]
    write_hostile_run(run)
    (run / ".lock").write_text("failed: <img src=x onerror=window.pwned=1>")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n" + "x" * 10_000_000 + '\n{"step": 5, "lo')
    with studio(tmp_path / "runs") as (address, _):
        page.goto(address)
        expect(page.locator(".runs tbody tr")).to_have_count(2)
        expect(page.locator(".why").first).to_have_text("<img src=x onerror=window.pwned=1>")
        page.get_by_role("link", name=HOSTILE[1], exact=True).click()
        expect(page.locator(".card").first).to_be_visible()
        expect(page.locator(".headline path.line").first).to_be_visible()
        for _ in range(5):
            page.keyboard.press("ArrowLeft")
        expect(page.locator(".notes li")).to_have_count(2)  # an unreadable line and one that is far too long
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert HOSTILE[0] in page.locator(".card .text").first.inner_text()
        assert page.locator("main img, main script, iframe, main svg[onload]").count() == 0
        fits(page)


def drawn(video: Locator) -> bool:
    """Whether there is a picture, where no control lies over it."""
    with Image.open(io.BytesIO(video.screenshot())) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    height, width = pixels.shape
    return pixels[height // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8].std() > 4


@pytest.mark.slow
def test_all_clips_of_a_row_are_shown(page: Page, address: str) -> None:
    names = ["Clip 1 of 2", "Clip 2 of 2"]
    for view, name in (("#/data/lab%2Ftwo.json", "data"), ("#/ask/lab%2Ftwo.json/0", "ask")):
        page.goto(f"{address}{view}")
        expect(page.locator(".players video"), name).to_have_count(2)
        assert page.locator(".players figcaption").all_inner_texts() == names
        if name == "ask":
            expect(page.get_by_label("Question of the manifest")).to_have_value("0")
        lengths = set()
        for video in page.locator(".players video").all():
            page.wait_for_function("video => video.readyState > 1", arg=video.element_handle())
            lengths.add(video.evaluate("video => video.src"))
            assert drawn(video)
        assert len(lengths) == 2
    page.goto(f"{address}#/run/two")
    said = "This is row 1 of lab/two.json; 1 other row may be meant as well."
    expect(page.locator(".column.ordered")).to_contain_text(said)
    for order, begins in (("ordered", [0, 0]), ("shuffled", [2, 1])):
        videos = page.locator(f".column.{order} .players video")
        expect(videos).to_have_count(2)
        for video, begin in zip(videos.all(), begins, strict=True):
            page.wait_for_function("v => v.readyState > 1 && !v.seeking", arg=video.element_handle())
            assert drawn(video) and abs(video.evaluate("video => video.currentTime") - begin) < 0.1
    fits_at(page, 390, 1280)


@pytest.mark.slow
def test_a_reversed_clip_is_shown_backwards(page: Page, address: str) -> None:
    """From its end to its beginning; in the contrast's order each frame is the one that the model saw."""
    for view in ("#/data/lab%2Fback.json", "#/ask/lab%2Fback.json/0", "#/run/back"):
        page.goto(f"{address}{view}")
        shown = page.locator(".column.ordered .player" if "run" in view else ".player").first
        expect(page.locator("main")).to_contain_text("played backwards")
        shown.get_by_role("button", name="Play backwards").click()
        time.sleep(1.5)
        shown.get_by_role("button", name="Pause").click()
        video = shown.locator("video")
        length, at = video.evaluate("video => [video.duration, video.currentTime]")
        assert length - 2.5 < at < length - 0.5
        assert drawn(video)
    expect(page.locator(".facts")).to_contain_text("played backwards")
    video = page.locator(".column.shuffled .player video")
    page.wait_for_function("v => v.readyState > 1 && !v.seeking", arg=video.element_handle())
    assert abs(video.evaluate("video => video.currentTime") - 2.0) < 0.1  # 0.5 + 2.5 - 1.0
    fits_at(page, 390, 1280)


@pytest.mark.slow
def test_a_question_of_text_alone_is_shown_and_asked_without_pictures(page: Page, address: str) -> None:
    page.goto(f"{address}#/data/lab%2Fback.json")
    page.locator(".rows button").nth(1).click()
    expect(page.locator(".question")).to_have_text("How much is 2 + 2?")
    assert page.locator(".stage .player, .stage .players").count() == 0
    page.get_by_role("link", name="Ask a model about it").click()
    expect(page.get_by_label("Question", exact=True)).to_have_value("How much is 2 + 2?")
    assert page.locator(".panel .player, .panel .players").count() == 0
    expect(page.get_by_label("shuffled")).to_be_hidden()
    expect(page.get_by_label("the model may look")).to_be_hidden()
    page.get_by_label("Checkpoint").select_option("the lab's base")
    page.get_by_label("Answers to each").fill("2")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".views .column")).to_have_count(1, timeout=SLOW)
    expect(page.locator(".views .column")).to_contain_text("A question without pictures.")
    expect(page.locator(".views h4")).to_have_text("Text alone")
    expect(page.locator(".tally b")).to_have_count(1, timeout=SLOW)


@pytest.mark.slow
def test_evaluations_side_by_side_and_one_against_its_controls(page: Page, address: str) -> None:
    page.goto(f"{address}#/evaluations/eval-rl%20(direct)/eval-rl")
    table = page.locator(".versus")
    whole = table.locator("tbody").first
    expect(whole.locator("td").nth(2)).to_contain_text("7 tokens")
    expect(whole.locator("td").nth(3)).to_contain_text("181 tokens")
    expect(whole.locator("td").nth(4)).to_contain_text("+174 tokens")
    by_order = table.locator("tbody", has_text="By order of the frames")
    names = by_order.locator("th[scope=row]").all_inner_texts()
    assert names == ["in order", *CONTROLS[1:]]
    expect(by_order.locator("tr", has_text="blind")).to_contain_text("gap +0.")
    by_order.locator("tr", has_text="blind").get_by_role("button").last.click()
    lead = page.locator("#questions .lead")
    expect(lead).to_contain_text("with the frames blind that eval-rl answers better")
    expect(page.locator(".versus-question .column.right .text").first).to_contain_text("blind")
    before = page.locator(".versus-question .facts").first.inner_text()
    page.get_by_role("button", name="left wins").click()
    expect(page.locator(".versus-question .facts").first).not_to_have_text(before)
    fits_at(page, 390, 760, 1280, 2560)
    page.set_viewport_size({"width": 390, "height": 900})
    cell = whole.locator("td").nth(4)
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"right minus left"'
    page.goto(f"{address}#/run/eval-rl")
    expect(page.locator("#scores thead th").nth(5)).to_have_text("temporal gap")
    page.get_by_label("In order against").select_option("blind")
    expect(page.locator("#scores thead th").nth(3)).to_have_text("blind")
    sides = page.locator("#scores tbody tr").first.locator("td")
    heads = sides.evaluate_all(
        "all => all.slice(2, 4).map((td) => { const style = getComputedStyle(td, '::before');"
        " return [style.content, style.color]; })"
    )
    tints = page.evaluate(
        "['shuffled', 'ordered'].map((name) => { const node = make('i', {}); document.body.append(node);"
        " node.style.color = `var(--${name})`; return getComputedStyle(node).color; })"
    )
    assert heads == [['"blind"', tints[0]], ['"in order"', tints[1]]]
    page.get_by_role("button", name="neither right").click()
    expect(lead).to_contain_text("neither answers right")


@pytest.mark.slow
def test_the_default_is_a_pair_that_can_be_compared(page: Page, tmp_path: Path) -> None:
    """After a demo: the newest checkpoint against the one before, not a folder with both of them."""
    for name, rates in (("eval-base", (0.2, 0.2)), ("eval-sft", (0.5, 0.4)), ("eval-rl", (0.8, 0.5))):
        write_evaluation(tmp_path / "demo" / name, *rates)
    with studio(tmp_path) as (address, _):
        page.goto(f"{address}#/evaluations")
        expect(page.get_by_label("Right")).to_have_value("demo/eval-rl")
        expect(page.get_by_label("Left")).to_have_value("demo/eval-sft")
        expect(page.locator(".versus tbody td b").nth(2)).to_contain_text("+0.")


@pytest.mark.slow
def test_boxes_of_an_answer_are_drawn_on_the_frames(page: Page, address: str) -> None:
    with chat_endpoint() as server:
        server.right = '{"boxes": [400, 400, 900, 900]}'
        page.goto(f"{address}#/ask")
        expect(page.get_by_label("Clip from").locator("option", has_text="lab/test.json")).to_be_attached()
        page.get_by_label("Clip from").select_option("lab/test.json")
        page.get_by_label("Question of the manifest").select_option(index=0)
        expect(page.locator(".player video")).to_be_visible()
        page.get_by_text("an engine's address instead").click()
        page.get_by_label("Address").fill(server.url)
        page.get_by_label("Question", exact=True).fill("Question 1: where?")
        page.get_by_label("Options").fill("")
        page.get_by_label("Type").select_option("spatial grounding")
        page.get_by_label("Answers to each").fill("2")
        colours = """all => all.map(canvas => {
          const size = canvas.width, copy = document.createElement('canvas');
          [copy.width, copy.height] = [size, size];
          const pen = copy.getContext('2d', { willReadFrequently: true });
          pen.drawImage(canvas, 0, 0);
          const colour = (share) => [...pen.getImageData(Math.round(size * share), size / 2, 1, 1).data];
          return [colour(0.2), colour(0.4)]; })"""
        page.get_by_label("Right answer").fill('{"boxes": [200, 200, 600, 600]}')
        page.get_by_role("button", name="Ask", exact=True).click()
        answers = page.locator(".answers")
        expect(answers.locator(".tally b")).to_have_count(5, timeout=SLOW)
        page.wait_for_timeout(300)
        sides = answers.locator(".column.ordered .tile canvas").evaluate_all(colours)
        assert all(side == [[34, 112, 79, 255], [47, 93, 140, 255]] for side in sides), sides
        expect(answers.locator(".card.wrong, .card.correct")).to_have_count(10)


VIEWS = {  # and what is there when they are
    "": ".runs tbody tr", "#/run/rl": ".card", "#/run/eval-rl": ".versus-question",
    "#/compare/rl/other": ".headline path.main",
    "#/data/lab%2Ftest.json": ".rows tbody tr", "#/ask": "select[size] option",
    "#/evaluations/eval-rl/eval-sft": ".versus-question",
}  # fmt: skip


def opened(page: Page, address: str, view: str) -> None:
    page.goto(f"{address}{view}")
    expect(page.locator(VIEWS[view]).first).to_be_attached()
    page.wait_for_timeout(1000)


@pytest.mark.slow
def test_rows_and_frames_by_arrow_keys(page: Page, address: str) -> None:
    opened(page, address, "#/data/lab%2Ftest.json")
    rows = page.locator(".rows button")
    rows.first.focus()
    for key, row in (("ArrowDown", 2), ("ArrowDown", 3), ("ArrowUp", 2)):
        page.keyboard.press(key)
        expect(page.locator(".stage .facts")).to_contain_text(f"row {row} ·")
        expect(rows.nth(row - 1)).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("Boolean(document.activeElement.closest('.stage'))")  # not through all rows
    opened(page, address, "#/run/rl")
    tile = page.locator(".column.shuffled .tile button").nth(2)
    tile.focus()
    expect(page.locator(".tile.same")).to_have_count(2)
    page.keyboard.press("Enter")
    before = page.locator("dialog output").inner_text()
    page.keyboard.press("ArrowRight")
    expect(page.locator("dialog output")).not_to_have_text(before)
    page.keyboard.press("Escape")
    expect(tile).to_be_focused()


FAINT = """() => {
  const parse = (colour) => {
    const [r, g, b, alpha = 1] = colour.match(/[\\d.]+/g).map(Number);
    return [...(colour.startsWith('color(') ? [r * 255, g * 255, b * 255] : [r, g, b]), alpha];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const line = (node) => (node ? [...line(node.parentElement), getComputedStyle(node)] : []);
  const written = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.querySelectorAll('body *')]
    .filter((node) => node.checkVisibility() && !node.closest(':disabled') && written(node))
    .flatMap((node) => {
      const styles = line(node), own = styles[styles.length - 1];
      const layers = styles.map((style) => parse(style.backgroundColor));
      const ground = layers.reduce((below, layer) => over(layer, below), [255, 255, 255]);
      const [r, g, b, alpha] = parse(node instanceof SVGElement ? own.fill : own.color);
      const opacity = styles.reduce((all, style) => all * Number(style.opacity), alpha);
      const [low, high] = [over([r, g, b, opacity], ground), ground].map(luminance).sort((x, y) => x - y);
      const ratio = (high + 0.05) / (low + 0.05);
      return ratio < 4.5 ? [[ratio.toFixed(2), node.outerHTML.slice(0, 110)]] : [];
    });
}"""


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_every_page_can_be_read_and_fits_a_phone(page: Page, address: str, view: str) -> None:
    """Contrast of at least 4.5 to 1 (WCAG), light and dark; nothing scrolls sideways at 390 pixels."""
    opened(page, address, view)
    assert page.evaluate(FAINT) == []
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(FAINT) == []
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    fits(page)
