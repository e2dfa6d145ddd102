"""Hooks of mkdocs.yml: pages from outside docs/, and tables of settings.

Pages such as README.md become pages of the site. Links between pages and to pictures follow; links to other
files of the repository become plain text. `<!-- settings: module:Class -->` becomes a table of its settings.
"""

import dataclasses
import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from video_r1.settings.base import own_field_types
from video_r1.settings.types import default_text, describe_type

ROOT = Path(__file__).parents[1]
STUDY = "research/temporal_credit"
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "study_design.md": f"{STUDY}/README.md",
    "first_study.md": f"{STUDY}/first_study.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)")
SETTINGS = re.compile(r"<!-- settings: ([\w.]+):(\w+) -->")


def on_files(files: Files, config: Any) -> Files:
    for page, name in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    text = SETTINGS.sub(lambda match: settings_table(match[1], match[2]), markdown)
    return moved(text, page.file.src_uri)


def moved(text: str, page: str) -> str:
    """Return the text of a page with the links of the repository's files turned into those of the site."""
    places = {name: page for page, name in OUTSIDE.items()}
    source = posixpath.dirname(OUTSIDE.get(page, f"docs/{page}"))

    def link(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(source, target))
        place = places.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None:
            return words
        return f"{picture}[{words}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, text)


def settings_table(module: str, name: str) -> str:
    """Return a table of the settings that a class declares itself: name, type, default, help."""
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
