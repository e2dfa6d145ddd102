"""Figures in the documents are those of JSON files that commands wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.docs_tables import DOCS, MAKERS, PAGES, blocks, written_anew


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + page.name)
def test_figures_are_those_of_their_files(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), page.parent):
        assert block.maker in MAKERS
        assert block.body == block.made(), "python -m benchmarks.docs_tables writes it anew"


def test_the_readmes_figures_are_those_of_their_files() -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    gaps = json.loads((DOCS / "demo" / "seed-0.json").read_text())["temporal_gap"]
    for gap in (gaps["sft"], gaps["rl"]):
        low, high = gap["interval95"]
        assert f"{gap['gap']:.3f} [{low:.3f}, {high:.3f}]" in text
    ratio = json.loads((DOCS / "figures" / "update.json").read_text())["ratio"]
    assert f"{ratio:.1f} times faster" in text


def test_a_page_is_written_anew(tmp_path: Path) -> None:
    summary = json.loads((DOCS / "demo" / "seed-0.json").read_text())
    summary["temporal_gap"]["rl"] |= {"gap": 0.1234, "interval95": [0, 0.5]}
    (tmp_path / "a.json").write_text(json.dumps(summary))
    old = "| seed | checkpoint |\n|---|---|\n| 0 | base |\n"
    page = f"# A\n\n{old}\n<!-- figures demo: a.json -->\n{old}\n<!-- figures demo: b.json -->\n{old}End\n"
    anew = written_anew(page, tmp_path)
    before, _, rest = anew.partition("<!-- figures demo: a.json -->\n")
    made, _, after = rest.partition("\n\n")
    assert before == f"# A\n\n{old}\n" and after == f"<!-- figures demo: b.json -->\n{old}End\n"
    assert made.splitlines()[1] == "|---|---|---|---|---|---|"
    assert made.endswith(" | 0.123 [0.000, 0.500] | 1.00 |")
    assert written_anew(anew, tmp_path) == anew
