"""Every page of the studio as a person meets it: clips before they play, a phone, the keyboard, contrast."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import fits
from chat_endpoint import chat_endpoint
from PIL import Image
from report_runs import write_controls, write_lines, write_rl_run
from studio_screenshots import ask_lab_questions
from studio_server import studio

from video_r1.data.manifests.records import load_manifest
from video_r1.lab.clips import write_lab
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import CONTROLS

pytest.importorskip("starlette", reason="the extra studio is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Locator, Page, Route, expect

pytestmark = pytest.mark.slow

SLOW = 60_000


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's clips, a run that was asked about them, and two evaluations."""
    folder = tmp_path_factory.mktemp("pages")
    write_lab(LabSettings(folder=str(folder / "lab"), train=8, test=12, seed=1))
    samples = [sample for sample in load_manifest(folder / "lab" / "test.json") if sample.options]
    write_rl_run(folder / "rl", steps=10, every=5)
    ask_lab_questions(folder / "rl", [sample for sample in samples if sample.data_type == "video"])
    write_rl_run(folder / "other", steps=12, every=6)
    write_question_about_two(folder)
    for name, rates in (("eval-sft", (0.6, 0.5)), ("eval-rl", (0.8, 0.55))):
        write_controls(folder / name, *rates)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with studio(folder) as (opened, _):
        yield opened


def drawn(video: Locator) -> bool:
    """Whether there is a picture, where no control lies over it."""
    with Image.open(io.BytesIO(video.screenshot())) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    height, width = pixels.shape
    return pixels[height // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8].std() > 4


class HeldClips:
    """Clips that come only when they are let go."""

    def __init__(self, page: Page) -> None:
        self.page, self.waiting = page, list[Route]()
        page.route("**/api/clip*", lambda route: self.waiting.append(route))

    def let_go(self) -> None:
        for route in self.waiting:
            route.continue_()
        self.page.unroute("**/api/clip*")


def test_clips_of_rollouts_show_their_first_frame(page: Page, address: str) -> None:
    held = HeldClips(page)
    page.goto(f"{address}#/run/rl")
    videos = [page.locator(f".column.{order} video") for order in ("ordered", "shuffled")]
    for video in videos:
        expect(video).to_be_visible()
        page.wait_for_function("video => video.poster", arg=video.element_handle())
        page.wait_for_timeout(100)
        assert drawn(video)
    before = page.locator(".cards").first.bounding_box()
    held.let_go()
    for video in videos:
        page.wait_for_function("v => v.readyState > 1 && !v.poster && !v.seeking", arg=video.element_handle())
        assert drawn(video)
    assert page.locator(".cards").first.bounding_box() == before
    # The contrast begins with its own first frame.
    frame = page.locator(".column.shuffled .tile").first.get_attribute("data-frame")
    assert (videos[1].evaluate("video => video.currentTime") > 0) == (frame != "0")


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
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        fits(page)


def test_evaluations_of_five_controls_and_both_ways_of_answering(page: Page, address: str) -> None:
    page.goto(f"{address}#/evaluations/eval-rl/eval-rl%20(direct)")
    table = page.locator(".versus")
    whole = table.locator("tbody").first
    expect(whole.locator("td").nth(2)).to_contain_text("181 tokens")
    expect(whole.locator("td").nth(3)).to_contain_text("7 tokens")
    expect(whole.locator("td").nth(4)).to_contain_text("+174 tokens")
    by_order = table.locator("tbody", has_text="By order of the frames")
    names = by_order.locator("th[scope=row]").all_inner_texts()
    assert names == ["in order", *CONTROLS[1:]]
    expect(by_order.locator("tr", has_text="blind")).to_contain_text("order gains +0.")
    by_order.locator("tr", has_text="blind").get_by_role("button").first.click()
    expect(page.locator("#questions .lead")).to_contain_text(
        "with the frames blind that eval-rl answers better"
    )
    expect(page.locator(".versus-question .column.ordered .text").first).to_contain_text("blind")
    for width in (390, 760, 1280, 2560):
        page.set_viewport_size({"width": width, "height": 900})
        fits(page)
    page.set_viewport_size({"width": 390, "height": 900})
    cell = whole.locator("td").nth(4)
    assert cell.evaluate("cell => getComputedStyle(cell, '::before').content") == '"left minus right"'


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
        for right in ("", '{"boxes": [200, 200, 600, 600]}'):
            page.get_by_label("Right answer").fill(right)
            page.get_by_role("button", name="Ask", exact=True).click()
            newest = page.locator(".answers").first
            expect(newest.locator(".tally b")).to_have_count(5, timeout=SLOW)
            page.wait_for_timeout(300)
            sides = newest.locator(".column.ordered .tile canvas").evaluate_all(colours)
            green, blue = [34, 112, 79, 255], [47, 93, 140, 255]
            assert all((side[0] == green) == bool(right) and side[1] == blue for side in sides), sides
            judged = newest.locator(".card.wrong, .card.correct")
            expect(judged).to_have_count(10 if right else 0)


VIEWS = {  # and what is there when they are
    "": ".runs tbody tr", "#/run/rl": ".card", "#/compare/rl/other": ".headline path.main",
    "#/data/lab%2Ftest.json": ".rows tbody tr", "#/ask": "select[size] option",
    "#/evaluations/eval-rl/eval-sft": ".versus-question",
}  # fmt: skip


def opened(page: Page, address: str, view: str) -> None:
    page.goto(f"{address}{view}")
    expect(page.locator(VIEWS[view]).first).to_be_attached()
    page.wait_for_timeout(1000)


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
