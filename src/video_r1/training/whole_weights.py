"""All weights of a sharded model at once, for work that processes do at their own pace.

FSDP2 and DeepSpeed's ZeRO-3 gather a layer's weights when it runs, which all processes have to do together.
While they sample, each runs the model a number of times of its own: they would wait for one another for ever.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from video_r1.models.group_forward import through_wrapper
from video_r1.training.deepspeed_zero import (
    prepare_zero_reference,
    whole_parameters,
    whole_zero3,
    zero_stage,
)


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Inside, every process has all weights of the model and may run any part of it, without gradient.

    model: as the accelerator has prepared it. Every process has to enter. Costs nothing where the model is
    not sharded.
    """
    if isinstance(model, FSDPModule):
        plugin = accelerator.state.fsdp_plugin
        with _whole_fsdp(model, plugin is not None and bool(plugin.reshard_after_forward)):
            yield
    elif zero_stage(accelerator) == 3:
        with whole_zero3(model):
            yield
    else:
        yield


@contextmanager
def _whole_fsdp(model: Any, reshards: bool) -> Iterator[None]:
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = {block for blocks in lists for block in blocks}
    through_wrapper(model, lambda: None)  # FSDP sets itself up in the first call, which has to be the root's
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            if reshards and module in blocks:  # the parts around them are kept after their forward
                module.set_reshard_after_forward(True, recurse=False)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A whole copy of the model that does not train. Every process has to call it."""
    reference = copy.deepcopy(model, whole_parameters(model)).eval()
    reference.requires_grad_(False)
    return reference


def keep_results_exact(accelerator: Accelerator) -> None:
    """Has FSDP2 return what a model computes in float32 as float32, also under bf16 mixed precision.

    accelerate asks it to round every module's results to bf16, and log-probabilities are such a result: near
    -5 they would move in steps of 0.03. Call it before a model is prepared.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def prepare_reference(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The frozen copy that KL is taken to, sharded where the policy is sharded."""
    if zero_stage(accelerator) is not None:
        return prepare_zero_reference(reference, accelerator)
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, reference)
    return accelerator.prepare_model(reference, evaluation_mode=True)
