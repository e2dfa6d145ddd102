"""T-GRPO with a language model as the judge of free-form answers.

    vllm serve Qwen/Qwen3-8B --port 8001
    python examples/judge.py Qwen/Qwen2.5-VL-3B-Instruct my.json runs/judged http://localhost:8001/v1

Any OpenAI-compatible endpoint will do. What it was asked once is remembered, and requests go out together. An
endpoint that is away stops the run, which goes on from its last checkpoint when it is started again.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import httpx

from video_r1 import TGRPOConfig, TGRPOTrainer
from video_r1.data.answers import extract_answer

ASKED = """Question: {problem}
Right answer: {truth}
Given answer: {given}
Does the given answer say the same as the right one? Reply with yes or no."""


class Judge:
    """A reward function: 1 where the judge says yes; None where right answers can be told without one."""

    def __init__(self, url: str, model: str) -> None:
        self.model = model
        self.client = httpx.Client(base_url=url, timeout=60, transport=httpx.HTTPTransport(retries=3))
        self.says_yes = lru_cache(100_000)(self.ask)

    def ask(self, question: str) -> float:
        said = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        reply = self.client.post("chat/completions", json=said).raise_for_status().json()
        return float(reply["choices"][0]["message"]["content"].strip().lower().startswith("yes"))

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        fields = (columns[name] for name in ("problem_type", "problem", "solution"))
        asked = [
            ASKED.format(problem=problem, truth=extract_answer(solution), given=extract_answer(text))
            if kind == "free-form"
            else None
            for text, kind, problem, solution in zip(completions, *fields, strict=True)
        ]
        questions = list(dict.fromkeys(question for question in asked if question is not None))
        with ThreadPoolExecutor(16) as pool:
            verdicts = dict(zip(questions, pool.map(self.says_yes, questions), strict=True))
        return [None if question is None else verdicts[question] for question in asked]


def main(model: str, manifest: str, out: str, url: str, **settings: Any) -> None:
    rewards = ["format", Judge(url, "Qwen/Qwen3-8B")]
    TGRPOTrainer(model, rewards, TGRPOConfig(output_dir=out, **settings), manifest).train()


if __name__ == "__main__":
    main(*sys.argv[1:5])
