"""The report in a real browser: hostile text, both orders of frames, keyboard, width, colour scheme."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import FilePage, chromium, find_chromium
from report_runs import (
    HOSTILE,
    group_of,
    write_demo,
    write_evaluation,
    write_hostile_run,
    write_lines,
    write_rl_run,
)

from video_r1.report.page import build_report
from video_r1.training.recording import record_group

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[FilePage]:
    pytest.importorskip("playwright", reason="playwright is not installed")
    if find_chromium() is None:
        pytest.skip("no chromium on this machine")
    with chromium() as opened:
        yield FilePage(opened)


@pytest.fixture(scope="module")
def rl_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    write_rl_run(run, steps=60, every=5)
    return build_report(run)


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo = tmp_path_factory.mktemp("runs") / "demo"
    write_demo(demo)
    return build_report(demo)


def texts(browser: FilePage, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


def pick(browser: FilePage, select: str, value: str) -> None:
    browser.run(
        f"(s => {{ s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')) }})"
        f"(document.getElementById({json.dumps(select)}))"
    )


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[0])


def check_healthy(browser: FilePage) -> None:
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:image/jpeg"))] == []
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_hostile_text_is_shown_and_never_run(browser: FilePage, tmp_path: Path) -> None:
    run = tmp_path / HOSTILE[1]
    write_hostile_run(run)
    browser.open(build_report(run))
    for _ in range(6):
        browser.press("ArrowLeft")
        assert (
            browser.run("document.querySelectorAll('main img, script, iframe, main svg[onload]').length") == 2
        )
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.settle()
    assert browser.run("window.pwned") is None
    check_healthy(browser)
    shown = browser.run("document.body.innerText")
    for text in HOSTILE[:4] + HOSTILE[5:]:
        assert text in shown
    assert browser.run("document.title") == f"{HOSTILE[1]} · video-r1"
    assert HOSTILE[0] in texts(browser, ".card .text")[0]


def test_policy_stops_a_script_that_got_in(browser: FilePage, rl_page: Path) -> None:
    browser.open(rl_page)
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned=1\">')")
    browser.settle()
    assert browser.run("window.pwned") is None
    assert browser.problems  # the refusal


def test_curves_come_first_and_have_read_outs(browser: FilePage, rl_page: Path) -> None:
    browser.open(rl_page)
    check_healthy(browser)
    assert texts(browser, ".headline .title") == [
        "Accuracy reward",
        "Temporal reward",
        "Response length, tokens",
    ]
    assert "share right, p and p̃" in texts(browser, ".family .title")
    data = data_of(rl_page)
    values = data["runs"][0]["series"]["reward/accuracy"]["y"]
    assert texts(browser, ".headline output b")[0] == f"{float(f'{values[-1]:.3g}'):g}"
    browser.run("document.querySelector('.headline .plot').focus()")
    browser.press("Home")
    browser.settle()
    assert texts(browser, ".headline output")[0] == f"{float(f'{values[0]:.3g}'):g} step 1"
    assert texts(browser, ".headline output")[1].endswith("step 1")  # all charts follow
    browser.press("ArrowRight")
    browser.settle()
    assert browser.run("document.querySelector('.headline .plot').ariaValueNow") == "2"
    before = browser.run("document.querySelector('.headline path.main').getAttribute('d')")
    browser.run(
        "(s => { s.value = 0; s.dispatchEvent(new Event('input')) })"
        "(document.querySelector('input[type=range]'))"
    )
    browser.settle()
    assert browser.run("document.querySelector('.headline path.main').getAttribute('d')") != before


def test_rollouts_turn_pages_and_filter(browser: FilePage, rl_page: Path) -> None:
    browser.open(rl_page)
    browser.run("document.querySelector('#pick-step').focus()")
    pick(browser, "pick-step", "5")
    assert texts(browser, ".position") == ["1 of 24"]
    browser.run("document.activeElement.blur()")
    browser.press("ArrowRight")
    assert texts(browser, ".position") == ["2 of 24"]
    assert texts(browser, ".facts")[0].startswith("step 5 · question 11 · ")
    pick(browser, "pick-media", "image")
    assert 0 < len(texts(browser, "#pick-step option")) < 12
    assert texts(browser, ".column h4") == ["Image"]
    pick(browser, "pick-media", "any")
    pick(browser, "pick-sort", "worst")
    data = data_of(rl_page)
    means = [sum(c["total"] for c in group["ordered"]) / 8 for group in data["runs"][0]["groups"]]
    worst = data["runs"][0]["groups"][means.index(min(means))]
    assert f"question {worst['id']} " in texts(browser, ".facts")[0]
    pick(browser, "pick-outcome", "none")
    assert all(pips == [] for pips in texts(browser, ".ordered .pip.full"))
    check_healthy(browser)


def test_frames_of_both_orders_stand_beside_the_completions(browser: FilePage, tmp_path: Path) -> None:
    record_group(tmp_path, 10, group_of())
    browser.open(build_report(tmp_path))
    check_healthy(browser)
    level = (
        "[...document.querySelectorAll('.{} canvas')]"
        ".map(c => c.getContext('2d').getImageData(14, 14, 1, 1).data[0])"
    )
    assert browser.run(level.format("ordered")) == [10, 120, 240]
    assert browser.run(level.format("shuffled")) == [240, 10, 120]
    assert texts(browser, ".shuffled .time") == ["0.0 s f3", "0.5 s f1", "1.0 s f2"]
    labels = "[...document.querySelectorAll('.shuffled canvas')].map(c => c.ariaLabel)"
    assert browser.run(labels) == ["frame 3 of 3", "frame 1 of 3", "frame 2 of 3"]
    assert texts(browser, ".options .right") == ["B. right ✓ right answer"]
    assert texts(browser, ".ordered .advantage") == ["advantage +0.70", "advantage −0.70"]
    assert browser.run("[...document.querySelectorAll('.ordered .card')].map(c => c.className)") == [
        "card correct positive",
        "card wrong negative",
    ]
    assert texts(browser, ".ordered .card")[0].startswith("advantage +0.70total 1accuracy 15 tokens")
    assert texts(browser, ".ordered .card .think") == ["x"] and texts(browser, ".ordered .card .answer") == [
        "B"
    ]
    assert texts(browser, ".shuffled .advantage") == []


def test_a_frame_can_be_shown_large(browser: FilePage, tmp_path: Path) -> None:
    group = group_of()
    wide = group.prompt.media[0].frames.repeat(1, 1, 8, 15)  # 224 x 420 pixels, a clip at the training budget
    media = replace(group.prompt.media[0], frames=wide)
    record_group(tmp_path, 10, replace(group, prompt=replace(group.prompt, media=(media,))))
    browser.open(build_report(tmp_path), width=1280)
    width = "document.querySelector('{}').getBoundingClientRect().width"
    assert browser.run(width.format(".ordered .tile canvas")) > 125
    before = texts(browser, ".position")
    browser.run("document.querySelectorAll('.shuffled button.frame')[1].click()")
    browser.settle()
    assert browser.run(width.format("dialog canvas")) > 600
    assert texts(browser, "dialog output") == ["frame 1 of 3 · 0.5 s"]
    level = "document.querySelector('dialog canvas').getContext('2d').getImageData(90, 60, 1, 1).data[0]"
    assert browser.run(level) == 10
    browser.press("ArrowRight")  # the next frame of this order, not the next question
    assert (
        texts(browser, "dialog output") == ["frame 2 of 3 · 1.0 s"] and texts(browser, ".position") == before
    )
    assert browser.run(level) == 120
    browser.run("document.querySelector('dialog .close').click()")
    browser.settle()
    assert texts(browser, "dialog") == []
    check_healthy(browser)


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_demo_page(browser: FilePage, demo_page: Path, width: int, dark: bool) -> None:
    browser.open(demo_page, width=width, dark=dark)
    check_healthy(browser)
    assert texts(browser, "h2") == [
        "Curves · rl",
        "Evaluation",
        "Rollouts",
        "Curves · sft",
        "Skipped groups",
        "Media that could not be used",
        "Settings",
    ]
    assert texts(browser, ".scores")[0].count("to") >= 9
    assert browser.run(
        "[...document.querySelector('#evaluation table').tBodies[0].rows].map(r => r.cells[0].textContent)"
    ) == ["base", "sft", "rl"]
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) == dark
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.run("document.querySelector('button.title').click()")  # a chart, large
    browser.settle()
    assert browser.run(SMALL_TEXT) == [] and len(texts(browser, "dialog code")) == 1
    gaps = browser.run(
        "[...document.querySelectorAll('#evaluation .scores tbody tr')].map(r => r.cells[4]).filter(Boolean)"
        ".map(c => c.getBoundingClientRect().right)"
    )
    assert len(gaps) > 9 and all(right <= width for right in gaps)  # seen without scrolling


SMALL_TEXT = """[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length
    && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
    && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [1280, 390])
