"""Video-MME (arXiv 2405.21075): 900 videos from 11 seconds to an hour, here without subtitles."""

from __future__ import annotations

from video_r1.evaluation.benchmarks.spec import Benchmark, Place

VIDEOMME = Benchmark(
    name="videomme",
    title="VideoMME",
    dataset="lmms-lab/Video-MME",
    files=("videomme/*.parquet", "*.parquet", "*.jsonl", "*.json"),
    unpack="unzip videos_chunked_*.zip, which makes data/",
    questions=2700,
    options=(4, 4),
    fields={
        "problem_id": "question_id",
        "problem": "question",
        "options": "options",
        "answer": "answer",
        "task_type": "task_type",
    },
    places=lambda row: [Place(f"data/{row['videoID']}.{kind}") for kind in ("mp4", "MP4", "mkv")],
    reference_task=lambda row: str(row.get("task_type") or ""),
)
