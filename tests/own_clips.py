"""A folder as people bring it: some clips and a table of questions that names one clip too many."""

from __future__ import annotations

from pathlib import Path

from tiny_models import moving_square, write_clip


def write_own_clips(folder: Path) -> None:
    """Eight clips of a square that goes right or left, below `clips`, and questions.csv."""
    (folder / "clips").mkdir(parents=True)
    lines = ["clip,question,a,b,answer"]
    for number in range(1, 9):
        frames = moving_square(frames=12, height=112, width=112)
        goes_right = number % 3 != 0
        write_clip(
            folder / "clips" / f"park-{number}.mp4", frames if goes_right else frames[::-1].copy(), fps=4.0
        )
        lines.append(f"park-{number}.mp4,Which way does the square go?,left,right,{'ab'[goes_right]}")
    lines.append("park-9.mp4,Which way does the square go?,left,right,a")
    (folder / "questions.csv").write_text("\n".join(lines) + "\n")
