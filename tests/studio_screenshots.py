"""`make screenshots`: each page of the studio at three widths, light and dark, of made-up runs and the lab's
clips.

    python tests/studio_screenshots.py screenshots
    python tests/studio_screenshots.py docs/images --demo runs/demo

With --demo, a folder of `make demo`, the pictures of README.md and docs/studio.md instead: its report, its
run, its evaluations, and its model asked.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from browser import chromium
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from report_runs import write_controls, write_demo, write_evaluation, write_lines, write_rl_run
from studio_server import studio

from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import Sample, load_manifest
from video_r1.lab.clips import write_lab
from video_r1.report.page import build_report
from video_r1.settings.commands import LabSettings
from video_r1.settings.frames import FrameBudget
from video_r1.training.recording import RECORDED, save_strip

VIEWS = {
    "runs": "",
    "run": "#/run/runs%2Ft-grpo",
    "failed": "#/run/runs%2Fcollapsed",
    "compare": "#/compare/runs%2Ft-grpo/runs%2Fgrpo",
    "ask": "#/ask",
    "data": "#/data/lab%2Frl.json",
    "evaluations": "#/evaluations/runs%2Feval-sft/runs%2Feval-rl",
    "evaluation": "#/run/runs%2Feval-rl",
    "controls": "#/evaluations/runs%2Fcontrols%20(direct)/runs%2Fcontrols",
}
REPORTS = {
    "report": ["demo"],
    "report-run": ["t-grpo"],
    "report-compared": ["grpo", "t-grpo", "collapsed"],
    "report-controls": ["controls"],
}
WIDTHS = (390, 1280, 2560)
MARGIN = 16
PICTURE = 1040  # pixels of the documents' pictures across, of which a page of GitHub shows about 840
SLOW = 120_000


def write_folders(folder: Path) -> None:
    runs, lab = folder / "runs", folder / "lab"
    write_lab(LabSettings(folder=str(lab), train=200, test=12, seed=1))
    samples = [sample for sample in load_manifest(lab / "rl.json") if sample.options]
    write_demo(runs / "demo")
    for name, steps in (("grpo", 40), ("t-grpo", 60), ("collapsed", 60)):
        write_rl_run(runs / name, steps=steps, every=5)
        ask_lab_questions(runs / name, [sample for sample in samples if sample.data_type == "video"])
        with (runs / name / "config.yaml").open("a") as file:
            file.write("max_steps: 120\n")
    config = runs / "grpo" / "config.yaml"
    config.write_text(config.read_text().replace("temporal_rule: margin", 'temporal_rule: "off"'))
    (runs / "t-grpo" / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    collapse(runs / "collapsed")
    write_controls(runs / "controls", 0.8, 0.55)
    for name, rate in (("eval-rl", 0.7), ("eval-sft", 0.5)):
        write_evaluation(runs / name, rate, 0.5)
        answer_lab_questions(runs / name, samples)


def ask_lab_questions(run: Path, samples: list[Sample]) -> None:
    """Puts questions of the lab in the place of a run's made-up ones, so that their clips play."""
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        sample = samples[number % len(samples)]
        media = read_media(sample, FrameBudget(frame_pixels=112 * 112, max_frames=8))
        frames = save_strip(media.frames, run / "frames" / f"lab-{number}.jpg")
        order = random.Random(number).sample(range(len(media.frames)), len(media.frames))
        line |= {name: getattr(sample, name) for name in RECORDED}
        line["path"] = sample.path
        line |= {"data_type": "video", "permutation": order, "contrast": "shuffled"}
        line["frames"] = frames | {"timestamps": [round(float(time), 3) for time in media.timestamps]}
        for completion in [*line["ordered"], *line["shuffled"]]:
            right = completion["rewards"]["accuracy"] > 0.5
            other = next(letter for letter in "ABCD" if letter != sample.answer)
            said = sample.answer if right else other
            thought = f"I look at the frames one after the other. So it is option {said}."
            completion["text"] = f"<think>{thought}</think>\n<answer>{said}</answer>"
        for completion in line["ordered"]:
            completion["advantage_without_temporal"] = round(0.8 * completion["advantage"], 2)
    write_lines(run / "rollouts.jsonl", lines)


def collapse(run: Path) -> None:
    """What a person would want to be told of, in the last lines; and how the run ended."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[-12:]:
        line |= {
            "reward/format": 0.1,
            "groups/no_variance": 0.95,
            "policy/kl": 2.1,
            "completion/truncated": 0.6,
        }
    write_lines(run / "metrics.jsonl", lines)
    (run / ".lock").write_text("failed: CUDA out of memory. Tried to allocate 2.00 GiB")


def answer_lab_questions(folder: Path, samples: list[Sample]) -> None:
    """Puts questions of the lab in the place of an evaluation's made-up ones."""
    path = folder / "predictions-8.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["problem_id"] < len(samples)]
    for line in lines:
        sample = samples[line["problem_id"]]
        said = sample.answer if line["score"] > 0.5 else "D"
        line |= {
            "problem_id": sample.problem_id, "answer": sample.answer, "prediction": said,
            "output": f"<think>I look at the frames.</think>\n<answer>{said}</answer>",
            "data_type": sample.data_type, "problem_type": sample.problem_type,
            "data_source": sample.data_source, "task_type": sample.data_source.removeprefix("lab/"),
        }  # fmt: skip
    write_lines(path, lines)


