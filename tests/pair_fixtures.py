"""Small copies of the benchmarks of minimal pairs, in the format that their authors publish."""

# fmt: off

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets

ANSWER = "\nAnswer with the option's letter from the given choices directly."
CAPTIONS = "\nA. he sits before he eats\nB. he eats before he sits" + ANSWER
SEGMENTS = "\nA. First segment (before black frame)\nB. Second segment (after black frame)" + ANSWER


def write_pairs(root: Path, clips: list[Path]) -> None:
    _vinoground(root / "vinoground", clips)
    _mvp(root / "mvp", clips, "full")
    _mvp(root / "mvp_mini", clips, "mini")
    _timeblind(root / "timeblind", clips)


def media(clip: Path, *places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, place)


def _vinoground(folder: Path, clips: list[Path]) -> None:
    """Two counterparts: eight questions."""
    text, video = [], []
    for number in range(2):
        for side, letter, joined in (("pos", "A", f"{number}"), ("neg", "B", f"{number}_reverse")):
            name, both = f"vinoground_videos/{number}_{side}.mp4", f"vinoground_videos_concated/{joined}.mp4"
            shared = {"idx": f"{number}_{side}", "GT": letter}
            question = "Which caption best describes this video?" + CAPTIONS
            text.append({**shared, "video_name": name, "question": question})
            question = "Which video segment matches this caption? Caption: he eats." + SEGMENTS
            video.append({**shared, "video_name": both, "question": question})
            media(clips[number], folder / name, folder / both)
    (folder / "vinoground_textscore.json").write_text(json.dumps(text))
    (folder / "vinoground_videoscore.json").write_text(json.dumps(video))
    (folder / "vinoground.csv").write_text("index,major,minor\n0,action,cyclical;contextual\n1,object,\n")


def _mvp(folder: Path, clips: list[Path], split: str) -> None:
    """A pair of one subset and two of another."""
    pairs = (("temporal_reasoning", "7"), ("intuitive_physics", "8"), ("intuitive_physics", "9"))
    for subset in dict.fromkeys(subset for subset, _ in pairs):
        rows = [
            {
                "video_id": f"{number}_{side}", "video_path": f"/star/{number}_{side}.mp4",
                "question": "Which way?", "answer": answer,
                "candidates": "['to the left', \"the other's way\"]", "source": "star",
            }
            for own, number in pairs
            for side, answer in enumerate(("to the left", "the other's way"))
            if own == subset
        ]
        (folder / subset).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
        media(clips[0], *(folder / "videos" / row["video_path"].lstrip("/") for row in rows))


def _timeblind(folder: Path, clips: list[Path]) -> None:
    """An instance of yes or no, and one of two options."""
    rows: list[dict[str, Any]] = []
    for place in range(4):
        asked, shown = divmod(place, 2)
        clip = f"TimeBlind/videos/vid_00000_{shown}.mp4"
        answer = "yes" if asked == shown else "no"
        question = ("Does it open first?", "Does it close first?")[asked]
        rows.append(
            {"index": place, "video_path": clip, "question": question, "answer": answer, "type": "yes_no"}
        )
    for place in range(4):
        asked, shown = divmod(place, 2)
        texts = ("It is slow.", "It is fast.") if asked == 0 else ("It is fast.", "It is slow.")
        rows.append(
            {
                "index": 4 + place, "video_path": f"TimeBlind/videos/mcq_vid_00000_{shown}.mp4",
                "question": f"Which is right? Option A: {texts[0]} Option B: {texts[1]}",
                "answer": "A" if asked == shown else "B", "type": "multiple_choice",
            }
        )
    folder.mkdir(parents=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("vid", "mcq_vid"):
        media(clips[0], folder / f"videos/{name}_00000_0.mp4")
        media(clips[1], folder / f"videos/{name}_00000_1.mp4")