def test_runs_are_laid_over_each_other(browser: FilePage, tmp_path: Path, width: int) -> None:
    names = ("grpo", "a run whose name is long")
    for name, steps in zip(names, (40, 60), strict=True):
        write_rl_run(tmp_path / name, steps=steps, every=20)
    write_lines(tmp_path / "cold" / "metrics.jsonl", [{"step": s, "loss": 1 / s} for s in range(1, 9)])
    browser.open(build_report([*(tmp_path / name for name in names), tmp_path / "cold"]), width=width)
    check_healthy(browser)
    assert texts(browser, "h2")[:3] == ["Curves · reinforcement learning", "Comparison", "Rollouts"]
    assert "Curves · supervised fine-tuning" in texts(browser, "h2")
    head = "document.querySelector('.headline figure')"
    assert texts(browser, ".headline .title")[:2] == ["Accuracy reward", "temporal gap"]
    assert browser.run(f"{head}.querySelectorAll('path.line').length") == 2
    colours = browser.run(f"[...{head}.querySelectorAll('path.line')].map(p => getComputedStyle(p).stroke)")
    assert len(set(colours)) == 2
    wide = width > 600  # labels at the lines' ends, else a key
    shown = texts(browser, f".headline > :first-child {'.label' if wide else '.key li'}")[:2]
    assert [text.rsplit(" ", 1)[0] for text in sorted(shown)] == (
        ["a run whose nam…", "grpo"] if wide else ["a run whose name is long", "grpo"]
    )
    assert browser.run(f"{head}.querySelector('output').textContent.trim()") == "step 60"
    assert texts(browser, "#comparison th")[:4] == ["series", *names, "cold"][:4]
    assert browser.run(SMALL_TEXT) == []


