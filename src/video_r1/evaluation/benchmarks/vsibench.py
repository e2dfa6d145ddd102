"""VSI-Bench (arXiv 2412.14171): spatial questions about 288 scans of rooms."""

from __future__ import annotations

from video_r1.evaluation.benchmarks.spec import Benchmark, Place, Row

NUMBERS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")


def _problem_type(row: Row) -> str | None:
    return "regression" if row["question_type"] in NUMBERS else "multiple choice"


VSIBENCH = Benchmark(
    name="vsibench",
    title="VSI-Bench",
    dataset="nyu-visionx/VSI-Bench",
    files=("test.jsonl", "test.json", "test-*.parquet"),
    unpack="unzip arkitscenes.zip, scannet.zip and scannetpp.zip in it",
    questions=5130,
    options=(2, 4),
    fields={
        "problem_id": "id",
        "problem": "question",
        "options": "options",
        "answer": "ground_truth",
        "task_type": "question_type",
    },
    places=lambda row: [Place(f"{row['dataset']}/{row['scene_name']}.mp4")],
    problem_type=_problem_type,
    prompts={"": "These are frames of a video.\n{question}"},
    metric="accuracy of choices, mean relative accuracy (MRA) of numbers",
    headline="tasks",
    reference_task=lambda row: row["original_question_type"],
)
