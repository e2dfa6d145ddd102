"""MVBench (arXiv 2311.17005): twenty tasks of 200 questions, five of them about a window of the clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from video_r1.evaluation.benchmarks.spec import Benchmark, Place, Row, json_or_parquet

# Folder of the original clips, as in the authors' notebook. In the alphabet's order, which is also the order
# of the reference's JSON.
FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
QUESTIONS_PER_TASK = 200
# Folders in which the data set's branch `video` has the same clips cut to their windows, or converted.
_CUT = {
    "sta/sta_video": "sta/sta_video_segment",
    "star/Charades_v1_480": "star/Charades_segment",
    "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment",
}
_CONVERTED = {"ssv2_video": "ssv2_video_mp4", "nturgbd": "nturgbd_convert"}


def _with_task(path: Path) -> Iterator[Row]:
    """The file's name is the task."""
    if path.stem in FOLDERS:
        for row in json_or_parquet(path):
            yield {**row, "task": path.stem}


def _places(row: Row) -> list[Place]:
    folder, name = FOLDERS[row["task"]], str(row["video"])
    stem = str(PurePosixPath(name).with_suffix("")) if "." in name else name
    names = dict.fromkeys([name, f"{stem}.mp4"] if "." in name else [f"{stem}.mp4"])
    places = [Place(f"{folder}/{each}") for each in names]
    if folder in _CONVERTED:
        places += [Place(f"{_CONVERTED[folder]}/{each}") for each in names]
    if folder in _CUT:
        cut = f"{_CUT[folder]}/{stem}"
        places += [Place(f"{cut}_{row.get('start')}_{row.get('end')}.mp4", is_window=True)]
        places += [Place(f"{cut}.mp4", is_window=True)]
    # The archives keep their folder when they are unpacked side by side, or are within `video` or `data0613`.
    return [
        Place(f"{above}{place.path}", place.is_window)
        for place in places
        for above in ("", "video/", "data0613/")
    ]


def _reference_task(row: Row) -> str:
    """The reference numbers all 4,000 questions from 1, task after task."""
    return list(FOLDERS)[(int(row["problem_id"]) - 1) // QUESTIONS_PER_TASK]


MVBENCH = Benchmark(
    name="mvbench",
    title="MVBench",
    dataset="OpenGVLab/MVBench",
    files=("json/*.json", "*.json"),
    unpack="unzip the archives of video/; encode tvqa's folders of JPEG frames as MP4 at 3 frames a second; "
    "fine_grained_pose (NTU RGB+D) has to be asked for at its authors'",
    questions=4000,
    options=(1, 5),  # five questions of counterfactual_inference have but one candidate
    fields={"problem": "question", "options": "candidates", "answer": "answer", "task_type": "task"},
    places=_places,
    read=_with_task,
    window=("start", "end"),
    reference_task=_reference_task,
    unverified=(
        "clips of the branch `video` that are cut to their window are named <clip>_<start>_<end>.mp4 in all "
        "three folders, as seen in one of them",
    ),
)
