"""Rollouts, updates and short runs on one device: `python -m second_device.work (cpu|second) FOLDER`.

In a process of its own: a device once registered stays, and torch takes it for the machine's accelerator.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from test_rollout_transformers import PROCESSORS, build_model, build_prompts
from tgrpo_trainers import make_trainer
from tiny_models import tiny_checkpoint
from tiny_questions import read_lines, training_arguments, write_manifest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from video_r1.cli import main
from video_r1.models.group_forward import group_logprobs
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.sft import SFTConfig, SFTTrainer

CHECKED = ("qwen2_5_vl", "qwen3_vl")  # families


class Questions(TorchDispatchMode):
    """Counts what makes the CPU wait for a device: values read back, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name, inputs = str(function.overloadpacket), [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        asked = name.split(".")[1] in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "_unique2",
            "unique_consecutive",
        )
        asked |= name == "aten.index" and any(x.dtype == torch.bool for x in inputs[1:])
        if isinstance(result, Tensor) and result.device.type == "cpu":
            asked |= name in ("aten._to_copy", "aten.copy_")
        if asked and any(x.device.type != "cpu" for x in inputs):
            self.names[name] += 1
        return result


def questions(family: str, device: torch.device) -> dict[str, dict[str, int]]:
    """What an update and rollouts of 12 and of 44 tokens ask the device."""
    model, prompts = build_model(family).eval().to(device), build_prompts(family)
    engine = TransformersEngine(model, PROCESSORS[family])
    found = {}
    for tokens in (12, 44):
        with Questions() as asked:
            groups = engine.sample(prompts, SamplingSettings(n=3, max_tokens=tokens, seed=3))
        found[f"rollout of {tokens}"] = dict(asked.names)
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    with Questions() as asked:
        group_logprobs(model, prompts, completions, with_entropy=True).logprobs.sum().backward()
    return found | {"update": dict(asked.names)}


def rollouts_and_update(family: str, device: torch.device) -> dict[str, Any]:
    """Tokens and log-probs of three prompts' groups, then those of the update with all gradients."""
    model, prompts = build_model(family).eval().to(device), build_prompts(family)
    groups = TransformersEngine(model, PROCESSORS[family]).sample(
        prompts, SamplingSettings(n=3, max_tokens=12, top_p=0.9, seed=3)
    )
    completions = [[rollout.token_ids for rollout in group] for group in groups]
    update = group_logprobs(model, prompts, completions, with_entropy=True)
    assert update.logprobs.device.type == device.type and update.entropy is not None
    (update.logprobs.sum() + update.entropy.sum()).backward()
    named = model.named_parameters()
    return {
        "tokens": torch.cat([tokens for group in completions for tokens in group]),
        "sampled": torch.cat([rollout.logprobs for group in groups for rollout in group]),
        "update": update.logprobs.detach().cpu(),
        "gradients": {name: weight.grad.cpu() for name, weight in named if weight.grad is not None},
    }


def runs(device: torch.device, folder: Path) -> dict[str, Any]:
    """Return metrics of T-GRPO (two updates on the same rollouts) and of SFT, and predictions of the model
    that they start from."""
    checkpoint, manifest = tiny_checkpoint("qwen2_5_vl", folder / "model"), write_manifest(folder)
    own: dict[str, Any] = {"use_cpu": device.type == "cpu"}
    full = {
        "num_iterations": 2,
        "beta": 0.04,
        "max_steps": 2,
        "save_steps": 2,
        "gradient_checkpointing": True,
    }
    make_trainer(checkpoint, str(manifest), folder / "full", **full, **own).train()
    continued: Any = make_trainer(
        checkpoint, str(manifest), folder / "full", **{**full, "max_steps": 4}, **own
    )
    continued.train(resume_from_checkpoint=True)
    settings = training_arguments(folder / "sft", eval_strategy="steps", eval_steps=2, **own)
    SFTTrainer(str(checkpoint), SFTConfig(**settings), str(manifest), str(manifest)).train()
    assert all(parameter.device.type == device.type for parameter in continued.model.parameters())
    command = f"eval --model {checkpoint} --manifest {manifest} --order ordered,shuffled --max_new_tokens 12"
    assert main([*command.split(), "--out", str(folder / "eval"), "--device", str(device)]) == 0
    metrics = {name: read_lines(folder / name / "metrics.jsonl") for name in ("full", "sft")}
    return {**metrics, "eval": read_lines(next((folder / "eval").glob("predictions-*.jsonl")))}


def work() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    device = torch.device("cpu")
    mixed = ""
    if name != "cpu":
        import second_device

        device = second_device.register(folder.parent)
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        try:
            torch.stack([torch.ones(2, device=device), torch.ones(2)])
        except RuntimeError as error:
            mixed = str(error)
    found: dict[str, Any] = {"mixed": mixed}
    found["families"] = {family: rollouts_and_update(family, device) for family in CHECKED}
    found["questions"] = {family: questions(family, device) for family in CHECKED}
    torch.save(found | {"runs": runs(device, folder)}, folder / "results.pt")


if __name__ == "__main__":
    work()
