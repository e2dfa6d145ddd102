"""The report in a real browser: hostile text, both orders of frames, keyboard, width, colour scheme."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import FilePage, chromium, find_chromium
from report_runs import (
    HOSTILE,
    group_line,
    group_of,
    write_demo,
    write_evaluation,
    write_hostile_run,
    write_lines,
    write_rl_run,
)

from video_r1.report.page import ROLLOUT_BYTES, build_report
from video_r1.training.recording import record_group


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


def test_a_small_chart_can_be_shown_large(browser: FilePage, rl_page: Path) -> None:
    browser.open(rl_page)
    browser.run(
        "[...document.querySelectorAll('button.title')].find(e => e.textContent === 'entropy').click()"
    )
    browser.settle()
    assert texts(browser, "dialog code") == ["policy/entropy"]
    before = texts(browser, ".position")
    browser.press("ArrowLeft")  # moves the chart's cursor, not the page of rollouts
    assert texts(browser, "dialog output")[0].endswith("step 59") and texts(browser, ".position") == before
    browser.run("document.querySelector('dialog .close').click()")
    browser.settle()
    assert texts(browser, "dialog") == []
    check_healthy(browser)


def test_which_series_share_a_chart(browser: FilePage, rl_page: Path) -> None:
    names = [
        *(
            "reward/accuracy/OCR",
            "reward/accuracy",
            "reward/format/video",
            "temporal/p_shuffled",
            "temporal/p",
        ),
        *("loss", "eval_accuracy", "eval_accuracy_shuffled", "eval_accuracy_video", "logged once"),
        *("eval_b", "eval_b_reversed"),
        *("reward/a/b/c", "__proto__"),
    ]
    values = {name: [1] if name == "logged once" else [1, 2] for name in names}
    series = ", ".join(
        f"[{json.dumps(name)}]: {{axis: 0, y: {y}, bad: 0, averaged: 1}}" for name, y in values.items()
    )
    browser.open(rl_page)
    specs = browser.run(
        f"chartSpecs({{config: {{temporal_contrast: 'blind'}}, axes: [[1, 2]], series: {{{series}}}}})"
        ".map(s => [s.group, s.base, s.lines.map(l => l.label)])"
    )
    assert specs == [
        ["reward", "reward/accuracy", ["", "OCR"]],
        ["reward", "reward/format", ["video"]],
        ["temporal", "temporal/p", ["ordered", "blind"]],
        ["", "loss", [""]],
        ["eval", "eval_accuracy", [""]],
        ["eval", "eval_accuracy_video", ["ordered", "shuffled"]],
        ["eval", "eval_b", ["ordered", "reversed"]],
        ["reward", "reward/a", ["b/c"]],
        ["", "__proto__", [""]],
    ]


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


def test_the_contrast_is_named(browser: FilePage, tmp_path: Path) -> None:
    group = group_of()
    assert group.shuffled_prompt is not None
    for step, contrast, shown in ((1, "reversed", [2, 1, 0]), (2, "blind", [])):
        order = torch.tensor(shown, dtype=torch.long)
        prompt = replace(group.shuffled_prompt, permutation=order, contrast=contrast)
        record_group(tmp_path, step, replace(group, shuffled_prompt=prompt))
    browser.open(build_report(tmp_path))
    pick(browser, "pick-step", "1")
    assert texts(browser, ".shuffled h4")[0].startswith("Frames reversed")
    pick(browser, "pick-step", "2")
    assert texts(browser, "h4") == ["Frames in order", "No frames"]
    assert texts(browser, ".shuffled canvas") == []
    check_healthy(browser)


def test_frames_of_several_clips(browser: FilePage, tmp_path: Path) -> None:
    """Each clip's stand below its name, in either order; bars and numbers begin anew with each."""
    group = group_of()
    (clip,), contrast = group.prompt.media, group.shuffled_prompt
    assert contrast is not None and contrast.permutation is not None
    count = len(clip.frames)
    order = torch.cat([contrast.permutation, count + torch.arange(2).flip(0)])
    both = [clip, replace(clip, frames=clip.frames[:2].repeat(1, 1, 1, 2), timestamps=clip.timestamps[:2])]
    prompts = [replace(group.prompt, media=tuple(both)), replace(contrast, permutation=order)]
    record_group(tmp_path, 10, replace(group, prompt=prompts[0], shuffled_prompt=prompts[1]))
    browser.open(build_report(tmp_path), width=1280)
    assert texts(browser, ".which") == ["Clip 1 of 2", "Clip 2 of 2"] * 2
    numbers = [*range(1, count + 1), 1, 2]
    assert [text.strip() for text in texts(browser, ".ordered .time em")] == [
        f"f{number}" for number in numbers
    ]
    shuffled = [*(int(place) + 1 for place in contrast.permutation), 2, 1]
    assert [text.strip() for text in texts(browser, ".shuffled .time em")] == [
        f"f{number}" for number in shuffled
    ]
    browser.run("[...document.querySelectorAll('.ordered button.frame')].at(-1).click()")
    browser.settle()
    assert texts(browser, "dialog output")[0].startswith("clip 2, frame 2 of 2")
    check_healthy(browser)
    images = group_of(video=False)
    prompt = replace(images.prompt, media=images.prompt.media * 3)
    record_group(tmp_path / "images", 10, replace(images, prompt=prompt))
    browser.open(build_report(tmp_path / "images"), width=1280)
    assert texts(browser, ".which") == []
    assert texts(browser, ".tile .time") == [f"image {number} of 3" for number in (1, 2, 3)]


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


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_demo_page(browser: FilePage, demo_page: Path, width: int, dark: bool) -> None:
    browser.open(demo_page, width=width, dark=dark)
    check_healthy(browser)
    assert texts(browser, "h2") == [
        "Curves · rl",
        "Evaluation",
        "Rollouts",
        "Curves · sft",
        "Left out",
        "Media that could not be used",
        "Settings",
    ]
    assert texts(browser, ".scores")[0].count("to") >= 9
    assert browser.run(
        "[...document.querySelector('#evaluation table').tBodies[0].rows].map(r => r.cells[0].textContent)"
    ) == ["base", "sft", "rl"]
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) == dark


