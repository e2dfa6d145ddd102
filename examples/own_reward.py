"""T-GRPO with a reward of your own beside the built-in ones.

    python examples/own_reward.py Qwen/Qwen2.5-VL-3B-Instruct my.json runs/own-reward

A reward function has TRL's signature: lists of one length, with an entry for each completion, every field of
the manifest's rows among them. It gives a number, or None where it does not apply (docs/t-grpo.md).
"""

import sys
from typing import Any

from video_r1 import TGRPOConfig, TGRPOTrainer

WORDS_OF_TIME = ("first", "then", "before", "after", "finally")


def tells_an_order(completions: list[str], data_type: list[str], **columns: Any) -> list[float | None]:
    """Whether a rationale about a clip says what comes before what; images have no order."""
    return [
        float(any(word in text.lower() for word in WORDS_OF_TIME)) if kind == "video" else None
        for text, kind in zip(completions, data_type, strict=True)
    ]


def main(model: str, manifest: str, out: str, **settings: Any) -> None:
    weights = {"accuracy": 1.0, "format": 0.5, "tells_an_order": 0.2}
    trainer = TGRPOTrainer(
        model,
        reward_funcs=["accuracy", "format", tells_an_order],
        args=TGRPOConfig(output_dir=out, reward_weights=weights, **settings),
        train_dataset=manifest,
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:4])
