"""T-GRPO on rows that are made in Python: no manifest file, clips wherever they lie.

    python examples/own_data.py Qwen/Qwen2.5-VL-3B-Instruct clips/ runs/own-data

Here the name of a clip says what it shows: clips/left-0001.mp4, clips/right-0002.mp4. Rows have the fields of
docs/data-format.md; each is checked before the model is loaded, and all problems are named together.
"""

import sys
from pathlib import Path
from typing import Any

from video_r1 import TGRPOConfig, TGRPOTrainer

DIRECTIONS = ("left", "right")


def rows_of(clips: Path) -> list[dict[str, Any]]:
    """A multiple-choice question about each clip."""
    return [
        {
            "problem_id": path.stem,
            "problem": "Which way does it move?",
            "data_type": "video",
            "problem_type": "multiple choice",
            "options": [f"{letter}. {direction}" for letter, direction in zip("AB", DIRECTIONS, strict=True)],
            "solution": f"<answer>{'AB'[DIRECTIONS.index(path.stem.split('-')[0])]}</answer>",
            "path": path.name,
        }
        for path in sorted(clips.glob("*.mp4"))
    ]


def main(model: str, clips: str, out: str, **settings: Any) -> None:
    rows = rows_of(Path(clips))
    held_out = len(rows) // 10 or 1
    trainer = TGRPOTrainer(
        model,
        args=TGRPOConfig(output_dir=out, media_root=clips, **settings),
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main(*sys.argv[1:4])