SMALL_TEXT = """[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length
    && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
    && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [1280, 390])
def test_text_is_large_enough_and_the_gap_needs_no_scrolling(
    browser: FilePage, demo_page: Path, width: int
) -> None:
    browser.open(demo_page, width=width)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.run("document.querySelector('button.title').click()")
    browser.settle()
    assert browser.run(SMALL_TEXT) == []
    gaps = browser.run(
        "[...document.querySelectorAll('#evaluation .scores tbody tr')].map(r => r.cells[4]).filter(Boolean)"
        ".map(c => [c.textContent, c.getBoundingClientRect().right])"
    )
    assert len(gaps) > 9 and all(right <= width for _, right in gaps)
    assert re.match(r"[+−]0\.\d\d ", gaps[2][0])


def test_a_short_paragraph_says_what_is_shown(browser: FilePage, rl_page: Path, tmp_path: Path) -> None:
    browser.open(rl_page)
    (told,) = texts(browser, "header .intro")
    assert len(told.split()) < 100
    for words in (
        "p is the share of right answers in order",
        "p̃ the share with the",
        "p − p̃ the temporal gap",
    ):
        assert words in told
    assert {"T-GRPO", "p, p̃", "temporal gap", "contrast clip", "advantage"} <= set(
        texts(browser, ".glossary dt")
    )
    assert (
        browser.run("document.querySelector('.intro').compareDocumentPosition(document.querySelector('nav'))")
        == 4
    )
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": 1 / s} for s in range(1, 9)])
    browser.open(build_report(tmp_path))
    assert texts(browser, ".intro, .glossary") == []


def test_labels_at_line_ends_are_those_of_the_smoothed_line(browser: FilePage, rl_page: Path) -> None:
    browser.open(rl_page)
    series = data_of(rl_page)["runs"][0]["series"]
    for radius in (0, 20):
        browser.run(
            f"(s => {{ s.value = {radius}; s.dispatchEvent(new Event('input')) }})"
            "(document.querySelector('input[type=range]'))"
        )
        browser.settle()
        labels = dict(label.rsplit(" ", 1) for label in texts(browser, ".headline .label"))
        assert len(labels) == 8
        for label, value in labels.items():
            values = series["reward/accuracy" + (f"/{label}" if label != "all" else "")]["y"]
            drawn = browser.run(f"smooth({values}, {radius}).at(-1)")
            assert value == f"{drawn:.2f}" and (radius == 0) == (drawn == values[-1])


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


def test_a_run_of_8000_groups_stays_openable(browser: FilePage, tmp_path: Path) -> None:
    """What is inlined is bounded, the page says what was left out, and a picture is read when it is shown."""
    line = group_line(tmp_path, 1, 1, random.Random(0), 0.5, (8, 56, 56))
    write_lines(
        tmp_path / "rollouts.jsonl",
        [line | {"step": 1 + i // 2, "problem_id": i} for i in range(8000)],
    )
    page = build_report(tmp_path)
    assert page.stat().st_size < 1.2 * ROLLOUT_BYTES
    browser.open(page)
    check_healthy(browser)
    (told,) = texts(browser, ".rollouts .lead")
    kept = len(data_of(page)["runs"][0]["groups"])
    assert 500 < kept < 8000
    assert "of 8\u2009000 recorded questions are in this page, spread evenly over the run" in told
    assert sum(url.startswith("data:") for url in browser.requests) <= 2


def test_words_are_shaded_by_what_they_lose_with_the_contrast(browser: FilePage, tmp_path: Path) -> None:
    line = group_line(tmp_path, 1, 1, random.Random(0), 0.5, (8, 56, 56))
    words = [["<b>it", 0.1], [" goes", 2.0], [" right", -1.0]]
    line["ordered"][0] |= {"word_drops": words, "total": 99.0}
    write_lines(tmp_path / "rollouts.jsonl", [line])
    browser.open(build_report(tmp_path))
    check_healthy(browser)
    assert texts(browser, ".shaded") == ["<b>it", " goes", " right"]
    shades = browser.run(
        "[...document.querySelectorAll('.shaded')].map(w => w.style.getPropertyValue('--drop'))"
    )
    assert shades == ["2%", "45%", "0%"]


def grounded_line(folder: Path, kind: str, truth: str, *answers: str) -> None:
    """A recorded group of 8 frames, one each half second, whose first completions give these answers."""
    line = group_line(folder, 1, 2, random.Random(0), 0.5, (8, 100, 100))
    for item in line["ordered"]:
        item["text"] = "<think>x</think><answer>nothing</answer>"
    for item, answer in zip(line["ordered"], answers, strict=False):
        item["text"] = f"<think>x</think><answer>{answer}</answer>"
    changed = {"problem_type": kind, "options": [], "answer": truth, "shuffled": [], "permutation": None}
    write_lines(folder / "rollouts.jsonl", [line | changed])


def test_spans_are_bars_below_that_of_the_truth(browser: FilePage, tmp_path: Path) -> None:
    grounded_line(tmp_path, "temporal grounding", '{"time": [1, 3]}', "2 s to 9 s", "<b>soon</b>")
    browser.open(build_report(tmp_path))
    pick(browser, "pick-completions", "sampled")
    bars = (
        "[...document.querySelectorAll('.card')].slice(0, 2).map(card =>"
        " [...card.querySelectorAll('.span')].map(bar => [bar.style.left, bar.style.width]))"
    )
    # of 4 s: the truth lies from 25 to 75 %, the answer from 50 % to the end
    assert browser.run(bars) == [[["25%", "50%"], ["50%", "50%"]], [["25%", "50%"]]]
    said = browser.run("[...document.querySelectorAll('.spans')].map(p => p.ariaLabel)")
    assert said[0] == "answered 2.0 s to 9.0 s; right is 1.0 s to 3.0 s"
    assert said[1] == "no span answered; right is 1.0 s to 3.0 s" and len(said) == 8
    assert browser.run("document.querySelector('.lane').getBoundingClientRect().width") > 100
    check_healthy(browser)


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "with_truth", "with_answer"),
    [
        ("spatial grounding", '{"boxes": [200, 200, 600, 600]}', "[400, 400, 900, 900]", range(8), range(8)),
        # "2" is the frame of second 1, the third one: half a second about it on both sides
        ("tracking", '{"boxes": {"2": [200, 200, 600, 600]}}', '{"boxes": {"1": [400, 400, 900, 900]}}',
         (1, 2, 3), (0, 1)),
        ("spatial-temporal grounding", '{"time": [1, 2], "boxes": {"2": [200, 200, 600, 600]}}',
         '{"time": [1, 2], "boxes": {"1": [400, 400, 900, 900]}}', (3, 4, 5), (1, 2, 3)),
    ],
)  # fmt: skip
def test_boxes_are_drawn_on_the_frames(
    browser: FilePage, tmp_path: Path, kind: str, truth: str, answer: str, with_truth: Sequence[int],
    with_answer: Sequence[int],
) -> None:  # fmt: skip
    grounded_line(tmp_path, kind, truth, answer)
    browser.open(build_report(tmp_path))
    check_healthy(browser)
    # The left sides of both boxes, where the colour is nearly that of the page's style.
    drawn = (
        "[...document.querySelectorAll('.tile canvas')].map((c, i) => [i, [...c.getContext('2d')"
        ".getImageData({x}, 30, 1, 1).data]]).filter(([i, p]) => Math.abs(p[0] - {r}) + Math.abs(p[1] - {g})"
        " + Math.abs(p[2] - {b}) < 10).map(([i]) => i)"
    )
    assert browser.run(drawn.format(x=20, r=34, g=112, b=79)) == list(with_truth)
    answers = drawn.replace("30, 1, 1", "80, 1, 1").format(x=40, r=47, g=93, b=140)
    assert browser.run(answers) == list(with_answer)


def test_overlaps_of_an_evaluation_have_a_table(browser: FilePage, tmp_path: Path) -> None:
    figure = {"mean": 0.5, "interval95": [0.25, 0.75], "questions": 8}
    shares = {f"R@0.{n}": {"share": n / 10, "interval95": [0.0, 1.0], "questions": 8} for n in (3, 5, 7)}
    ordered = {
        "accuracy": 0.5,
        "interval95": [0.25, 0.75],
        "questions": 8,
        "overlaps": {"tIoU": figure | shares},
    }
    figures = {"ordered": ordered, "by_type": {"temporal grounding": {"ordered": ordered}}}
    (tmp_path / "summary.json").write_text(json.dumps({"frames": {"16": figures}}))
    (tmp_path / "predictions-16.jsonl").touch()
    browser.open(build_report(tmp_path))
    check_healthy(browser)
    rows = texts(browser, ".scores")
    assert "temporal grounding, tIoU, ordered" in rows[1] and "0.50 0.25 to 0.75" in rows[1]
    assert [name in rows[1] for name in ("R@0.3", "R@0.5", "R@0.7", "0.30", "0.70")] == [True] * 5
