"""Log-probabilities and gradients of groups of completions: one row against the expanded batch.

    python -m benchmarks.update --json [--size lab|small|3b|7b] [--completion 64] [--group 8] [--questions 1]
                                [--family qwen2_5_vl|qwen3_5]

The expanded batch repeats pixels and prompt for every completion and computes logits at every position, as
GRPO trainers commonly do. Both get the same loss, and their log-probabilities and gradients are compared.
`flop_ratio` is the expanded batch's counted FLOPs over ours: the speed-up that the arithmetic allows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._sizes import SIZES, build_model, group_parser, question, text
from benchmarks._timing import compare, flops, machine, matrix_rate
from video_r1.data.prompts import Prompt
from video_r1.models.group_forward import group_logprobs

# Largest difference of a log-probability, and of a gradient relative to its norm.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.1, 0.1)}


def expanded_logprobs(
    model: Any, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]
) -> Tensor:
    """[N] float32 log-probabilities; prompt and pixels are repeated for every completion."""
    device = next(model.parameters()).device
    groups = list(zip(prompts, completions, strict=True))
    rows = [(prompt.input_ids, tokens) for prompt, group in groups for tokens in group]
    longest = max(len(prompt) + len(tokens) for prompt, tokens in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, (prompt, tokens) in enumerate(rows):
        end = len(prompt) + len(tokens)
        ids[number, :end] = torch.cat([prompt, tokens])
        mask[number, :end] = 1
    features = {
        name: torch.cat([prompt.features[name] for prompt, group in groups for _ in group]).to(device)
        for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        if name in prompts[0].features
    }
    kinds = torch.where(ids == model.config.video_token_id, 2, 0).to(device)
    ids = ids.to(device)
    logits = model(ids, attention_mask=mask.to(device), mm_token_type_ids=kinds, **features).logits
    parts = []
    for row, (prompt, tokens) in enumerate(rows):  # one at a time, as a float32 copy of all would not fit
        start = len(prompt)
        scores = torch.log_softmax(logits[row, start - 1 : start + len(tokens) - 1].float(), -1)
        parts.append(scores.gather(1, tokens.to(device)[:, None])[:, 0])
    return torch.cat(parts)


def largest_differences(
    ours: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> tuple[float, float]:
    """Of the log-probabilities, absolute; and of the weights' gradients, relative to their norms."""
    norms = {name: float(gradient.norm()) for name, gradient in expected[1].items()}
    errors = [
        float((ours[1][name] - gradient).norm()) / norms[name]
        for name, gradient in expected[1].items()
        if norms[name]
        > 1e-6 * max(norms.values())  # key biases have none but rounding: softmax ignores shifts
    ]
    return float((ours[0] - expected[0]).abs().max()), max(errors)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    size = SIZES[arguments.size]
    model = build_model(size, device, dtype, arguments.family)
    if arguments.gradient_checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(1)
    prompts = [question(size, generator, arguments.family) for _ in range(arguments.questions)]
    lengths = [arguments.completion - (g % 4) * arguments.ragged for g in range(arguments.group)]
    completions = [[text(size, length, generator) for length in lengths] for _ in prompts]
    upstream = torch.randn(sum(lengths) * len(prompts), generator=generator).to(device)

    def ours() -> Tensor:
        return group_logprobs(model, prompts, completions).logprobs

    def expanded() -> Tensor:
        return expanded_logprobs(model, prompts, completions)

    def update(score: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = score()
        (logprobs * upstream).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return logprobs.detach(), gradients

    difference, error = largest_differences(update(ours), update(expanded))
    tolerance = TOLERANCES[dtype]
    counted, counted_expanded = flops(lambda: update(ours)), flops(lambda: update(expanded))
    result = compare(lambda: update(ours), lambda: update(expanded), arguments.rounds, device)
    result |= {
        "flop_ratio": round(counted_expanded / counted, 3),
        "share_of_flop_ratio": round(result["ratio"] * counted / counted_expanded, 3),
        "gflop": round(counted / 1e9, 1),
        "equal": difference <= tolerance[0] and error <= tolerance[1],
        "largest_logprob_difference": difference,
        "largest_gradient_error": error,
        "sizes": {
            "model": arguments.size,
            "family": arguments.family,
            "weights": sum(p.numel() for p in model.parameters()),
            "prompt": len(prompts[0].input_ids),
            "completions": lengths,
            "questions": len(prompts),
            "dtype": arguments.dtype,
            "gradient_checkpointing": arguments.gradient_checkpointing,
        },
    }
    if device.type == "cuda":
        rate = matrix_rate(device, dtype)
        achieved = counted / result["seconds"]
        result["tflop_per_second"] = round(achieved / 1e12, 1)
        result["matrix_rate_share"] = round(achieved / rate, 3)
    return result | machine(device)


def main() -> None:
    parser = group_parser(__doc__)
    parser.add_argument("--completion", type=int, default=64, help="tokens of the longest completion")
    parser.add_argument("--ragged", type=int, default=0, help="tokens by which neighbours differ in length")
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
