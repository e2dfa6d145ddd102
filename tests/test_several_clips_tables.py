"""Tables whose rows show several clips or images, by name or in their cells, as rows of a manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from made_tables import make, written
from PIL import Image
from test_several_clips_runs import BUDGET, ROWS, write_files
from tiny_questions import row

from video_r1.data.decoding.decoders import read_media
from video_r1.data.manifests.records import Sample, check_manifest, load_manifest, placed_rows
from video_r1.data.manifests.trl_rows import trl_samples
from video_r1.data.reading import Reader
from video_r1.errors import MediaError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("several"))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "swift, at their tags": (
        "swift.jsonl",
        {"messages": [user("Is <video> as <video>?")], "videos": ["a/ball.mp4", "cup.mp4"], "answer": "1"},
        {"problem": "Is <video> as <video>?", "path": ["a/ball.mp4", "cup.mp4"], "data_type": "video"},
    ),
    "trl, parts of the content": (
        "trl.jsonl",
        {
            "prompt": [user([{"type": "video"}, {"type": "text", "text": "or"}, {"type": "video"}])],
            "videos": ["a/ball.mp4", "cup.mp4"], "answer": "3",
        },
        {"problem": "<video>\nor\n<video>", "path": ["a/ball.mp4", "cup.mp4"], "problem_type": "numerical"},
    ),
    "llava, turns about two clips": (
        "llava.json",
        {
            "id": 4, "video": ["cup.mp4", "a/ball.mp4"],
            "conversations": [
                {"from": "human", "value": "<video>\n<video>\nWhat?"}, {"from": "gpt", "value": "x"},
                {"from": "human", "value": "And then?"}, {"from": "gpt", "value": "y"},
            ],
        },
        {"problem_id": "4-1", "problem": "<video>\n<video>\nWhat?", "path": ["cup.mp4", "a/ball.mp4"]},
    ),
    "onethinker": (
        "onethinker.json",
        {
            "problem_id": 9, "problem": "<video><video>Same?", "problem_type": "open-ended",
            "videos": ["cup.mp4", "a/ball.mp4"], "solution": "<answer>no</answer>",
        },
        {"problem": "<video><video>Same?", "path": ["cup.mp4", "a/ball.mp4"]},
    ),
    "columns that are joined": (
        "pairs.json",
        {"one": "cup.mp4", "other": "ball", "question": "Same?", "answer": "no"},
        {"problem": "Same?", "path": ["cup.mp4", "a/ball.mp4"], "data_type": "video"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tables_become_rows(case: str, shelf: Path, tmp_path: Path) -> None:
    name, said, expected = CASES[case]
    words = ("--columns", "path=one+other") if "joined" in case else ()
    rows, refused = make(shelf, written(tmp_path, name, [said]), *words)
    assert refused == [] and expected.items() <= rows[0].items(), rows
    assert len(rows) == (2 if "llava" in case else 1)
    if len(rows) == 2:
        assert rows[1]["problem"] == "And then?" and rows[1]["path"] == rows[0]["path"]


def test_pictures_of_trl_tables(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green")]
    parts = [
        {"type": "image"},
        {"type": "text", "text": "or"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    samples: list[Sample] = trl_samples(
        [{"prompt": [user(parts)], "images": pictures}, {"prompt": "Which?", "images": pictures}], tmp_path
    )
    assert [len(sample.paths) for sample in samples] == [2, 2] and samples[0].paths == samples[1].paths
    assert samples[0].messages[0]["content"] == "<image>or<image>?"
    assert samples[1].messages[0]["content"] == "Which?"
    seen = [{"role": "system", "content": [parts[0]]}, user([parts[1], parts[2]])]  # not all the user's
    (sample,) = trl_samples([{"prompt": seen, "images": pictures}], tmp_path)
    assert [turn["content"] for turn in sample.messages] == ["", "or"]


def held(folder: Path) -> Path:
    """A Parquet table as `push_to_hub` writes it, whose cells hold lists of images; the last one is empty."""
    cells = [[cell_of(folder, number) for number in each] for each in ([0, 1, 2], [2, 0], [1], [])]
    rows = [row(n, "free-form", "image", "") | {"images": cell, "path": None} for n, cell in enumerate(cells)]
    made = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    made.to_parquet(folder / "held.parquet", batch_size=2)
    return folder / "held.parquet"


@pytest.mark.usefixtures("own_copies")
def test_lists_in_the_cells_of_a_table(folder: Path, tmp_path: Path) -> None:
    """Each file lies at its place in the list; a row without one says so."""
    table = held(folder)
    samples, _, (problem,) = check_manifest(table)
    assert "path is []" in problem.text and problem.row == 4
    assert [len(sample.paths) for sample in samples] == [3, 2, 1]
    assert samples[1].paths == tuple(f"parquet://images/1.{item}::{table.resolve()}" for item in (0, 1))
    with Reader(BUDGET) as reader:
        frames = [[media.frames for media in reader.media(sample)] for sample in samples]
        alone = load_manifest([ROWS[2] | {"path": f"{n}.png", "problem_id": n} for n in range(3)], folder)
        files = [reader.media(sample)[0].frames for sample in alone]
    for cells, expected in zip(frames, ([0, 1, 2], [2, 0], [1]), strict=True):
        assert all(torch.equal(ours, files[number]) for ours, number in zip(cells, expected, strict=True))
    kept = [given["path"] for _, given in placed_rows(str(table), "train", str(folder))]
    assert kept[1:3] == [["parquet://images/1.0::held.parquet", "parquet://images/1.1::held.parquet"],
                         "parquet://images/2.0::held.parquet"]  # fmt: skip
    missing = replace(samples[2], path=samples[2].path.replace("2.0", "2.1"))
    with pytest.raises(MediaError, match="there are no bytes in that cell"):
        read_media(missing, replace(BUDGET, seconds=0))

    said = {"messages": [[user("<image> or <image>?")]], "images": [[cell_of(folder, n) for n in (0, 2)]]}
    made = datasets.Dataset.from_dict({**said, "solution": ["yes"]})
    made.cast_column("images", datasets.List(datasets.Image())).to_parquet(folder / "chats.parquet")
    ((taken,), refused) = make(folder, folder / "chats.parquet")
    assert refused == [] and taken["problem"] == "<image> or <image>?"
    assert taken["path"] == [f"parquet://images/0.{item}::chats.parquet" for item in (0, 1)]


def cell_of(folder: Path, number: int) -> dict[str, Any]:
    return {"bytes": (folder / f"{number}.png").read_bytes(), "path": f"{number}.png"}
