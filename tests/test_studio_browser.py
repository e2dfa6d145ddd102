"""The studio in a real browser: curves that grow, rollouts, runs over each other, hostile text."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import fits
from chat_endpoint import chat_endpoint
from report_runs import (
    HOSTILE,
    group_line,
    metrics_line,
    write_demo,
    write_evaluation,
    write_hostile_run,
    write_lines,
    write_rl_run,
)
from studio_server import studio

from video_r1.files import append_line
from video_r1.lab.clips import write_lab
from video_r1.settings.commands import LabSettings

pytest.importorskip("starlette", reason="the extra studio is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect

SLOW = 60_000
LIVE = 2000  # milliseconds from a written line to the screen


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_demo(folder / "demo")
    write_rl_run(folder / "live", steps=20, every=5)
    write_rl_run(folder / "other", steps=40, every=5)
    config = folder / "other" / "config.yaml"
    config.write_text(config.read_text().replace("margin", "weight"))
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with studio(runs) as (opened, _):
        yield opened


def test_studio_curves_and_groups_grow_while_a_run_trains(page: Page, address: str, runs: Path) -> None:
    page.goto(address)
    page.get_by_role("link", name="live").click()
    readout = page.locator(".headline output").first
    expect(readout).to_contain_text("step 20")
    expect(page.locator(".position")).to_have_text("7 of 8")
    random_ = random.Random(3)
    append_line(runs / "live" / "metrics.jsonl", metrics_line(21, 40, random_))
    append_line(
        runs / "live" / "rollouts.jsonl", group_line(runs / "live", 21, 900, random_, 0.5, (8, 56, 56))
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
            runs / "live" / "metrics.jsonl", metrics_line(step, 40, random_) | {"reward/tidy": step / 40}
        )
    expect(page.get_by_role("button", name="tidy", exact=True)).to_be_visible(timeout=LIVE + 1000)
    # Half a line waits for its end.
    with (runs / "live" / "metrics.jsonl").open("a") as file:
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
    expect(row).to_have_text("temporal_ruleweightmargin")


@pytest.mark.slow
def test_studio_rollouts_and_axes(page: Page, address: str, runs: Path) -> None:
    """Frames are in both orders and play; completions are filtered; charts have three axes."""
    page.goto(f"{address}#/run/other")
    expect(page.locator(".column.shuffled .tile")).to_have_count(8)
    line: dict[str, Any] = next(
        line for line in map(json.loads, (runs / "other" / "rollouts.jsonl").read_text().splitlines())
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
    expect(page.locator(".position")).to_have_text("15 of 16")
    page.get_by_label("Across").select_option("time")
    expect(page.locator(".headline output").first).to_contain_text("after 2 min")
    page.get_by_label("Across").select_option("tokens")
    expect(page.locator(".headline output").first).to_contain_text("tokens 1")


@pytest.mark.slow
def test_studio_lists_skipped_groups(page: Page, address: str) -> None:
    page.goto(f"{address}#/run/demo%2Frl")
    rows = page.locator(".skipped tbody tr")
    expect(rows).to_have_count(50)
    expect(rows.first).to_contain_text("no variance: all answers earn 1; replaced by question 3150")
    page.get_by_role("button", name="Older →").click()
    expect(page.locator("#skipped output")).to_have_text("51 to 100 of 152")
    page.get_by_label("Reason").select_option("media")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("there is no video stream")
    expect(page.get_by_label("Reason").locator("option").first).to_have_text("any · 152")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_lab(LabSettings(folder=str(folder), train=4, test=12, seed=1))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (folder / "broken" / "model.safetensors").write_bytes(b"nothing")
    return folder


@pytest.mark.slow
def test_studio_an_answer_streams_beside_other_orders(page: Page, clips: Path) -> None:
    with studio(clips) as (address, _):
        page.goto(f"{address}#/ask")
        page.get_by_label("Clip from").select_option("test.json")
        rows = page.get_by_label("Question of the manifest")
        expect(rows.locator("option")).to_have_count(12)
        first = [row["data_type"] for row in json.loads((clips / "test.json").read_text())].index("video")
        rows.select_option(index=first)
        expect(page.get_by_label("Question", exact=True)).not_to_have_value("")
        video = page.locator("video")
        video.evaluate("video => video.play()")
        page.wait_for_timeout(700)
        assert video.evaluate("video => video.currentTime") > 0.2
        # A model that cannot be opened says so, and the page goes on.
        page.get_by_label("Checkpoint").select_option("broken")
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".state-line.bad")).to_contain_text("broken", timeout=SLOW)
        page.get_by_label("Checkpoint").select_option("the lab's base")
        page.get_by_label("Answers to each").fill("4")
        page.evaluate(
            "window.seen = {};"
            "const look = () => document.querySelectorAll('.views .text').forEach("
            "  (text, place) => (seen[place] ??= new Set()).add(text.textContent.length));"
            "new MutationObserver(look).observe(document.body, {subtree: true, childList: true})"
        )
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".tally b")).to_have_count(5, timeout=SLOW)
        lengths = page.evaluate("Object.values(window.seen).map(lengths => lengths.size)")
        assert max(lengths) >= 3  # nothing, a part, the whole
        assert page.locator(".answers").get_attribute("data-decoded") == "true"
        frames = "all => all.map(tile => +tile.dataset.frame)"
        orders = [page.locator(f".column:nth-child({n}) .tile").evaluate_all(frames) for n in (1, 2, 3, 4)]
        assert orders[0] == sorted(orders[1]) and orders[1] != orders[0] and orders[2] == orders[0][::-1]
        assert len(set(orders[3])) == 1
        page.get_by_label("Question", exact=True).fill("And what came after it?")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".answers").first.locator(".tally b")).to_have_count(5, timeout=SLOW)
        assert page.locator(".answers").first.get_attribute("data-decoded") == "false"
        page.get_by_role("button", name="Add to manifest").click()
        expect(page.locator(".state-line")).to_contain_text("asked.jsonl")
        assert json.loads((clips / "asked.jsonl").read_text())["problem"] == "And what came after it?"
        for width in (390, 2560):
            page.set_viewport_size({"width": width, "height": 900})
            fits(page)


@pytest.mark.slow
def test_studio_an_engine_is_heard_word_by_word_and_stopped(page: Page, clips: Path) -> None:
    """At an address: reasoning and answer apart, Stop, an engine that dies as it writes."""
    with studio(clips) as (address, _), chat_endpoint() as server:
        server.beat, server.always = 0.1, "apart"
        page.goto(f"{address}#/ask")
        page.get_by_label("Clip from").select_option("test.json")
        first = [row["data_type"] for row in json.loads((clips / "test.json").read_text())].index("video")
        page.get_by_label("Question of the manifest").select_option(index=first)
        page.get_by_text("an engine's address instead").click()
        page.get_by_label("Address").fill(server.url)
        page.get_by_label("Question", exact=True).fill("Question 1: where?")
        page.get_by_label("Answers to each").fill("2")
        ask_button, said = page.get_by_role("button", name="Ask", exact=True), page.locator(".state-line")
        ask_button.click()
        text = page.locator(".answers").first.locator(".text").first
        expect(text.locator(".think")).to_contain_text("In question 1", timeout=SLOW)
        assert "ends" not in text.inner_text()  # it is still being written
        expect(page.locator(".tally b")).to_have_count(5, timeout=SLOW)
        assert text.locator(".answer").inner_text() == "B" and "ends" in text.locator(".think").inner_text()
        server.beat = 0.5
        ask_button.click()
        expect(page.locator(".answers").first.locator(".think").first).to_contain_text("In question")
        page.get_by_role("button", name="Stop").click()
        expect(said).to_have_text("Stopped.")
        server.beat, server.always = 0.0, "dies"
        ask_button.click()
        expect(page.locator(".state-line.bad")).to_contain_text("broke off", timeout=SLOW)
        expect(page.locator(".answers .views").first).to_contain_text("In question 1")
        page.get_by_role("link", name="Runs").click()
        expect(page.locator("h1")).to_have_text("Runs")


@pytest.mark.slow
def test_studio_pages_through_a_manifest(page: Page, clips: Path, tmp_path: Path) -> None:
    videos = [row for row in json.loads((clips / "test.json").read_text()) if row["data_type"] == "video"]
    rows = [videos[i % len(videos)] | {"problem_id": i, "data_source": f"set {i % 2}"} for i in range(3000)]
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
        expect(page.locator(".alerts")).to_contain_text("problem_type is")
        page.get_by_label("with problems").uncheck()
        page.get_by_label("Find").fill("VERY LAST")
        expect(page.locator(".facts")).to_contain_text("row 3\u2009000")
        for width in (390, 1280, 2560):
            page.set_viewport_size({"width": width, "height": 900})
            fits(page)
        page.get_by_role("link", name="Ask a model about it").click()
        expect(page.get_by_label("Question", exact=True)).to_have_value(rows[2999]["problem"])
        assert page.locator("main img, main script, iframe").count() == 0


@pytest.mark.slow
def test_studio_evaluations_side_by_side(page: Page, tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval-rl", 0.7, 0.5)
    write_evaluation(tmp_path / "eval-sft", 0.5, 0.5)
    with studio(tmp_path) as (address, _):
        page.goto(f"{address}#/evaluations")
        expect(page.locator(".versus caption")).to_contain_text("both have answered")
        expect(page.locator(".versus-question")).to_have_count(20)
        before = page.locator(".versus-question .facts").first.inner_text()
        page.get_by_role("button", name="right wins").click()
        expect(page.locator(".versus-question .facts").first).not_to_have_text(before)
        page.locator(".versus tr", has_text="digits").first.get_by_role("button").first.click()
        expect(page.locator("#questions .lead")).to_contain_text("digits")
        for width in (390, 1280, 2560):
            page.set_viewport_size({"width": width, "height": 900})
            fits(page)


@pytest.mark.slow
def test_studio_works_by_keyboard(page: Page, address: str) -> None:
    page.goto(address)
    link = page.get_by_role("link", name="other")
    expect(link).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if link.evaluate("node => node === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.locator(".headline path.main").first).to_be_visible()
    expect(page.locator(".card").first).to_be_visible()
    before = page.locator(".position").inner_text()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".position")).not_to_have_text(before)
    page.goto(f"{address}#/compare/other/demo%2Frl")
    expect(page.locator(".headline path.main").first).to_be_visible()
    for width in (390, 2560):
        page.set_viewport_size({"width": width, "height": 900})
        fits(page)


@pytest.mark.slow
def test_studio_says_that_its_server_is_gone_and_goes_on(studio_browser: Browser, runs: Path) -> None:
    shown = studio_browser.new_page()
    with studio(runs) as (address, _):
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