def ask_question(page: Page, model: str, manifest: str, telling: bool = False) -> None:
    """Asks about what came before or after what. telling: until the order of the frames is seen to matter."""
    expect(page.locator("#ask-manifest option").nth(1)).to_be_attached()
    page.get_by_label("Clip from").select_option(manifest)
    rows = page.get_by_label("Question of the manifest")
    expect(rows.locator("option").first).to_contain_text("·")
    names = rows.locator("option").all_inner_texts()
    page.get_by_label("Checkpoint").select_option(model)
    page.get_by_label("Answers to each").fill("16")
    for place, name in enumerate(names):
        if not any(word in name for word in ("came", "preceded", "followed", "first")):
            continue
        rows.select_option(index=place)
        page.get_by_role("button", name="Ask", exact=True).click()
        newest = page.locator(".answers").first
        expect(newest.locator(".tally b")).to_have_count(5, timeout=SLOW)
        if not telling or "matters here" in newest.locator(".verdict").inner_text():
            return


def shots(out: Path, browser: Browser) -> None:
    """Every page at every width."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folders(folder)
        with studio(folder / "runs", folder / "lab") as (address, _):
            for title, view in VIEWS.items():
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.goto(address + view)
                page.wait_for_timeout(3000)
                if title == "ask":
                    ask_question(page, "the lab's base", "lab/test.json")
                each_width(page, out, title)
        for title, runs in REPORTS.items():
            page = browser.new_page()
            page.goto(build_report([folder / "runs" / name for name in runs]).as_uri())
            each_width(page, out, title)


def each_width(page: Page, out: Path, title: str) -> None:
    """Save a page at every width, light and dark, and close it."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(600)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(200)
            dark = "-dark" if scheme == "dark" else ""
            page.screenshot(path=out / f"{title}-{width}{dark}.png", full_page=True)
    page.close()


def pictures(out: Path, demo: Path, browser: Browser) -> None:
    """What a reader of the documents sees, twice as fine as it is shown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "demo"
        shutil.copytree(demo, folder)
        page = browser.new_page(viewport={"width": PICTURE, "height": 900}, device_scale_factor=2)
        page.goto(build_report(folder).as_uri())
        page.locator("#pick-run").select_option(label="tgrpo")
        page.locator("#pick-outcome").select_option("some")
        step, question = paid_apart(folder / "tgrpo" / "rollouts.jsonl")
        page.locator("#pick-step").select_option(str(step))
        option = page.locator("#pick-question option", has_text=question)
        page.locator("#pick-question").select_option(option.get_attribute("value"))
        page.locator(".group").scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        save(page, ".group", 880, out / "report.webp")
        with studio(folder.parent) as (address, _):
            page.goto(f"{address}#/run/demo%2Ftgrpo")
            expect(page.locator(".headline path.main").first).to_be_visible()
            page.wait_for_timeout(1500)
            save(page, "body", 900, out / "studio-run.webp")
            page.goto(f"{address}#/ask")
            ask_question(page, "demo/tgrpo", "demo/lab/test.json", telling=True)
            page.wait_for_timeout(500)
            save(page, ".answers", 745, out / "studio-ask.webp")
            page.goto(f"{address}#/evaluations/demo%2Feval-grpo-lying/demo%2Feval-tgrpo-lying")
            expect(page.locator(".versus")).to_be_visible()
            page.wait_for_timeout(500)
            save(page, "body", 900, out / "studio-evaluations.webp")


def paid_apart(rollouts: Path) -> tuple[int, str]:
    """Return step and question whose right answers the temporal rule pays most differently, and whose chains
    imply these answers.
    """
    sys.path.append(str(Path(__file__).parents[1]))
    from research.temporal_credit.chains import concludes

    groups = [json.loads(line) for line in rollouts.read_text("utf-8").splitlines()]

    def spread(group: dict[str, Any]) -> tuple[float, int]:
        right = [c["rewards"] for c in group["ordered"] if c["rewards"]["accuracy"] == 1]
        paid = [reward.get("temporal", 0.0) for reward in right] or [0.0]
        several = group["options"] and 1 < len(right) < len(group["ordered"])
        if not all(concludes(group, c["text"]) for c in group["ordered"] if c["rewards"]["accuracy"] == 1):
            return -1.0, 0
        return (round(max(paid) - min(paid), 3), len(right)) if several else (-1.0, 0)

    best = max(groups, key=spread)
    return best["step"], best["problem_id"]


def save(page: Page, selector: str, height: int, path: Path) -> None:
    """The top of an element over the page's whole width."""
    box = page.locator(selector).first.bounding_box()
    assert box is not None
    top = max(0.0, page.evaluate("scrollY") + box["y"] - MARGIN)
    tall = min(height, box["height"] + 2 * MARGIN)
    png = page.screenshot(clip={"x": 0, "y": top, "width": PICTURE, "height": tall}, full_page=True)
    shown = Image.open(io.BytesIO(png))
    shown.convert("RGB").save(path, "WEBP", quality=86, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--demo", type=Path, help="a folder of make demo: the documents' pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        if arguments.demo:
            pictures(arguments.out, arguments.demo, browser)
        else:
            shots(arguments.out, browser)
    print(json.dumps(sorted(path.name for path in arguments.out.iterdir())))


if __name__ == "__main__":
    sys.exit(main())
