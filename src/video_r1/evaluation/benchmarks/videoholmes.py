"""Video-Holmes (arXiv 2505.21374): seven kinds of inference over 270 suspense short films."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from video_r1.evaluation.benchmarks.spec import Benchmark, Place, Row, json_or_parquet


def _numbered(path: Path) -> Iterator[Row]:
    """Question ids start again with each film."""
    for row in json_or_parquet(path):
        yield {**row, "key": f"{row['video ID']}-{row['Question ID']}"}


VIDEOHOLMES = Benchmark(
    name="videoholmes",
    title="Video-Holmes",
    dataset="TencentARC/Video-Holmes",
    files=("test_Video-Holmes.json",),
    unpack="unzip videos.zip, which makes videos_cropped/ or videos/",
    questions=1837,
    options=(6, 6),
    fields={
        "problem_id": "key",
        "problem": "Question",
        "options": "Options",
        "answer": "Answer",
        "task_type": "Question Type",
    },
    places=lambda row: [
        Place(f"{folder}/{row['video ID']}.mp4")
        for folder in ("videos_cropped", "videos", "Benchmark/videos")
    ],
    read=_numbered,
    reference_task=lambda row: str(row.get("original_question_type") or ""),
)
