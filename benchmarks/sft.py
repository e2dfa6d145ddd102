"""A whole SFT step, forward and backward: responses in one row, against a padded batch with all logits.

    python -m benchmarks.sft --json [--questions 2] [--response 512] [--vocabulary 151936]

The paper's shapes with a small model: 16 frames are 1,024 tokens, the vocabulary is Qwen2.5-VL's. The other
way is the usual one: prompts and responses padded to the longest, the model's own forward with its logits
from the first response on, and cross-entropy. Response lengths differ (the last question's is a quarter).
`head`: the same for the head alone, from the same hidden states. `equal`: losses, gradients and the number of
likeliest tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._command import benchmark_parser
from benchmarks._sizes import SIZES, build_model, question, text
from benchmarks._timing import compare, machine
from video_r1.data.prompts import Prompt
from video_r1.models.group_forward import Scoring, group_logprobs, token_logprobs

IGNORED = -100
Result = tuple[Tensor, Tensor]  # −Σ log p of the responses' tokens, and how many of them are the likeliest


def padded(model: Any, prompts: Sequence[Prompt], responses: Sequence[Tensor]) -> Result:
    """The padded batch."""
    pad = nn.utils.rnn.pad_sequence
    rows = [torch.cat([p.input_ids, r]) for p, r in zip(prompts, responses, strict=True)]
    labels = pad(
        [
            torch.cat([torch.full_like(p.input_ids, IGNORED), r])
            for p, r in zip(prompts, responses, strict=True)
        ],
        batch_first=True,
        padding_value=IGNORED,
    )
    kinds = [
        torch.cat([p.features["mm_token_type_ids"][0], torch.zeros_like(r)])
        for p, r in zip(prompts, responses, strict=True)
    ]
    names = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    first = int((labels != IGNORED).any(0).nonzero()[0])
    logits = model(
        pad(rows, batch_first=True),
        attention_mask=pad([torch.ones_like(row) for row in rows], batch_first=True),
        mm_token_type_ids=pad(kinds, batch_first=True),
        use_cache=False,
        logits_to_keep=labels.shape[1] - first + 1,
        **{name: torch.cat([p.features[name] for p in prompts]) for name in names},
    ).logits[:, :-1]
    taught = labels[:, first:] != IGNORED
    return summed(logits[taught], labels[:, first:][taught])


def summed(logits: Tensor, targets: Tensor) -> Result:
    logits = logits.float()
    right = (logits.detach().argmax(-1) == targets).sum()
    return nn.functional.cross_entropy(logits, targets, reduction="sum"), right


def one_row(model: Any, prompts: Sequence[Prompt], responses: Sequence[Tensor]) -> Result:
    """What `SFTTrainer` computes."""
    result = group_logprobs(model, prompts, [[response] for response in responses], with_likeliest=True)
    assert result.likeliest is not None
    return -result.logprobs.sum(), result.likeliest.sum()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cpu")
    size = replace(SIZES["lab"], vocabulary=arguments.vocabulary, frames=16, frame=(16, 32), text=100)
    model: Any = build_model(size, device, torch.float32)
    generator = torch.Generator().manual_seed(1)
    prompts = [question(size, generator) for _ in range(arguments.questions)]
    lengths = [arguments.response] * (arguments.questions - 1) + [arguments.response // 4]
    responses = [text(size, length, generator) for length in lengths]
    hidden = torch.randn(sum(lengths), size.hidden, generator=generator).requires_grad_()
    targets = torch.cat(responses)

    def step(loss: Callable[[], Result]) -> tuple[float, int, list[Tensor]]:
        total, right = loss()
        total.backward()
        gradients = [weight.grad for weight in [*model.parameters(), hidden] if weight.grad is not None]
        model.zero_grad(set_to_none=True)
        hidden.grad = None
        return total.item(), int(right), gradients

    def head() -> Result:
        scoring = Scoring(likeliest=True)
        scores = token_logprobs(model.lm_head, hidden, targets, arguments.vocabulary, scoring)
        assert scores.likeliest is not None
        return -scores.logprobs.sum(), scores.likeliest.sum()

    sides: dict[str, tuple[Callable[[], Result], Callable[[], Result]]] = {
        "step": (lambda: one_row(model, prompts, responses), lambda: padded(model, prompts, responses)),
        "head": (head, lambda: summed(model.lm_head(hidden), targets)),
    }
    results: dict[str, Any] = {}
    for name, (ours, other) in sides.items():
        found, expected = step(ours), step(other)
        worst = max(
            float((a - b).norm() / b.norm())
            for a, b in zip(found[2], expected[2], strict=True)
            if b.norm() > 1e-4 * max(float(g.norm()) for g in expected[2])
        )
        loss_error = abs(found[0] - expected[0]) / expected[0]
        results[name] = compare(lambda s=ours: step(s), lambda s=other: step(s), arguments.rounds, device) | {
            "equal": loss_error < 1e-5 and worst < 1e-3 and found[1] == expected[1],
            "loss_error": loss_error,
            "largest_gradient_error": worst,
        }
    sizes = {"prompt": len(prompts[0].input_ids), "responses": lengths, "vocabulary": arguments.vocabulary}
    return results["step"] | {"head": results["head"], "sizes": sizes} | machine(device)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--response", type=int, default=512, help="tokens of the longest response")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
