"""The report in a real browser: hostile text, both orders of frames, keyboard, width, colour scheme."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import fits, settle, show
from report_runs import (
    HOSTILE,
    data_of,
    group_of,
    write_demo,
    write_evaluation,
    write_hostile_run,
    write_lines,
    write_looks,
    write_rl_run,
)

from video_r1.report.page import build_report
from video_r1.training.recording import record_group

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow


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


def texts(page: Page, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


def pick(page: Page, select: str, value: str) -> None:
    page.evaluate(
        f"(s => {{ s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')) }})"
        f"(document.getElementById({json.dumps(select)}))"
    )


def test_hostile_text_is_shown_and_never_run(page: Page, tmp_path: Path) -> None:
    run = tmp_path / HOSTILE[1]
    write_hostile_run(run)
    show(page, build_report(run))
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
        assert (
            page.evaluate("document.querySelectorAll('main img, script, iframe, main svg[onload]').length")
            == 2
        )
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    settle(page)
    fits(page)
    shown = page.evaluate("document.body.innerText")
    for text in HOSTILE[:4] + HOSTILE[5:]:
        assert text in shown
    assert page.evaluate("document.title") == f"{HOSTILE[1]} · video-r1"
    assert HOSTILE[0] in texts(page, ".card .text")[0]


def test_policy_stops_a_script_that_got_in(chromium: Browser, rl_page: Path) -> None:
    page, problems = chromium.new_page(), []
    page.on("console", lambda said: problems.append(said.text))
    show(page, rl_page)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned=1\">')")
    settle(page)
    assert page.evaluate("window.pwned") is None
    assert problems  # the refusal
    page.close()


def test_curves_come_first_and_have_read_outs(page: Page, rl_page: Path) -> None:
    show(page, rl_page)
    fits(page)
    assert texts(page, ".headline .title") == [
        "Accuracy reward",
        "Temporal reward",
        "Response length, tokens",
    ]
    assert "share right of videos, p and p̃" in texts(page, ".family .title")
    assert "shuffled" in page.inner_text("main") and "null" not in page.inner_text("main")
    data = data_of(rl_page)
    values = data["runs"][0]["points"]["series"]["reward/accuracy"]
    assert texts(page, ".headline output b")[0] == f"{float(f'{values[-1]:.3g}'):g}"
    page.evaluate("document.querySelector('.headline .plot').focus()")
    page.keyboard.press("Home")
    settle(page)
    assert texts(page, ".headline output")[0] == f"{float(f'{values[0]:.3g}'):g} step 1"
    assert texts(page, ".headline output")[1].endswith("step 1")  # all charts follow
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.evaluate("document.querySelector('.headline .plot').ariaValueNow") == "2"
    before = page.evaluate("document.querySelector('.headline path.main').getAttribute('d')")
    page.evaluate(
        "(s => { s.value = 0; s.dispatchEvent(new Event('input')) })"
        "(document.querySelector('input[type=range]'))"
    )
    settle(page)
    assert page.evaluate("document.querySelector('.headline path.main').getAttribute('d')") != before


def test_series_are_told_apart_and_named(page: Page, rl_page: Path) -> None:
    """Labels are whole, paints differ, credit is one picture, tables end with a row, zero has no sign."""
    show(page, rl_page)
    edges = (
        "[...document.querySelectorAll('.headline .label')].map((label) => {"
        " const [a, b] = [label, label.ownerSVGElement].map((node) => node.getBoundingClientRect());"
        " return [label.textContent, a.right - b.right, a.bottom - b.bottom, b.top - a.top]; })"
    )
    labels = page.evaluate(edges)
    assert len(labels) == 8 and "…" not in str(labels)
    assert all(max(over) <= 0 for _, *over in labels), labels
    runs = "...Array.from({ length: 20 }, (_, i) => paintOf(i))"
    orders = "...['ordered', ...Object.keys(CONTRASTS)].map((name) => linePaint(name, ''))"
    paints = page.evaluate(f"[{runs}, {orders}].map((paint) => paint.colour + paint.dash)")
    assert len(set(paints)) == 27
    family = page.locator(".family", has_text="Credit: which reward moved the advantages")
    assert family.locator("figure").count() == 2 and family.locator(".meaning").count() == 2
    assert [text.split()[0] for text in family.locator(".key").first.locator("li").all_inner_texts()] == [
        "accuracy", "format", "length",
    ]  # fmt: skip
    cut = (
        "[...document.querySelectorAll('#left-out tbody tr')].filter((row) => {"
        " const [a, b] = [row, row.closest('.scroll')].map((node) => node.getBoundingClientRect());"
        " return a.top < b.bottom - 1 && a.bottom > b.bottom + 1; }).length"
    )
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        assert page.evaluate(cut) == 0
    zeros = page.evaluate("[show(-0.0004, 2), signed(-0.0004), signed(0.0004), signed(-0.006), show(-0)]")
    assert zeros == ["0.00", "0.00", "0.00", "−0.01", "0"]


def test_page_opens_on_a_group_that_teaches(page: Page, tmp_path: Path) -> None:
    """A late one whose answers differ; a group of equal answers, or of right ones alone, only if all are."""
    for step, rewards in enumerate(([1.0, 0.0], [1.0, 1.0], [0.0, 0.0])):
        record_group(tmp_path, step, group_of(step, rewards))
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        line["p"] = sum(c["rewards"]["accuracy"] for c in line["ordered"]) / 2
        line |= {"shuffled": [], "p_shuffled": None}  # with a rule that samples no contrast
    write_lines(tmp_path / "rollouts.jsonl", lines)
    show(page, build_report(tmp_path))
    assert texts(page, ".position") == ["1 of 3"]


def test_rollouts_turn_pages_and_filter(page: Page, rl_page: Path) -> None:
    show(page, rl_page)
    page.evaluate("document.querySelector('#pick-step').focus()")
    pick(page, "pick-step", "5")
    assert texts(page, ".position") == ["1 of 24"]
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert texts(page, ".position") == ["2 of 24"]
    assert texts(page, ".facts")[0].startswith("step 5 · question 11 · ")
    pick(page, "pick-media", "image")
    assert 0 < len(texts(page, "#pick-step option")) < 12
    assert texts(page, ".column h4") == ["Image"]
    pick(page, "pick-media", "any")
    pick(page, "pick-sort", "worst")
    data = data_of(rl_page)
    means = [sum(c["total"] for c in group["ordered"]) / 8 for group in data["runs"][0]["groups"]]
    worst = data["runs"][0]["groups"][means.index(min(means))]
    assert f"question {worst['id']} " in texts(page, ".facts")[0]
    pick(page, "pick-outcome", "none")
    assert all(pips == [] for pips in texts(page, ".ordered .pip.full"))
    fits(page)


def test_frames_of_both_orders_stand_beside_the_completions(page: Page, tmp_path: Path) -> None:
    record_group(tmp_path, 10, group_of())
    show(page, build_report(tmp_path))
    fits(page)
    level = (
        "[...document.querySelectorAll('.{} canvas')]"
        ".map(c => c.getContext('2d').getImageData(14, 14, 1, 1).data[0])"
    )
    assert page.evaluate(level.format("ordered")) == [10, 120, 240]
    assert page.evaluate(level.format("shuffled")) == [240, 10, 120]
    assert texts(page, ".shuffled .time") == ["0.0 s f3", "0.5 s f1", "1.0 s f2"]
    labels = "[...document.querySelectorAll('.shuffled canvas')].map(c => c.ariaLabel)"
    assert page.evaluate(labels) == ["frame 3 of 3", "frame 1 of 3", "frame 2 of 3"]
    assert texts(page, ".options .right") == ["B. right ✓ right answer"]
    assert texts(page, ".ordered .advantage") == ["advantage +0.70", "advantage −0.70"]
    assert page.evaluate("[...document.querySelectorAll('.ordered .card')].map(c => c.className)") == [
        "card correct positive",
        "card wrong negative",
    ]
    assert texts(page, ".ordered .card")[0].startswith("advantage +0.70total 1accuracy 15 tokens")
    assert texts(page, ".ordered .card .think") == ["x"] and texts(page, ".ordered .card .answer") == ["B"]
    assert texts(page, ".shuffled .advantage") == []


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_demo_page(page: Page, demo_page: Path, width: int, dark: bool) -> None:
    show(page, demo_page, width=width, dark=dark)
    fits(page)
    assert texts(page, "h2") == [
        "Curves · rl",
        "Evaluation",
        "Rollouts",
        "Curves · sft",
        "Skipped groups",
        "Media that could not be used",
        "Settings",
    ]
    assert texts(page, ".scores")[0].count("to") >= 9
    assert page.evaluate(
        "[...document.querySelector('#evaluation table').tBodies[0].rows].map(r => r.cells[0].textContent)"
    ) == ["base", "sft", "rl"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) == dark
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate("document.querySelector('button.title').click()")  # a chart, large
    settle(page)
    fits(page)
    assert len(texts(page, "dialog code")) == 1
    gaps = page.evaluate(
        "[...document.querySelectorAll('#evaluation .scores tbody .gap')]"
        ".map(c => c.getBoundingClientRect().right)"
    )
    assert len(gaps) > 9 and all(right <= width for right in gaps)  # seen without scrolling


@pytest.mark.parametrize("width", [1280, 390])
def test_runs_are_laid_over_each_other(page: Page, tmp_path: Path, width: int) -> None:
    names = ("grpo", "a run whose name is long")
    for name, steps in zip(names, (40, 60), strict=True):
        write_rl_run(tmp_path / name, steps=steps, every=20)
    write_lines(tmp_path / "cold" / "metrics.jsonl", [{"step": s, "loss": 1 / s} for s in range(1, 9)])
    show(page, build_report([*(tmp_path / name for name in names), tmp_path / "cold"]), width=width)
    fits(page)
    assert texts(page, "h2")[:3] == ["Curves · reinforcement learning", "Comparison", "Rollouts"]
    assert "Curves · supervised fine-tuning" in texts(page, "h2")
    head = "document.querySelector('.headline figure')"
    assert texts(page, ".headline .title")[:2] == ["Accuracy reward", "temporal gap"]
    assert page.evaluate(f"{head}.querySelectorAll('path.line').length") == 2
    colours = page.evaluate(f"[...{head}.querySelectorAll('path.line')].map(p => getComputedStyle(p).stroke)")
    assert len(set(colours)) == 2
    wide = width > 600  # labels at the lines' ends, else a key
    shown = texts(page, f".headline > :first-child {'.label' if wide else '.key li'}")[:2]
    assert [text.rsplit(" ", 1)[0] for text in sorted(shown)] == (["a run whose name is long", "grpo"])
    assert page.evaluate(f"{head}.querySelector('output').textContent.trim()") == "step 60"
    assert texts(page, "#comparison th")[:4] == ["series", *names, "cold"][:4]


def test_words_have_the_teachers_colours_and_a_legend(page: Page, tmp_path: Path) -> None:
    """Those of earlier turns too; words that the teacher finds likelier look unlike the others."""
    record_group(tmp_path, 1, group_of())
    line = json.loads((tmp_path / "rollouts.jsonl").read_text())
    words = {"word_logprobs": [["More", -3.0, -0.5], [" less", -0.5, -3.0], [" same", -1.0, -1.0]]}
    look = {"text": "More less same", "calls": [{"name": "look", "result": "1 to 2 s:"}]}
    line["ordered"][0] |= words | {"turns": [look | words]}
    write_lines(tmp_path / "rollouts.jsonl", [line])
    show(page, build_report(tmp_path))
    fits(page)
    shades = "[...document.querySelectorAll('.card .shaded')].map(e => getComputedStyle(e).backgroundColor)"
    colours = page.evaluate(shades)
    assert len(colours) == 6 and colours[:3] == colours[3:] and len(set(colours)) == 3
    assert texts(page, ".legend") == ["Words that the teacher finds likelier or less likely than the policy"]
    assert "1 of 2 right" in texts(page, ".tally")[0]
    for completion in line["ordered"]:
        completion["rewards"] = {}
    write_lines(tmp_path / "rollouts.jsonl", [line])
    kl = [{"step": s, "teacher/kl": 1 / s, "completion/length": 9.0} for s in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", kl)
    (tmp_path / "config.yaml").write_text('temporal_rule: "off"\nteacher_model_name_or_path: big\n')
    show(page, build_report(tmp_path))
    assert texts(page, ".headline .title") == ["KL to the teacher", "Response length, tokens"]
    assert texts(page, ".intro")[0].startswith("A teacher scores") and len(texts(page, ".intro")) == 1
    assert texts(page, ".tally")[0].strip().startswith("p = 0.5 ·")  # no reward says which are right
    line["ordered"][0] = {"word_drops": [["x", 0.5]], "text": "x", "rewards": {}}
    write_lines(tmp_path / "rollouts.jsonl", [line])
    show(page, build_report(tmp_path))
    assert texts(page, ".legend") == ["Words that are less likely with the contrast clip: frames shuffled"]


def test_gaps_have_intervals(page: Page, tmp_path: Path) -> None:
    """A contrast's gap is below its mean; bounds of a validation's gap are lines of its chart."""
    names = ("eval_temporal_gap", "eval_temporal_gap_low", "eval_temporal_gap_high")
    lines = [{"step": s} | {name: 0.1 * n for n, name in enumerate(names)} for s in range(1, 9)]
    write_lines(tmp_path / "rl" / "metrics.jsonl", lines)
    write_looks(tmp_path / "eval-rl", 0.8, 0.5, 0.6)
    show(page, build_report(tmp_path))
    fits(page)
    assert texts(page, ".scores thead th")[-5:] == [
        "in order",
        "shuffled",
        "elsewhere",
        "format",
        "questions",
    ]
    gaps = texts(page, ".scores tbody .gap")
    assert re.match(r"temporal gap [+−].* to ", gaps[0]) and re.match(r"look gap [+−].* to ", gaps[1])
    assert texts(page, ".title") == ["temporal gap"]
    assert sorted(texts(page, ".headline .label")) == ["all 0.00", "high 0.20", "low 0.10"]


def test_page_is_accessible(page: Page, demo_page: Path) -> None:
    show(page, demo_page)
    assert page.evaluate("document.documentElement.lang") == "en"
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
        assert page.evaluate(f"{expression}.map(e => e.outerHTML.slice(0, 80))") == [], complaint


@pytest.mark.parametrize("kind", ["sft", "evaluation", "rollouts alone", "no steps yet"])
def test_folders_with_little_in_them(page: Page, tmp_path: Path, kind: str) -> None:
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
    show(page, build_report(tmp_path))
    fits(page)
    expected = {
        "sft": ["Curves"],
        "evaluation": ["Evaluation"],
        "rollouts alone": ["Rollouts"],
        "no steps yet": [],
    }
    assert texts(page, "h2") == expected[kind]
    assert ("nothing to draw yet" in texts(page, "main")[0]) == (kind == "no steps yet")