def test_page_is_accessible(browser: FilePage, demo_page: Path) -> None:
    browser.open(demo_page)
    assert browser.run("document.documentElement.lang") == "en"
    for complaint, expression in {
        "control without a label": "[...document.querySelectorAll('select, input')]"
        ".filter(e => !e.labels.length)",
        "picture without a text": "[...document.querySelectorAll('canvas, .plot')].filter(e => !e.ariaLabel)",
        "table without a caption": "[...document.querySelectorAll('table')].filter(e => !e.caption)",
        "heading cell without a scope": "[...document.querySelectorAll('th')].filter(e => !e.scope)",
        "section without a title": "[...document.querySelectorAll('main > section')].filter(e => "
        "!document.getElementById(e.getAttribute('aria-labelledby')))",
        "id that occurs twice": "[...document.querySelectorAll('[id]')].filter(e => "
        "document.querySelectorAll('#' + CSS.escape(e.id)).length > 1)",
        "link to nowhere": "[...document.querySelectorAll('a')].filter(e => !document.querySelector(e.hash))",
    }.items():
        assert browser.run(f"{expression}.map(e => e.outerHTML.slice(0, 80))") == [], complaint


@pytest.mark.parametrize("kind", ["sft", "evaluation", "rollouts alone", "no steps yet"])
def test_folders_with_little_in_them(browser: FilePage, tmp_path: Path, kind: str) -> None:
    if kind == "sft":
        write_lines(
            tmp_path / "metrics.jsonl", [{"step": s, "loss": 1 / s, "constant": 2.0} for s in range(1, 9)]
        )
    elif kind == "evaluation":
        write_evaluation(tmp_path, 0.7, 0.3)
    elif kind == "rollouts alone":
        record_group(tmp_path, 10, group_of(video=False))
    else:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    browser.open(build_report(tmp_path))
    check_healthy(browser)
    expected = {
        "sft": ["Curves"],
        "evaluation": ["Evaluation"],
        "rollouts alone": ["Rollouts"],
        "no steps yet": [],
    }
    assert texts(browser, "h2") == expected[kind]
    assert ("nothing to draw yet" in texts(browser, "main")[0]) == (kind == "no steps yet")
