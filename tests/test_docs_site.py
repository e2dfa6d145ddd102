"""The site of `make docs`: every page is in it, all that it documents is there, nothing is from elsewhere."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import video_r1

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
OUTSIDE = {"index.md", "contributing.md", "changelog.md"}  # made of the repository's own
API = sorted((DOCS / "api").glob("*.md"))
NAMES = [name for page in API for name in re.findall(r"(?m)^::: ([\w.]+)", page.read_text(encoding="utf-8"))]
LOADED = re.compile(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)="(?:https?:)?//([^"]+)""")


def found(name: str) -> Any:
    """The module, class or function of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, last = name.rpartition(".")
        return getattr(importlib.import_module(home), last)


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"(?m)^ +- (?:\w+: )?([\w/-]+\.md)$", CONFIG.partition("\nnav:\n")[2])
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(there | OUTSIDE)


@pytest.mark.parametrize("name", NAMES)
def test_documented_names_are_there_and_say_what_they_do(name: str) -> None:
    thing = found(name)
    assert thing.__doc__
    if inspect.ismodule(thing):
        own = {key: value for key, value in vars(thing).items() if getattr(value, "__module__", "") == name}
        functions = {key for key, value in own.items() if inspect.isfunction(value) and key[0] != "_"}
        assert {key for key in functions if not own[key].__doc__} == set()


def test_every_public_name_is_documented() -> None:
    documented = {found(name) for name in NAMES if not inspect.ismodule(found(name))}
    modules = {name for name in NAMES if inspect.ismodule(found(name))}
    public = {name: getattr(video_r1, name) for name in video_r1.__all__}
    missing = {
        name for name, thing in public.items() if thing not in documented and thing.__module__ not in modules
    }
    assert missing == set()


def test_every_setting_of_training_has_its_table() -> None:
    page = (DOCS / "api" / "settings.md").read_text(encoding="utf-8")
    kinds = {
        getattr(importlib.import_module(module), name)
        for module, name in re.findall(r"<!-- settings: ([\w.]+):(\w+) -->", page)
    }
    shown = {field for kind in kinds for field in kind.__annotations__}
    own = [kind for kind in video_r1.TGRPOConfig.__mro__ if kind.__module__.startswith("video_r1.settings.")]
    assert {field for kind in own for field in inspect.get_annotations(kind)} <= shown


@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="the extra docs is not installed: make docs")
def test_the_site_is_built_with_all_links_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) > 25
    assert {path.name: hosts for path, text in pages.items() if (hosts := LOADED.findall(text))} == {}
    styles = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css"))
    assert not re.search(r"(?:url\(|@import )[\'\"]?(?:https?:)?//", styles)
    trainer = pages[tmp_path / "api" / "training.html"]
    assert 'id="video_r1.training.tgrpo.TGRPOTrainer.train"' in trainer and "quantised loading" in trainer
    assert "<code>judge_endpoint</code>" in pages[tmp_path / "api" / "settings.html"]
    assert "a-judge-of-free-form-answers" in pages[tmp_path / "changelog.html"]
