"""MMVU (arXiv 2501.12380): expert questions of 27 subjects; the validation set's multiple choice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from video_r1.evaluation.benchmarks.spec import Benchmark, Place, Row, json_or_parquet


def _with_subject(path: Path) -> Iterator[Row]:
    for row in json_or_parquet(path):
        yield {**row, "subject": (row.get("metadata") or {}).get("subject", "")}


def _problem_type(row: Row) -> str | None:
    return "multiple choice" if row["question_type"] == "multiple-choice" else None


def _places(row: Row) -> list[Place]:
    """The address of the clip ends in `…/resolve/main/videos/<Subject>/<n>.mp4`."""
    return [Place(row.get("video_path") or "videos/" + str(row["video"]).partition("/videos/")[2])]


MMVU = Benchmark(
    name="mmvu",
    title="MMVU (mc)",
    dataset="yale-nlp/MMVU",
    files=("validation.json", "data/validation.json", "validation*.parquet"),
    unpack="nothing to unpack: videos/<Subject>/<n>.mp4",
    questions=625,
    options=(5, 5),
    fields={
        "problem_id": "id",
        "problem": "question",
        "options": "choices",
        "answer": "answer",
        "task_type": "subject",
    },
    places=_places,
    problem_type=_problem_type,
    read=_with_subject,
    reference_task=lambda row: row["path"].split("/")[-2].replace("_", " "),
)
