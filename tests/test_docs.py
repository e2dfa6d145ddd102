"""The pages: links resolve, named files and make targets exist, and every command line is a valid request."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from doc_commands import FENCED, PAGES, ROOT, command_lines, request
from doc_pictures import PICTURES
from own_clips import write_own_clips

import video_r1
from video_r1.cli import find_command, main, read_request, split_words
from video_r1.commands import COMMANDS, TRAINS
from video_r1.errors import RequestError
from video_r1.recipe import training_argument_types

DOCS = ROOT / "docs"
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE_NAME = re.compile(r"[\w./-]+\.(?:py|yaml)")
READERS_OWN = {"my.yaml"}


def complaints(path: Path, text: str) -> Iterator[str]:
    """Yield what is wrong in a page."""
    for words in command_lines(text):
        if (found := request(words)) is not None:
            try:
                name, rest = find_command(found)
                read_request(name, [word for word in rest if word != "--smoke"])
            except RequestError as error:
                yield f"{shlex.join(words)}: {error}"
    for span in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", FENCED.sub("", text)):
        yield from complaints_of_span(span)
    for target in LINK.findall(text):
        yield from complaints_of_link(path, text, target)


def complaints_of_span(span: str) -> Iterator[str]:
    """Yield what is wrong in inline code. A command there may lack settings; its settings must be known."""
    words = span.split()
    if words[0] == "video-r1" and len(words) > 1 and words[1].islower():
        try:
            name, rest = find_command(words[1:])
            types = COMMANDS[name].types()
            known = {*types, "smoke"} | (set(training_argument_types()) if name in TRAINS else set())
            unknown = [key for key in split_words(rest, types)[1] if key not in known]
            yield from (f"{span}: no setting {key}" for key in unknown)
        except RequestError as error:
            if "needs a value" not in str(error):
                yield f"{span}: {error}"
    elif words[0] == "make" and len(words) == 2:
        if not re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
            yield f"{span}: no such target"
    elif FILE_NAME.fullmatch(span) and span not in READERS_OWN:
        folders = ("src", "tests", "benchmarks", "setup", "research", "examples")
        if not any(
            str(path).endswith(f"/{span}") for folder in folders for path in (ROOT / folder).rglob("*.*")
        ):
            yield f"{span}: no such file"


def complaints_of_link(path: Path, text: str, target: str) -> Iterator[str]:
    if "://" in target:
        return
    file, _, anchor = target.partition("#")
    page = path.parent / file if file else path
    if file and not page.exists():
        yield f"link to {target}: no such file"
    elif anchor:
        headings = re.findall(r"^#+ (.+)$", text if page == path else page.read_text(), re.MULTILINE)
        if anchor not in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}:
            yield f"link to {target}: no such heading"


@pytest.fixture(autouse=True)
def my_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("model_name_or_path: m\ntrain_manifest: t\noutput_dir: o\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_page_names_only_what_exists(path: Path) -> None:
    assert list(complaints(path, path.read_text(encoding="utf-8"))) == []


def test_the_first_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_own_clips(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    lines = [words[1:] for words in command_lines((ROOT / "README.md").read_text()) if words[0] == "video-r1"]
    for command in ("make", "check"):
        words = next(words for words in lines if words[:2] == ["data", command])
        assert main([*words, "--media", "false"]) == 0
    assert "usable questions: 8" in capsys.readouterr().out  # one of the 9 is held out
    assert (tmp_path / "mine" / "held-out.json").is_file()


# ---- The site of `make docs`

NAMES = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"(?m)^::: ([\w.]+)", page.read_text(encoding="utf-8"))
]


def named(name: str) -> Any:
    """Import the module, class or function of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, last = name.rpartition(".")
        return getattr(importlib.import_module(home), last)


def test_drawings_are_what_their_script_draws() -> None:
    for name, drawn in PICTURES.items():
        assert (DOCS / "images" / name).read_text("utf-8") == drawn(), f"python tests/doc_pictures.py: {name}"


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"(?m)^ +- (?:\w+: )?([\w/-]+\.md)$", config.partition("\nnav:\n")[2])
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(
        pages | {"index.md", "contributing.md", "changelog.md", "study_design.md", "first_study.md"}
    )


def test_every_public_name_and_setting_is_in_the_api_pages() -> None:
    found = [named(name) for name in NAMES]
    modules = {thing.__name__ for thing in found if inspect.ismodule(thing)}
    public = {name: getattr(video_r1, name) for name in video_r1.__all__}
    missing = {n for n, thing in public.items() if thing not in found and thing.__module__ not in modules}
    assert missing == set() and all(thing.__doc__ for thing in found)
    page = (DOCS / "api" / "settings.md").read_text(encoding="utf-8")
    tables = {
        named(f"{home}.{name}") for home, name in re.findall(r"<!-- settings: ([\w.]+):(\w+) -->", page)
    }
    shown = {field for kind in tables for field in kind.__annotations__}
    own = [kind for kind in video_r1.TGRPOConfig.__mro__ if kind.__module__.startswith("video_r1.settings.")]
    assert {field for kind in own for field in inspect.get_annotations(kind)} <= shown


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="the extra docs is not installed: make docs")
def test_the_site_is_built_with_all_links_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    loaded = re.compile(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)="(?:https?:)?//([^"]+)""")
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {path.name: hosts for path, text in pages.items() if (hosts := loaded.findall(text))} == {}
    styles = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css"))
    assert not re.search(r"(?:url\(|@import )[\'\"]?(?:https?:)?//", styles)
    trainer = pages[tmp_path / "api" / "training.html"]
    assert 'id="video_r1.training.tgrpo.TGRPOTrainer.train"' in trainer
    assert "<code>reward_weights</code>" in pages[tmp_path / "api" / "settings.html"]
