"""Episodes of two looks: one row and one prompt pass a group, against each episode by itself.

    python -m benchmarks.look --json [--size lab|small|3b|7b] [--group 8] [--turn 32] [--rounds 5]
                              [--family qwen2_5_vl|qwen3_5]

`update`: log-probabilities and gradients of a group, against a row for each episode, all in one batch.
`sampling`: three rounds, of which each reads the group's prompt once, against one request an episode that
reads everything before its turn.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from benchmarks._sizes import SIZES, build_model, group_parser, question
from benchmarks._timing import compare, flops, machine
from benchmarks.rollout import TOKENIZER
from benchmarks.update import TOLERANCES, largest_differences
from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout, ToolTurn
from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.episodes import Episode
from video_r1.rollout.transformers import TransformersEngine

LOOKS = 2


def sampled(
    engine: TransformersEngine, prompts: list[Prompt], looks: list[list[Prompt]], tokens: int
) -> list[Rollout]:
    """An episode of each prompt; equal prompts share what they have in common."""
    sampling = SamplingSettings(max_tokens=tokens)
    shared = all(prompt is prompts[0] for prompt in prompts)
    first, counts = (prompts[:1], [len(prompts)]) if shared else (prompts, None)
    found = engine.sample(first, replace(sampling, seed=0), counts)
    rollouts = [rollout for group in found for rollout in group]
    for number in range(LOOKS):
        turns = [
            ToolTurn(len(r.token_ids), "", (), turn[number]) for r, turn in zip(rollouts, looks, strict=True)
        ]
        rollouts = [replace(r, turns=(*r.turns, turn)) for r, turn in zip(rollouts, turns, strict=True)]
        so_far = [Episode(p, "", tokens, r).so_far() for p, r in zip(prompts, rollouts, strict=True)]
        news = engine.sample(so_far, replace(sampling, seed=number + 1))
        rollouts = [
            replace(
                old,
                token_ids=torch.cat([old.token_ids, new.token_ids]),
                logprobs=torch.cat([old.logprobs, new.logprobs]),
            )
            for old, (new,) in zip(rollouts, news, strict=True)
        ]
    return rollouts


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    size, group = SIZES[arguments.size], arguments.group
    model: Any = build_model(size, device, dtype, arguments.family).eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    prompt = question(size, generator, arguments.family)
    small = replace(size, frames=size.frames // 4, text=24)
    looks = [[question(small, generator, arguments.family) for _ in range(LOOKS)] for _ in range(group)]
    engine = TransformersEngine(model, TOKENIZER)
    copies = [replace(prompt) for _ in range(group)]
    rollouts = sampled(engine, [prompt] * group, looks, arguments.turn)
    pieces = [rollout.pieces() for rollout in rollouts]
    tokens = [rollout.token_ids for rollout in rollouts]
    upstream = torch.randn(sum(map(len, tokens)), generator=generator).to(device)

    def update(together: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if together:
            logprobs = group_logprobs(model, [prompt], [tokens], pieces=[pieces]).logprobs
        else:
            rows = [[one] for one in tokens], [[one] for one in pieces]
            logprobs = group_logprobs(model, copies, rows[0], pieces=rows[1]).logprobs
        (logprobs * upstream).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return logprobs.detach(), gradients

    ours, alone = update(True), update(False)
    difference, error = largest_differences(ours, alone)
    sampler = float((ours[0].cpu() - torch.cat([r.logprobs for r in rollouts])).abs().max())
    tolerance = TOLERANCES[dtype]
    figures = {
        "update": compare(lambda: update(True), lambda: update(False), arguments.rounds, device)
        | {"flop_ratio": round(flops(lambda: update(False)) / flops(lambda: update(True)), 3)},
        "sampling": compare(
            lambda: sampled(engine, [prompt] * group, looks, arguments.turn),
            lambda: sampled(engine, copies, looks, arguments.turn),
            arguments.rounds,
            device,
        ),
    }
    return {
        "parts": figures,
        "equal": max(difference, sampler) <= tolerance[0] and error <= tolerance[1],
        "largest_logprob_difference": max(difference, sampler),
        "largest_gradient_error": error,
        "sizes": {
            "model": arguments.size,
            "family": arguments.family,
            "prompt": len(prompt.input_ids),
            "look": len(looks[0][0].input_ids),
            "turn": arguments.turn,
            "group": group,
            "dtype": arguments.dtype,
        },
    } | machine(device)


def main() -> None:
    parser = group_parser(__doc__)
    parser.add_argument("--turn", type=int, default=32, help="tokens that the policy writes in a turn")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
