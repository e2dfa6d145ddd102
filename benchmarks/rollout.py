"""Sampling a group of completions: one prefill a question against `model.generate(num_return_sequences=G)`.

    python -m benchmarks.rollout --json [--size lab|small|3b|7b] [--completion 64] [--group 8] [--questions 1]
                                 [--family qwen2_5_vl|qwen3_5]

`generate` repeats pixels and prompt for every completion. Both sample at temperature 1 and never stop early.
On a CPU, `ratio_onednn` is what the engine gains by multiplying through oneDNN (models/onednn.py).
`equal`: the log-probabilities kept while sampling are those of a plain forward over the expanded batch.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks._sizes import IMAGE, SIZES, VIDEO, build_model, group_parser, question
from benchmarks._timing import compare, flops, machine
from benchmarks.update import TOLERANCES, expanded_logprobs
from video_r1.rollout import transformers
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine

# No end token, no text: the engine wants a tokenizer for these two alone.
TOKENIZER = SimpleNamespace(
    get_vocab=dict, eos_token_id=None, batch_decode=lambda rows, skip_special_tokens: [""] * len(rows)
)


@torch.no_grad()
def largest_difference(
    model: Any, engine: TransformersEngine, prompts: list[Any], sampling: SamplingSettings
) -> float:
    """Between the log-probabilities of sampling and those of a forward of pixels, prompt and completion."""
    visual = torch.tensor([VIDEO, IMAGE])
    kept = [  # random weights write placeholders too, and a forward would look for their pixels
        [rollout for rollout in group if not torch.isin(rollout.token_ids, visual).any()]
        for group in engine.sample(prompts, sampling)
    ]
    sampled = torch.cat([rollout.logprobs for group in kept for rollout in group])
    completions = [[rollout.token_ids for rollout in group] for group in kept]
    return float((sampled - expanded_logprobs(model, prompts, completions).cpu()).abs().max())


def run(arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    model: Any = build_model(SIZES[arguments.size], device, dtype, arguments.family).eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    size = SIZES[arguments.size]
    prompts = [question(size, generator, arguments.family) for _ in range(arguments.questions)]
    engine = TransformersEngine(model, TOKENIZER)
    sampling = SamplingSettings(n=arguments.group, max_tokens=arguments.completion, seed=0)
    inputs = {
        name: torch.cat([prompt.features[name] for prompt in prompts]).to(device)
        for name in prompts[0].features
    }
    inputs["input_ids"] = torch.stack([prompt.input_ids for prompt in prompts]).to(device)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def ours() -> object:
        return engine.sample(prompts, sampling)

    def generate() -> object:
        return model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=arguments.group,
            max_new_tokens=arguments.completion,
            pad_token_id=0,
        )

    def without_onednn() -> object:
        with patch.object(transformers, "onednn_linears", lambda model, rows: nullcontext()):
            return engine.sample(prompts, sampling)

    difference = largest_difference(model, engine, prompts, sampling)
    result = compare(ours, generate, arguments.rounds, device)
    if device.type == "cpu":
        result["ratio_onednn"] = compare(ours, without_onednn, arguments.rounds, device)["ratio"]
    tokens = arguments.questions * arguments.group * arguments.completion
    return (
        result
        | {
            "flop_ratio": round(flops(generate) / flops(ours), 3),
            "equal": difference <= TOLERANCES[dtype][0],
            "largest_logprob_difference": difference,
            "tokens_per_second": round(tokens / result["seconds"]),
            "sizes": {
                "model": arguments.size,
                "family": arguments.family,
                "weights": sum(p.numel() for p in model.parameters()),
                "prompt": len(prompts[0].input_ids),
                "completion": arguments.completion,
                "group": arguments.group,
                "questions": arguments.questions,
                "dtype": arguments.dtype,
            },
        }
        | machine(device)
    )


def main() -> None:
    parser = group_parser(__doc__)
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--questions", type=int, default=1)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
