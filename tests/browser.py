"""A headless Chromium for tests, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright import sync_api


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator[sync_api.Browser]:
    """A browser, ended afterwards. Raises RuntimeError where there is none."""
    from playwright.sync_api import sync_playwright

    program = find_chromium()
    if program is None:
        raise RuntimeError("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


TINY = """() => [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()
  && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())
  && parseFloat(getComputedStyle(node).fontSize) < 12).map((node) => node.outerHTML.slice(0, 90))"""
WIDE = """() => [document.documentElement, ...document.querySelectorAll('body *')].filter((node) =>
  node.checkVisibility() && node.scrollWidth > node.clientWidth
  && (node === document.documentElement || ['auto', 'scroll'].includes(getComputedStyle(node).overflowX)))
  .map((node) => [node.scrollWidth, node.clientWidth, node.outerHTML.slice(0, 90)])"""


def fits(page: sync_api.Page) -> None:
    """Fails where something scrolls sideways, or is written in less than 12 pixels."""
    assert page.evaluate(TINY) == []
    assert page.evaluate(WIDE) == []


def show(page: sync_api.Page, path: Path, width: int = 1280, dark: bool = False) -> None:
    """Open a file in a page of this width, and wait until its charts have been laid out."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.goto(path.resolve().as_uri())
    settle(page)


def settle(page: sync_api.Page) -> None:
    """Wait for two frames."""
    page.evaluate(
        "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(r, 50))))"
    )
