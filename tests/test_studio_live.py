"""The studio beside a training of the lab's small model: what a person sees while it goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import chromium, find_chromium
from studio_server import studio

from video_r1.lab.clips import write_lab
from video_r1.lab.model import base_folder
from video_r1.settings.commands import LabSettings

pytest.importorskip("starlette", reason="the extra studio is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow

SOON = 120_000  # milliseconds; a machine may be busy
# Which frame is said to be shown, and where the video is, at each change: looks from outside come too late.
WATCH_SHUFFLED = """() => {
  window.seen = [];
  const output = document.querySelector(".column.shuffled .player output");
  const video = document.querySelector(".column.shuffled video");
  new MutationObserver(() => window.seen.push([parseInt(output.textContent), video.currentTime]))
    .observe(output, { childList: true, characterData: true, subtree: true });
}"""
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    write_lab(LabSettings(folder=str(folder / "lab"), train=12, test=4, seed=2))
    videos = [
        row for row in json.loads((folder / "lab" / "rl.json").read_text()) if row["data_type"] == "video"
    ]
    (folder / "lab" / "videos.json").write_text(json.dumps(videos))
    return folder


@contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    settings = {
        "model_name_or_path": base_folder(), "train_manifest": folder / "lab" / "videos.json",
        "output_dir": folder / "runs" / "now", "max_steps": STEPS, "per_device_train_batch_size": 12,
        "num_generations": 8, "max_completion_length": 64, "preflight_questions": 0, "log_rollouts": 1,
        "warmup_steps": 0, "report_to": "none",
    }  # fmt: skip
    words = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "video_r1", "rl", "lab-tgrpo", *words]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        yield process
        process.kill()
        process.wait()


@pytest.fixture
def page() -> Iterator[Page]:
    if find_chromium() is None:
        pytest.skip("no chromium on this machine")
    problems: list[str] = []
    with chromium() as browser:
        shown = browser.new_page(viewport={"width": 1280, "height": 900})
        shown.on("pageerror", lambda error: problems.append(str(error)))
        yield shown
    assert problems == []


def test_studio_beside_a_training(page: Page, folder: Path) -> None:
    with studio(folder) as (address, _), training(folder) as trained:
        page.goto(f"{address}#/run/runs%2Fnow")  # said not to be there, until it is
        expect(page.locator(".state")).to_have_text("running", timeout=SOON)
        readout = page.locator(".headline output").first
        expect(readout).to_contain_text(re.compile("step [2-5]"), timeout=SOON)
        # A rollout appears, and its clip plays in both orders.
        expect(page.locator(".rollouts .card").first).to_be_visible(timeout=SOON)
        video = page.locator(".column.ordered video")
        video.evaluate("video => video.play()")
        page.wait_for_timeout(700)
        assert video.evaluate("video => video.currentTime") > 0.2
        group = json.loads((folder / "runs" / "now" / "rollouts.jsonl").read_text().splitlines()[0])
        page.get_by_label("Step", exact=True).select_option(str(group["step"]))
        expect(page.locator(".facts")).to_contain_text(f"question {group['problem_id']} ")
        page.evaluate(WATCH_SHUFFLED)
        page.get_by_role("button", name="Play in this order").click()
        times = [group["frames"]["timestamps"][frame] for frame in group["permutation"]]
        page.wait_for_function("() => window.seen.length > 3", timeout=SOON)
        for place, time in page.evaluate("() => window.seen"):
            assert time in [pytest.approx(each, abs=0.05) for each in times[place - 1 : place + 1]]
        page.get_by_role("button", name="Pause").click()
        # The curve goes on to the end, and the state says so.
        expect(readout).to_contain_text(f"step {STEPS}", timeout=SOON)
        trained.wait(SOON / 1000)
        expect(page.locator(".state")).to_have_text("finished", timeout=10_000)
        page.goto(f"{address}#/ask")
        page.get_by_label("Checkpoint").select_option("runs/now", timeout=30_000)
        page.get_by_label("Clip from").select_option("lab/videos.json")
        page.get_by_label("Question of the manifest").select_option(index=0)
        page.get_by_role("button", name="Ask", exact=True).click()
        expect(page.locator(".tally b").first).to_be_visible(timeout=SOON)
        assert page.locator(".state-line.bad").count() == 0
