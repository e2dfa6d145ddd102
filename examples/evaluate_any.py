"""Any vision-language model on your own questions: accuracy in order, and what the order of the frames adds.

    python examples/evaluate_any.py HuggingFaceTB/SmolVLM2-500M-Video-Instruct my.json runs/eval/smolvlm2

Each question is asked with its clip in order, shuffled, reversed and without any frame; a clip is decoded
once. The folder has every answer; a run that was interrupted goes on.
"""

import sys
from typing import Any

from video_r1.evaluation.evaluate import run_eval
from video_r1.settings.decoding import EvalSettings


def main(model: str, manifest: str, out: str, **settings: Any) -> dict[str, float]:
    """The accuracy in each order, with the largest frame count."""
    asked: Any = {"order": ["ordered", "shuffled", "reversed", "blind"], **settings}
    summary = run_eval(EvalSettings(model=model, manifest=manifest, out=out, **asked))
    figures = list(summary["frames"].values())[-1]
    return {order: figures[order]["accuracy"] for order in asked["order"]}


if __name__ == "__main__":
    for order, accuracy in main(*sys.argv[1:4]).items():
        print(f"{order:>10}  {accuracy:.3f}")
