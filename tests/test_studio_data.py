"""Manifests in the studio: rows by their places, found by kind, words, problems and pass rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra studio is not installed")

from studio_server import get as got
from studio_server import studio_client

from video_r1.report import reader as tail
from video_r1.studio import folders
from video_r1.studio.folders import Library
from video_r1.studio.manifests import ManifestIndex


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "problem_id": number, "problem": f"Wohin fällt der Würfel in Bild {number}?", "data_type": "video",
        "problem_type": "numerical", "solution": f"<answer>{number}</answer>", "path": f"{number % 3}.mp4",
        "data_source": f"set {number % 2}", **fields,
    }  # fmt: skip


def write(path: Path, rows: Sequence[Any], form: str) -> Path:
    if form == "lines":
        path = path.with_suffix(".jsonl")
        path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    else:
        path.write_text(json.dumps(rows, ensure_ascii=form == "ascii", indent=1 if form == "utf-8" else None))
    return path


def index_of(path: Path) -> ManifestIndex:
    return ManifestIndex(Library([path.parent]).manifests()[path.name])


def read(index: ManifestIndex) -> ManifestIndex:
    for _ in range(1000):
        index.read(0.0)
        if not index.tail.more:
            return index
    raise AssertionError("it never ends")


@pytest.mark.parametrize("form", ["lines", "ascii", "utf-8"])
@pytest.mark.parametrize("block", [7, 300, 1 << 20])
def test_every_row_is_found_at_its_place(
    tmp_path: Path, form: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "BLOCK", block)
    rows = [row(i) for i in range(40)]
    index = read(index_of(write(tmp_path / "m.json", rows, form)))
    assert [index.row(i) for i in range(len(index))] == rows and index.tail.notes == []
    assert index.chosen({"source": "set 1"}) == list(range(1, 40, 2))
    assert index.chosen({"source": "set 7"}) == []


def test_a_manifest_that_grows_and_one_that_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "m", [row(1)], "lines")
    index = read(index_of(path))
    with path.open("a") as file:
        file.write(json.dumps(row(2)) + "\n" + json.dumps(row(3))[:30])
    assert len(read(index)) == 2
    path = write(tmp_path / "l.json", [row(1), row(2)], "ascii")
    index = read(index_of(path))
    life = index.tail.life
    write(path, [row(5), row(6), row(7)], "ascii")
    assert [item["problem_id"] for i in range(len(read(index))) if (item := index.row(i))] == [5, 6, 7]
    assert index.tail.life > life


@pytest.mark.parametrize(("text", "rows", "said"), [
    ('[{"problem_id": 1}, {"problem', 1, "is not JSON after byte 20"),
    ('[{"problem_id": 1}, nonsense, {"problem_id": 2}]', 1, "is not JSON"),
    ('[{"problem_id": 1}, 7, "x", {"problem_id": 2}]', 2, "2 unreadable entries"),
    ('\ufeff [{"problem_id": 1}]', 1, ""),
    ("[]", 0, ""),
    ("[" * 100_000, 0, "is not JSON"),
])  # fmt: skip
def test_lists_that_are_broken(tmp_path: Path, text: str, rows: int, said: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    found = Library([tmp_path])
    (tmp_path / "whole.json").write_text(json.dumps([row(1)]))
    manifest = found.manifests()["whole.json"]._replace(file="m.json")
    index = read(ManifestIndex(manifest))
    assert len(index) == rows and said in " ".join(index.tail.notes)


def test_pages_of_rows(tmp_path: Path) -> None:
    for name in ("0.mp4", "1.mp4"):
        (tmp_path / name).write_bytes(b"0")
    rates = {"ordered": 0.75, "shuffled": 0.25}
    rows = [row(i, **({"pass_rates": rates} if i == 60 else {})) for i in range(120)]
    rows[7]["problem_type"] = "numerisch"
    rows[9]["problem_id"] = 8
    write(tmp_path / "m", rows, "lines")
    with studio_client(tmp_path) as client:
        get = partial(got, client, "/api/rows", manifest="m.jsonl")
        page = get()
        assert (page["rows"], page["total"], page["next"], page["bad"]) == (120, 120, 50, 42)
        assert page["counts"]["source"] == {"set 0": 60, "set 1": 60}
        shown = {item["row"]: item for item in page["shown"]}
        assert len(shown) == 50 and shown[3]["answer"] == "3" and shown[3]["problems"] == []
        assert "no file" in shown[2]["problems"][0] and "numerisch" in shown[7]["problems"][0]
        assert "used before" in shown[9]["problems"][0]
        assert get(at=100)["next"] is None and len(get(at=100)["shown"]) == 20
        bad = [item["row"] for item in get(problems=1)["shown"]]
        assert bad == sorted({7, 9, *range(2, 120, 3)})  # data check names the files that are missing too
        assert [item["row"] for item in get(keep="ordered - shuffled > 0.1")["shown"]] == [60]
        assert [item["row"] for item in get(words="würfel in bild 11?")["shown"]] == [11]
        found = get(words="Würfel", type="numerical")
        assert len(found["shown"]) == 50 and found["next"] == 51
        rest = get(words="Würfel", at=found["next"])
        assert rest["shown"][0]["row"] == 51
        refused = client.get("/api/rows", params={"manifest": "m.jsonl", "keep": "import os"})
        assert refused.status_code == 400 and "keep" in refused.json()["error"]


def test_a_tree_that_takes_long_is_listed_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [100.0], []

    def look(root: Path, depth: int) -> list[Path]:
        looks.append(now[0])
        now[0] += 3
        return []

    monkeypatch.setattr(folders, "find_run_folders", look)
    monkeypatch.setattr(folders.time, "monotonic", lambda: now[0])
    library = Library([tmp_path])
    for _ in range(40):
        library.runs()
        now[0] += 1
    assert looks == [100.0, 133.0]
