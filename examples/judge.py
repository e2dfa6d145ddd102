"""T-GRPO with a language model as the judge of free-form answers.

    vllm serve Qwen/Qwen3-8B --port 8001
    python examples/judge.py Qwen/Qwen2.5-VL-3B-Instruct my.json runs/judged http://localhost:8001/v1

Any OpenAI-compatible endpoint will do. In a recipe the same settings stand below `judge:` (docs/t-grpo.md).
"""

import sys
from pathlib import Path
from typing import Any

from video_r1 import TGRPOConfig, TGRPOTrainer
from video_r1.settings.training import JudgeSettings

ASKED = """Question: {question}
Right answer: {truth}
Given answer: {answer}
Does the given answer say the same as the right one? Reply with 1 (yes), 0.5 (in part) or 0 (no) alone."""


def main(model: str, manifest: str, out: str, url: str, **settings: Any) -> None:
    template = Path(out) / "judge.txt"  # left out, the default one asks for a number from 0 to 1
    template.parent.mkdir(parents=True, exist_ok=True)
    template.write_text(ASKED, encoding="utf-8")
    config = TGRPOConfig(
        output_dir=out,
        reward_funcs=["accuracy", "format", "judge"],
        reward_weights={"accuracy": 0.5},  # of free-form answers, which have both, the judge counts more
        judge=JudgeSettings(
            endpoint=url,
            template=str(template),
            fields={"chat_template_kwargs": {"enable_thinking": False}},  # Qwen3 answers at once
            down="wait",  # or stop, or skip
        ),
        **settings,
    )
    TGRPOTrainer(model, args=config, train_dataset=manifest).train()


if __name__ == "__main__":
    main(*sys.argv[1:5])
