"""A headless Chromium for tests, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


class FilePage:
    """A page that shows files. Since one was opened, `problems` collects script errors, dialogs and refusals
    of its policy, and `requests` the addresses that it asked for.
    """

    def __init__(self, browser: sync_api.Browser) -> None:
        self._browser = browser
        self._page: sync_api.Page | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []

    @property
    def page(self) -> sync_api.Page:
        assert self._page is not None, "no file is open"
        return self._page

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        if self._page is not None:
            self._page.close()
        self._page = page = self._browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self.problems, self.requests = [], []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._heard)
        page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        page.on("request", lambda asked: self.requests.append(asked.url))
        page.goto(path.resolve().as_uri())
        self.settle()

    def _heard(self, said: sync_api.ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            self.problems.append(said.text)

    def settle(self) -> None:
        """Two frames later the charts have been laid out."""
        self.run(
            "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(r, 50))))"
        )

    def run(self, expression: str) -> Any:
        """The value of a script expression in the page (a promise's when it is one)."""
        return self.page.evaluate(expression)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)
