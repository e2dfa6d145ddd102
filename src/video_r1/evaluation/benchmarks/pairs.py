"""Benchmarks of minimal pairs: clips that differ in little but what happens when, and have to be told apart.
Their rows get fields that name the sets of questions which are right only as a whole.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from video_r1.data.making.options import listed, split_options
from video_r1.errors import ManifestError
from video_r1.evaluation.benchmarks.spec import Row, json_or_parquet

_TIMEBLIND_OPTIONS = re.compile(r"(.*?)\s*Option A:\s*(.*?)\s*Option B:\s*(.*)", re.DOTALL)


def read_vinoground(path: Path) -> Iterator[Row]:
    """`vinoground_textscore.json` asks which caption fits a clip, `vinoground_videoscore.json` which of two
    clips in one file fits a caption; `idx` is `<counterpart>_pos` or `_neg`. `vinoground.csv` has categories:
    a major one and any number of minor ones, which the authors' get_score_all.py counts alike.
    """
    kind = "text" if "textscore" in path.stem else "video"
    found = _categories(path)
    for row in json_or_parquet(path):
        counterpart = str(row["idx"]).rpartition("_")[0]
        question, options = split_options(str(row["question"]))
        if len(options) != 2:
            raise ManifestError(
                f"{path}: question {row['idx']} has {len(options)} options, not two lines A. and B."
            )
        sets = {"id": f"{row['idx']}-{kind}", "counterpart": counterpart, f"{kind}_set": counterpart}
        categories = found.get(counterpart, [])
        major = categories[0] if categories else kind
        yield {
            **row,
            **sets,
            "question": question,
            "options": options,
            "major": major,
            "categories": categories,
        }


def _categories(path: Path) -> dict[str, list[str]]:
    """By counterpart: the major category, then the minor ones, which `;` separates."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "vinoground.csv").is_file():
            with (folder / "vinoground.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            both = {row["index"]: f"{row['major']};{row['minor'] or ''}".split(";") for row in rows}
            return {index: [kind.strip() for kind in kinds if kind.strip()] for index, kinds in both.items()}
    return {}


def read_mvp(path: Path) -> Iterator[Row]:
    """`video_id` is `<pair>_0` or `_1`; `candidates` is a list as Python writes it."""
    for row in json_or_parquet(path):
        pair, clip = str(row["video_id"]).rpartition("_")[0], str(row["video_path"]).lstrip("/")
        yield {**row, "candidates": listed(row["candidates"]), "pair": pair, "clip": clip}


def read_timeblind(path: Path) -> Iterator[Row]:
    """Four rows an instance: question 0 of clip 0 and 1, question 1 of clip 0 and 1."""
    for row in json_or_parquet(path):
        number, text = int(row["index"]), str(row["question"]).strip()
        part: Row = {"instance": number // 4, "asked": number % 4 // 2, "shown": number % 2}
        part["clip"] = str(row["video_path"]).removeprefix("TimeBlind/")
        choice = _TIMEBLIND_OPTIONS.fullmatch(text)
        if row["type"] == "yes_no":
            options, answer = ["yes", "no"], str(row["answer"]).strip().lower()
        elif row["type"] == "multiple_choice" and choice:
            text, *options = choice.groups()
            answer = str(row["answer"]).strip()
        else:
            raise ManifestError(f"{path}: question {number} is neither yes_no nor has an Option A: and B:")
        yield {**row, **part, "question": text, "options": options, "answer": answer}
