"""Small copies of the benchmarks' folders: annotation in each published format, clips made by the lab."""

# fmt: off

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pair_fixtures import media as _media
from pair_fixtures import write_pairs

from video_r1.lab.clips import write_lab
from video_r1.settings.commands import LabSettings

CLIPS = 3


def lab_clips(folder: Path) -> list[Path]:
    """Some of the lab's clips: 4 seconds at 8 frames a second."""
    made: dict[str, Any] = {"train": 0, "test": CLIPS, "seed": 5, "image_share": 0.0, "workers": 1}
    write_lab(LabSettings(folder=str(folder), families=["direction"], **made))
    return sorted((folder / "videos").glob("*.mp4"))


def write_benchmarks(root: Path, clips: list[Path]) -> None:
    """All benchmarks below `root`."""
    for write in (_vsibench, _videommmu, _mmvu, _mvbench, _tempcompass, _videomme, _videoholmes, _tomato,
                  _tvbench, _longvideobench, _charades_sta):
        write(root / write.__name__[1:], clips)
    write_pairs(root, clips)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _vsibench(folder: Path, clips: list[Path]) -> None:
    scene = {"dataset": "arkitscenes", "scene_name": "41069025"}
    directions = [
        {
            "id": number, **scene, "question_type": f"object_rel_direction_{kind}",
            "question": "Where is the tv?", "ground_truth": "A", "options": ["A. left", "B. right"],
        }
        for number, kind in enumerate(("easy", "medium", "hard"), 10)
    ]
    rows = [
        {
            "id": 0, **scene, "question_type": "object_counting",
            "question": "How many table(s) are in this room?", "ground_truth": "4", "options": None,
        },
        {
            "id": 1, **scene, "question_type": "room_size_estimation",
            "question": "What is the size of this room?", "ground_truth": "19.6", "options": None,
        },
        {
            "id": 2, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "route_planning",
            "question": "Which way?", "ground_truth": "C",
            "options": ["A. Turn Right", "B. Turn Back", "C. Turn Left"],
        },
        *directions,
    ]
    _json_lines(folder / "test.jsonl", rows)
    _media(clips[0], folder / "arkitscenes/41069025.mp4")
    _media(clips[1], folder / "scannet/scene0011_00.mp4")


def _videommmu(folder: Path, clips: list[Path]) -> None:
    options = ["first", "second", "third"]
    clip = "validation_Art_Theory_3"
    asked = {"id": clip, "question": "What is shown?", "question_type": "multiple-choice", "options": options}
    for track, answer in (("Perception", "A"), ("Comprehension", "C")):
        _json_lines(folder / track / "test.jsonl", [{**asked, "answer": answer}])
    sums = {
        "id": "dev_Biology_3", "question": "How many?", "question_type": "open", "options": [],
        "answer": "12.97",
    }
    _json_lines(folder / "Adaptation" / "test.jsonl", [{**asked, "answer": "B"}, sums])
    _media(clips[0], folder / f"Art/{clip}.mp4")
    _media(clips[1], folder / "Science/dev_Biology_3.mp4")


def _mmvu(folder: Path, clips: list[Path]) -> None:
    address = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos"
    shared = {"youtube_url": "", "metadata": {"subject": "Chemistry", "textbook": "", "rationale": ""}}
    choices = {letter: f"{number}.0" for number, letter in enumerate("ABCDE", 5)}
    rows = [
        {
            "id": "validation_0", "video": f"{address}/Art/0.mp4", **shared, "question_type": "open-ended",
            "question": "Which technique?", "choices": dict.fromkeys("ABCDE", ""), "answer": "Dolly Zoom",
        },
        {
            "id": "validation_1", "video": f"{address}/Chemistry/0.mp4", **shared,
            "question_type": "multiple-choice", "question": "How many grams?", "choices": choices,
            "answer": "D",
        },
    ]
    _json(folder / "validation.json", rows)
    _media(clips[2], folder / "videos/Chemistry/0.mp4")


def _mvbench(folder: Path, clips: list[Path]) -> None:
    window = {"start": 1.0, "end": 3.5}
    files: dict[str, list[dict[str, Any]]] = {
        "action_sequence": [
            {
                "video": "ZS9XR.mp4", "question": "What happened after?",
                "candidates": ["Ate.", "Tidied up."], "answer": "Ate.", **window,
            }
        ],
        "object_interaction": [
            {
                "video": "USNP1.mp4", "question": "Which object?",
                "candidates": ["The clothes.", "The pillow."], "answer": "The pillow.", **window,
                "accurate_start": 1.1, "accurate_end": 2.0,
            }
        ],
        "action_antonym": [
            {
                "video": "166583.webm", "question": "Which action?",
                "candidates": ["Not sure", "Scattering", "Piling"], "answer": "Piling",
            }
        ],
        "counterfactual_inference": [
            {
                "video": "video_10978.mp4", "question": "What will happen?",
                "candidates": ["They collide"], "answer": "They collide",
            }
        ],
        "episodic_reasoning": [
            {
                "video": "castle_s07e04_seg02_clip_14", "question": "Why?",
                "candidates": ["To win", "To lose"], "answer": "To win", "subtitle": "…",
                "show_name": "Castle", "start": 0.0, "end": 2.5, "fps": 3,
            }
        ],
    }
    for task, rows in files.items():
        _json(folder / "json" / f"{task}.json", rows)
    _media(
        clips[0], folder / "star/Charades_v1_480/ZS9XR.mp4",
        folder / "tvqa/frames_fps3_hq/castle_s07e04_seg02_clip_14.mp4",
    )
    _media(clips[1], folder / "star/Charades_segment/USNP1_1.0_3.5.mp4")  # cut to its window
    _media(
        clips[2], folder / "ssv2_video_mp4/166583.mp4",
        folder / "video/clevrer/video_validation/video_10978.mp4",
    )


