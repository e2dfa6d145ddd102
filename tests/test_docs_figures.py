"""Figures in the documents are those of JSON files that commands wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.docs_tables import DOCS, MAKERS, PAGES, blocks
from research.temporal_credit.analysis import agreement, kept


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + page.name)
def test_figures_are_those_of_their_files(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), page.parent):
        assert block.maker in MAKERS
        assert block.body == block.made(), "python -m benchmarks.docs_tables writes it anew"


def test_the_readmes_figures_are_those_of_their_files() -> None:
    text = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
    demos = [json.loads((DOCS / "demo" / f"seed-{seed}.json").read_text()) for seed in range(3)]
    for stage, low, high in (("grpo", 0.26, 0.33), ("tgrpo", 0.54, 0.64)):
        assert f"{low} to {high}" in text
        assert all(low <= round(demo["accuracy"][stage]["lying"], 2) <= high for demo in demos)
    runs = [run for run in kept() if run["part"] == "confirmation"]
    for arm in ("grpo", "margin", "gate-frozen"):
        own = [run["accuracy"]["lying"] for run in runs if run["arm"] == arm]
        assert len(own) == 10 and f" {sum(own) / 10:.3f} " in text, arm
    skilled, _, _, clear, *_ = [line.split("|")[3].strip() for line in agreement(kept()).splitlines()[2:]]
    study = " ".join((DOCS / "study.md").read_text(encoding="utf-8").split())
    assert f"in {skilled} runs" in study and f"{clear} have their sign" in study
    ratio = json.loads((DOCS / "figures" / "update.json").read_text())["ratio"]
    assert f"{ratio:.1f} times as fast" in text
