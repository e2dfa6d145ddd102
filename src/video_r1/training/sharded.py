"""All weights of a sharded model at once, for work that processes do at their own pace.

FSDP2 and DeepSpeed's ZeRO-3 gather a layer's weights when it runs, which all processes have to do together.
While they sample, each runs the model a number of times of its own: they would wait for one another for ever.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import PreTrainedModel

from video_r1.errors import VideoR1Error
from video_r1.models.group_forward import through_wrapper


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


IN_CHECKPOINTS = frozenset(
    f"deepspeed.{name}"
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
)
"""The classes that DeepSpeed's own training state has, beside those that torch calls safe."""


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's ZeRO stage; None without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.zero_stage)


@contextmanager
def whole_zero3(engine: Any) -> Iterator[None]:
    """Inside, every process has all weights of a model that ZeRO-3 has sharded. engine: DeepSpeed's."""
    import deepspeed  # pyright: ignore[reportMissingImports]  # an extra, installed where ZeRO-3 is in use

    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        # The hooks of ZeRO-3 would give each layer's weights back after it has run.
        hooks = engine.optimizer.parameter_offload
        hooks._remove_module_hooks()
        try:
            yield
        finally:
            hooks.setup_zero_stage3_hooks()


def whole_parameters(model: nn.Module) -> dict[int, Any]:
    """A whole copy in main memory of each parameter that ZeRO-3 has sharded already, by the parameter's id.

    This is the memo with which `copy.deepcopy` copies such a model, whose own tensors are empty. Every
    process has to call it. transformers loads a model in shards as soon as its settings name ZeRO-3.
    """
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    copies: dict[int, Any] = {}
    for parameter in sharded:
        import deepspeed  # pyright: ignore[reportMissingImports]  # it has sharded the parameter

        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().to("cpu", copy=True)
        copies[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    return copies


def prepare_zero_reference(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A frozen model as an engine of its own, in the policy's number format; sharded where ZeRO-3 shards.

    reference: whole, on any device. ZeRO-2 has whole weights in every process, hence stage 0.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]  # an extra, installed where it is in use

    plugin: Any = accelerator.state.deepspeed_plugin
    policy: dict[str, Any] = plugin.deepspeed_config
    config: dict[str, Any] = {name: policy[name] for name in ("bf16", "fp16") if name in policy}
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}}
    if zero_stage(accelerator) == 3:
        hidden: int = reference.config.get_text_config().hidden_size  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        config["zero_optimization"] = {
            # as the Trainer fills in "auto": norms and biases stay whole
            "stage3_param_persistence_threshold": 10 * hidden,
            **{
                name: value
                for name, value in policy["zero_optimization"].items()
                if value != "auto" and name != "offload_optimizer"
            },
        }
    engine: Any = deepspeed.initialize(model=reference, config=config)[0]
    engine.eval()  # which returns nothing, unlike that of a module
    return engine


def parameter_count(model: nn.Module) -> int:
    """Weights of the model, those too of which this process has a share only."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters())


def loss_that_skips(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, one whose gradients are nan in every weight.

    DeepSpeed leaves out an update whose gradient norm is not finite, in all processes. A loss that overflowed
    in one term may leave finite gradients.
    """
    return loss if bool(loss.detach().isfinite()) else loss * float("nan")


def check_training_state(checkpoint: Path) -> None:
    """Raises VideoR1Error where unpickling a checkpoint of DeepSpeed would run code that is not its own.

    DeepSpeed reads its files as pickles that may call anything. This reads the names of what they call, no
    tensors. A checkpoint without such files is none of DeepSpeed's and left to it to refuse.
    """
    latest = checkpoint / "latest"
    if not latest.is_file():
        return
    tag = latest.read_text(encoding="utf-8").strip()
    if Path(tag).name != tag:
        raise VideoR1Error(f"{latest} names {tag!r}, which is no folder of this checkpoint; take another one")
    for path in sorted((checkpoint / tag).rglob("*.pt")):
        try:
            called = set(get_unsafe_globals_in_checkpoint(str(path)))
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            raise VideoR1Error(f"{path} cannot be read as a training state: {error}") from error
        if called - IN_CHECKPOINTS:
            raise VideoR1Error(
                f"{path} is no training state that DeepSpeed writes: it would run "
                f"{', '.join(sorted(called - IN_CHECKPOINTS))}. Take another checkpoint"
            )
