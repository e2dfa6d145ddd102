"""Video-MMMU (arXiv 2501.13826): lectures of six disciplines, each asked about on three tracks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from video_r1.evaluation.benchmarks.spec import Benchmark, Place, Row, json_or_parquet, number_or_choice

DISCIPLINES = {
    "Art": ("Art", "Art_Theory", "Design", "Music"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Humanities": ("History", "Literature", "Sociology", "Psychology"),
    "Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
    "Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
}
_FOLDER = {subject: folder for folder, subjects in DISCIPLINES.items() for subject in subjects}
_EXAM = (
    "You should watch and learn the video content. Then apply what you learned to answer the following "
    "question. The image for this question is at the end of the video.\n{question}"
)
_QUIZ = "{question}\nPlease ignore the Quiz question in last frame of the video."


def discipline(question_id: str) -> str:
    """`validation_Art_Theory_12` → `Art`."""
    return _FOLDER.get("_".join(question_id.split("_")[1:-1]), "")


def _tracks(path: Path) -> Iterator[Row]:
    """Each track has a folder of its own; a clip's id is the same in all three."""
    track = path.parent.name
    for row in json_or_parquet(path):
        yield {**row, "track": track, "question_id": f"{track}-{row['id']}"}


VIDEOMMMU = Benchmark(
    name="videommmu",
    title="VideoMMMU",
    dataset="lmms-lab/VideoMMMU",
    files=tuple(f"[PCA]*[nN]/*.{kind}" for kind in ("parquet", "jsonl", "json")),
    unpack="unzip the videos of each discipline into folders of its name (Art/, Science/, …)",
    questions=900,
    options=(2, 14),
    fields={
        "problem_id": "question_id",
        "problem": "question",
        "options": "options",
        "answer": "answer",
        "task_type": "track",
    },
    places=lambda row: [Place(f"{discipline(row['id'])}/{row['id']}.mp4"), Place(f"{row['id']}.mp4")],
    problem_type=number_or_choice,
    read=_tracks,
    prompts={"Adaptation": _EXAM, "Perception": _QUIZ, "Comprehension": _QUIZ},
    reference_task=lambda row: discipline(row["path"].rsplit("/", 1)[-1].removesuffix(".mp4")),
    unverified=(
        "one folder for each track (Perception, Comprehension, Adaptation) with the annotation in it",
        "the reference's JSON does not name the track: its task types here are disciplines",
    ),
)
