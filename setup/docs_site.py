"""Hooks of mkdocs.yml: pages that stand outside of docs/, and tables of settings.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages, their links those of the site; links to other files
of the repository become plain text. `<!-- settings: module:Class -->` becomes a table of its settings.
"""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from video_r1.settings.base import own_field_types
from video_r1.settings.types import default_text, describe_type

ROOT = Path(__file__).parents[1]
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)")
IMAGE = re.compile(r"(!\[[^\]]*\])\(docs/")
SETTINGS = re.compile(r"<!-- settings: ([\w.]+):(\w+) -->")


def on_files(files: Files, config: Any) -> Files:
    for page, name in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=moved(text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return SETTINGS.sub(lambda match: settings_table(match[1], match[2]), markdown)


def moved(text: str) -> str:
    """A page of the repository's root as one of the site."""
    pages = {name: page for page, name in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        target = pages.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        return f"[{words}]({target}{anchor})" if target else words

    return IMAGE.sub(r"\1(", LINK.sub(link, text))


def settings_table(module: str, name: str) -> str:
    """The settings that a class declares itself: name, type, default, help."""
    kind = getattr(importlib.import_module(module), name)
    hints, own = own_field_types(kind), kind.__annotations__
    rows = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name in own:
            made = field.default_factory
            default = default_text(field.default if made is dataclasses.MISSING else made())
            kind_of_value, told = describe_type(hints[field.name]), field.metadata["help"]
            cells = [f"`{field.name}`", kind_of_value, default, told]
            rows.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return "\n".join(rows)


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