def _tempcompass(folder: Path, clips: list[Path]) -> None:
    information = "".join(
        f"\nInformation {a}: {{'subject': 'man', 'action': '{b}'}}"
        for a, b in zip("ABC", ("dribbling", "dunking", "passing"), strict=True)
    )
    questions = {
        "multi-choice": ("What is the man doing?\nA. dunking\nB. dribbling\nC. passing", "A. dunking"),
        "yes_no": ("Is the man dunking?", "yes"),
        "caption_matching": (
            "Which sentence matches?\nSentence A: A man is dunking.\nSentence B: A man is passing.",
            "Sentence B: A man is passing.",
        ),
        "captioning": (f"You will be presented with a video.{information}\nGenerated Caption:", "B. dunking"),
    }
    for form, (question, answer) in questions.items():
        row = {"video_id": "1034419625", "dim": "action", "question": question, "answer": answer}
        _json_lines(folder / form / "test.jsonl", [row])
    _media(clips[1], folder / "videos/1034419625.mp4")


def _videomme(folder: Path, clips: list[Path]) -> None:
    shared = {
        "video_id": "001", "duration": "short", "domain": "Knowledge",
        "sub_category": "Humanity & History", "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "videoID": "fFjv93ACGo8",
    }
    rows = [
        {
            **shared, "question_id": f"001-{number}", "task_type": task, "question": "Which kind?",
            "answer": answer,
            "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The same number."],
        }
        for number, (task, answer) in enumerate((("Counting Problem", "C"), ("Temporal Reasoning", "A")), 1)
    ]
    folder.mkdir(parents=True)
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    _media(clips[2], folder / "data/fFjv93ACGo8.mp4")


def _videoholmes(folder: Path, clips: list[Path]) -> None:
    options = {letter: f"event {letter}" for letter in "ABCDEF"}
    rows = [
        {
            "video ID": "RSmjqss0XKQ", "Question ID": number, "Question Type": kind, "Question": "Why?",
            "Options": options, "Answer": answer, "Explanation": "…",
        }
        for number, (kind, answer) in enumerate((("SR", "A"), ("TA", "F")), 1)
    ]
    _json(folder / "test_Video-Holmes.json", rows)
    _media(clips[0], folder / "videos/RSmjqss0XKQ.mp4")


def _tomato(folder: Path, clips: list[Path]) -> None:
    question = {"question": "Which way does it turn?", "options": ["Left.", "Right.", "Not at all."]}
    rest = {"motion_type": "turn", "note": "", "variation": {"zoom": 0}, "video_source_url": ""}
    asked = {**question, **rest, "demonstration_type": "human"}
    _json(folder / "data/rotation.json", {"0": {**asked, "answer": 1, "key": "0001-00"}})
    _json(folder / "data/shape&trend.json", {"7": {**asked, "answer": 2, "key": "0002-03"}})
    _media(clips[0], folder / "videos/human/0001-00.mp4")
    _media(clips[1], folder / "videos/human/0002-03.mp4")


def _tvbench(folder: Path, clips: list[Path]) -> None:
    asked = {"question": "What comes first?", "candidates": ["It opens.", "It closes."], "video": "a.mp4"}
    _json(folder / "json/action_antonym.json", [{**asked, "answer": "It closes."}])
    part = {"start": 0.5, "end": 2.0}
    _json(folder / "json/action_sequence.json", [{**asked, **part, "answer": "It opens."}])
    _media(clips[0], folder / "video/action_antonym/a.mp4", folder / "video/action_sequence/a.mp4")


def _longvideobench(folder: Path, clips: list[Path]) -> None:
    row = {"question": "When the ball is red, who speaks?", "video_path": "x.mp4", "question_category": "S2E"}
    answers = {"id": "x_0", "candidates": ["Ann", "Bo", "Cy"], "correct_choice": 2, "duration_group": 15}
    _json(folder / "lvb_val.json", [{**row, **answers}])
    _media(clips[2], folder / "videos/x.mp4")


def _charades_sta(folder: Path, clips: list[Path]) -> None:
    import datasets

    rows = [
        {"video": "3MSZA.mp4", "caption": "person turn a light on.", "timestamp": [0.7, 2.3]},
        {"video": "0BX9N.mp4", "caption": "a person puts a book down.", "timestamp": [1.1, 3.4]},
    ]
    kept = {"video": datasets.Value("string"), "caption": datasets.Value("string")}
    features = datasets.Features({**kept, "timestamp": datasets.Sequence(datasets.Value("float16"))})
    (folder / "data").mkdir(parents=True)
    made = datasets.Dataset.from_list(rows, features=features)
    made.to_parquet(folder / "data/test-00000-of-00001.parquet")
    for row, clip in zip(rows, clips, strict=False):
        _media(clip, folder / "Charades_v1_480" / row["video"])


def reference_row(number: int, path: str, **fields: Any) -> dict[str, Any]:
    """A row of the reference's evaluation JSON."""
    return {
        "problem_id": number, "problem": "What will the person do next?", "data_type": "video",
        "problem_type": "multiple choice", "original_question_type": "",
        "options": ["A. Wash.", "B. Close."], "process": "", "solution": "<answer>B</answer>",
        "path": path, "data_source": "", **fields,
    }
