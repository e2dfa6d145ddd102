"""`video-r1 plan` against measured peaks: an update, an optimizer step and a rollout.

    python -m benchmarks.memory --json [--size 300m] [--cases full,full-checkpointing,lora,lora-checkpointing]

Planned and measured bytes by part and by phase, of a model with random weights: weights, gradients, AdamW's
states and the reference are added up; the rest is what torch's profiler sees allocated and released.
`…, beyond weights` leaves out what lies there throughout (weights, optimizer, reference), which is easy to
plan. `ratio`: planned ÷ measured of the worst phase; `equal`: every phase within 15 %. It needs 8 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks._command import benchmark_parser
from benchmarks._sizes import MERGE, PATCH, SIZES, build_model, question, text
from benchmarks._timing import machine, peak_bytes
from video_r1.models.group_forward import group_logprobs
from video_r1.models.loading import add_lora
from video_r1.plan.memory import MemoryPlan, memory_plan
from video_r1.recipe import Recipe, load_recipe
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.objective import surrogate_loss
from video_r1.training.reference import frozen_adapters, frozen_copy, starting_adapters

CASES = ("full", "full-checkpointing", "lora", "lora-checkpointing")
ALWAYS = ("weights", "reference", "optimizer")
TOLERANCE = 0.15
RANK = 16
NO_END = SimpleNamespace(
    get_vocab=dict, eos_token_id=None, batch_decode=lambda rows, skip_special_tokens: [""] * len(rows)
)


def recipe_of(arguments: argparse.Namespace, lora: bool, checkpointing: bool) -> Recipe:
    """One question a step, G completions and half as many with shuffled frames, float32."""
    size = SIZES[arguments.size]
    values: dict[str, Any] = {
        "model_name_or_path": "x", "train_manifest": "x", "output_dir": "x", "dtype": "float32",
        "bf16": False,
        "max_frames": size.frames, "frame_pixels": size.frame[0] * size.frame[1] * PATCH**2,
        "image_pixels": (MERGE * PATCH) ** 2, "num_generations": arguments.group, "length_reward": 0.0,
        "max_completion_length": arguments.completion, "gradient_checkpointing": checkpointing,
        "per_device_train_batch_size": 1, "use_peft": lora, "lora_r": RANK,
    }  # fmt: skip
    return load_recipe("rl", None, values)


def measured(arguments: argparse.Namespace, lora: bool, checkpointing: bool) -> dict[str, dict[str, int]]:
    """Bytes by part and by phase."""
    device, size, group = torch.device(arguments.device), SIZES[arguments.size], arguments.group
    model = build_model(size, device, torch.float32)
    model.generation_config.eos_token_id = None
    policy: Any = add_lora(model, RANK) if lora else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    reference = policy if lora else frozen_copy(model, Accelerator())
    adapters = frozen_adapters(policy, device) if lora else {}
    generator = torch.Generator().manual_seed(1)
    prompt = question(size, generator)
    completions = [[text(size, arguments.completion, generator) for _ in range(group)]]
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)  # the Trainer's default
    engine = TransformersEngine(policy, NO_END)
    sampling = SamplingSettings(n=group, max_tokens=arguments.completion, seed=0)

    def update() -> None:
        result = group_logprobs(policy, [prompt], completions, with_entropy=True)
        with torch.no_grad(), starting_adapters(policy, adapters):
            judged = group_logprobs(reference, [prompt], completions).logprobs
        advantages = torch.linspace(-1, 1, group, device=device)
        surrogate_loss(
            result.logprobs, result.logprobs.detach(), advantages, result.lengths,
            normaliser=1.0, loss_type="grpo", beta=0.04, ref_logprobs=judged,
        ).loss.backward()  # fmt: skip

    def sample() -> None:
        engine.sample([prompt, prompt], sampling, [group, group // 2])

    policy.train()
    update()  # once before, for what is made once only, such as the optimizer's states
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    beyond = {"update": peak_bytes(update, device)}
    parts = {
        "weights": tensor_bytes([*policy.parameters(), *policy.buffers()]),
        "gradients": tensor_bytes(weight.grad for weight in trained if weight.grad is not None),
        "optimizer": tensor_bytes(value for state in optimizer.state.values() for value in state.values()),
        "reference": sum(
            tensor_bytes([*module.parameters(), *module.buffers()])
            for module in (adapters.values() if lora else [reference])
        ),
    }  # fmt: skip
    beyond["optimizer step"] = parts["gradients"] + peak_bytes(optimizer.step, device)
    optimizer.zero_grad(set_to_none=True)
    beyond["rollout"] = peak_bytes(sample, device)
    always = sum(parts[part] for part in ALWAYS)
    return {"parts": parts, "phases": {phase: always + more for phase, more in beyond.items()}}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compared(plan: MemoryPlan, found: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Each part and phase, in MiB, with (planned − measured) ÷ measured."""

    def line(planned: int, measured: int) -> dict[str, float]:
        difference = (planned - measured) / measured if measured else float(planned > 0)
        mib = {"planned": planned / 2**20, "measured": measured / 2**20}
        return {**{k: round(v, 1) for k, v in mib.items()}, "difference": round(difference, 4)}

    always = sum(plan.parts[part] for part in ALWAYS), sum(found["parts"][part] for part in ALWAYS)
    parts = {part: line(plan.parts[part], size) for part, size in found["parts"].items()}
    phases = {phase: line(plan.phases[phase], size) for phase, size in found["phases"].items()}
    beyond = {
        f"{phase}, beyond weights": line(plan.phases[phase] - always[0], size - always[1])
        for phase, size in found["phases"].items()
    }
    return {"parts": parts, "phases": phases | beyond}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    size = SIZES[arguments.size]
    cases: dict[str, Any] = {}
    for name in arguments.cases.split(","):
        if name not in CASES:
            raise SystemExit(f"--cases {name}: the cases are {', '.join(CASES)}")
        lora, checkpointing = name.startswith("lora"), name.endswith("checkpointing")
        found = measured(arguments, lora, checkpointing)
        gc.collect()
        with torch.device("meta"):
            config = build_model(size, torch.device("meta"), torch.float32).config
        recipe = recipe_of(arguments, lora, checkpointing)
        plan = memory_plan(config, recipe, text_tokens=size.text + 2, device_type=arguments.device)
        cases[name] = {"weights": plan.traced.parameters, "prompt": plan.row.prompt, **compared(plan, found)}
    phases = [line for case in cases.values() for line in case["phases"].values()]
    worst = max(phases, key=lambda line: abs(line["difference"]))
    return {
        "ratio": round(1 + worst["difference"], 3),
        "ratio_min": round(1 + min(line["difference"] for line in phases), 3),
        "ratio_max": round(1 + max(line["difference"] for line in phases), 3),
        "equal": abs(worst["difference"]) <= TOLERANCE,
        "cases": cases,
        "sizes": {"model": arguments.size, "group": arguments.group, "completion": arguments.completion},
    } | machine(torch.device(arguments.device))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="300m")
    parser.add_argument("--cases", default=",".join(CASES), help="which of them, with commas")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    print(json.dumps(run(parser.parse_args())))


if __name__ == "__main__":
    main()
