"""`make screenshots`: each page of the studio at three widths, of made-up runs and the lab's clips.

    python tests/studio_screenshots.py screenshots [--pictures docs/images]

--pictures: also the two pictures of README.md and docs/studio.md.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

from browser import chromium
from PIL import Image
from playwright.sync_api import Page, expect
from report_runs import write_demo, write_evaluation, write_rl_run
from studio_server import studio

from video_r1.lab.clips import write_lab
from video_r1.settings.commands import LabSettings

VIEWS = {
    "runs": "",
    "run": "#/run/runs%2Ft-grpo",
    "compare": "#/compare/runs%2Ft-grpo/runs%2Fgrpo",
    "ask": "#/ask",
    "data": "#/data/lab%2Frl.json",
    "evaluations": "#/evaluations/runs%2Feval-rl/runs%2Feval-sft",
}
PICTURES = {"run": ".headline", "ask": ".answers"}  # what a reader of the documents sees of them
WIDTHS = (390, 1280, 2560)
SLOW = 120_000


def write_folders(folder: Path) -> None:
    write_demo(folder / "runs" / "demo")
    for name, steps in (("grpo", 40), ("t-grpo", 60)):
        write_rl_run(folder / "runs" / name, steps=steps, every=5)
    write_evaluation(folder / "runs" / "eval-rl", 0.7, 0.5)
    write_evaluation(folder / "runs" / "eval-sft", 0.5, 0.5)
    write_lab(LabSettings(folder=str(folder / "lab"), train=200, test=12, seed=1))


def small_picture(png: bytes) -> bytes:
    """The same with 200 colours, which is a third of the bytes."""
    small = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(200, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


def ask_question(page: Page, model: str) -> None:
    expect(page.locator("#ask-manifest option").nth(1)).to_be_attached()
    page.get_by_label("Clip from").select_option("lab/test.json")
    rows = page.get_by_label("Question of the manifest")
    expect(rows.locator("option")).to_have_count(12)
    names = rows.locator("option").all_inner_texts()
    rows.select_option(index=next(i for i, name in enumerate(names) if "came" in name or "preceded" in name))
    page.get_by_label("Checkpoint").select_option(model)
    page.get_by_label("Answers to each").fill("16")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".tally b")).to_have_count(5, timeout=SLOW)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="a run folder to ask (default: the lab's base)")
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder = Path(name)
        write_folders(folder)
        asked = [arguments.model.resolve()] if arguments.model else []
        model = asked[0].name if asked else "the lab's base"
        with studio(folder / "runs", folder / "lab", *asked) as (address, _):
            for title, view in VIEWS.items():
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.goto(address + view)
                page.wait_for_timeout(3000)
                if title == "ask":
                    ask_question(page, model)
                for width in WIDTHS:
                    page.set_viewport_size({"width": width, "height": 900})
                    page.wait_for_timeout(600)
                    page.screenshot(path=arguments.out / f"{title}-{width}.png", full_page=True)
                    if arguments.pictures and width == 1280 and title in PICTURES:
                        arguments.pictures.mkdir(parents=True, exist_ok=True)
                        shown = page.locator(PICTURES[title]).first
                        path = arguments.pictures / f"studio-{title}.png"
                        path.write_bytes(small_picture(shown.screenshot()))
                page.close()
    print(json.dumps(sorted(path.name for path in arguments.out.glob("*.png"))))


if __name__ == "__main__":
    sys.exit(main())
