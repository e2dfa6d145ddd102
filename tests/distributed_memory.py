"""What the processes of test_memory_plan.py do: an update and a rollout under FSDP2, bytes measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from distributed_work import let_accelerate_shard_on_cpu
from measured_memory import (
    COMPLETIONS,
    NO_END,
    model_of,
    most_at_once,
    question,
    tensor_bytes,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule

from video_r1.models.group_forward import attending_in_rows, group_logprobs
from video_r1.rollout.engine import SamplingSettings
from video_r1.rollout.transformers import TransformersEngine
from video_r1.training.objective import surrogate_loss
from video_r1.training.reference import frozen_copy, prepare_reference
from video_r1.training.sharded import keep_figures_exact, whole_weights

TIMES = 4  # of each: on a busy machine gloo frees the buffers of a collective later, and more live at once


def measure(folder: Path, hidden: int, layers: int) -> None:
    """Writes bytes: the shares of this process, and the most in update and rollout, without optimizer."""
    let_accelerate_shard_on_cpu()
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(), cpu=True)
    keep_figures_exact(accelerator)
    plain = model_of(hidden, layers, 2048)
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    reference = prepare_reference(frozen_copy(plain, accelerator), accelerator)
    optimizer: Any = torch.optim.AdamW(plain.parameters())
    model, optimizer = accelerator.prepare(plain, optimizer)
    prompt = question()

    @attending_in_rows(model)
    def update() -> None:
        model.train()
        with accelerator.autocast():
            result = group_logprobs(model, [prompt], COMPLETIONS, with_entropy=True)
            with torch.no_grad():
                judged = group_logprobs(reference, [prompt], COMPLETIONS).logprobs
        loss = surrogate_loss(
            result.logprobs, result.logprobs.detach(), torch.linspace(-1, 1, 8), result.lengths,
            normaliser=1.0, loss_type="grpo", beta=0.04, ref_logprobs=judged,
        ).loss  # fmt: skip
        accelerator.backward(loss)

    def sample() -> None:
        with whole_weights(model, accelerator), accelerator.autocast():
            engine = TransformersEngine(model, NO_END)
            engine.sample([prompt, prompt], SamplingSettings(n=8, max_tokens=48, seed=0), [8, 4])

    update()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    sample()
    found = {}
    for phase, work in (("rollout", sample), ("update", update)):
        peaks = []
        for _ in range(TIMES):
            here = here_bytes(model) + here_bytes(reference)  # some weights stay whole after a forward pass
            peaks.append(here + most_at_once(work))
            if phase == "update":
                model.zero_grad(set_to_none=True)
        found[phase] = min(peaks)
    update()
    for part in (model, reference):
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    found |= {"weights": here_bytes(model), "reference": here_bytes(reference)}
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    found["gradients"] = tensor_bytes(gradient.to_local() for gradient in gradients)
    rank = os.environ["RANK"]
    (folder / f"measured-{rank}.json").write_text(json.dumps(found))


def here_bytes(model: nn.Module) -> int:
    """Of weights and buffers that lie in this process: its shares, and those that are gathered."""
    weights: list[Any] = list(model.parameters())
    shares = [w.to_local() if hasattr(w, "to_local") else w for w in weights]
    return tensor_bytes([*shares, *model.buffers()])
