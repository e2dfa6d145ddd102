"""Sharded models (FSDP2, DeepSpeed): whole weights for rollouts, and checks of settings and checkpoints.

FSDP2 and ZeRO-3 gather a layer's weights when it runs, which all ranks have to do together. While sampling,
each rank runs the model a different number of times: the ranks would wait for each other forever.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.serialization import get_unsafe_globals_in_checkpoint

from video_r1.errors import ConfigError, VideoR1Error
from video_r1.models.group_forward import in_one_row, through_wrapper, vision_language_model

FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # of a torch module


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Give every rank all weights inside, to run any part of the model without gradient. Every rank enters.
    model: as prepared by the accelerator.
    """
    if isinstance(model, FSDPModule):
        with _whole_fsdp(model):
            yield
    elif zero_stage(accelerator) == 3:
        import deepspeed  # pyright: ignore[reportMissingImports]  # an extra, installed where ZeRO-3 is in use
        from deepspeed.runtime.zero import parameter_offload  # pyright: ignore[reportMissingImports]

        engine: Any = model
        with deepspeed.zero.GatheredParameters(list(engine.parameters())):
            # The hooks of ZeRO-3 would free each layer's weights after its forward.
            hooks = engine.optimizer.parameter_offload
            hooks._remove_module_hooks()
            hooks.forward_hooks, hooks.backward_hooks = [], []  # DeepSpeed keeps removed hooks
            try:
                yield
            finally:
                hooks.setup_zero_stage3_hooks()
                parameter_offload.FWD_MODULE_STACK.pop()  # the model is there already
    else:
        yield


@contextmanager
def _whole_fsdp(model: Any) -> Iterator[None]:
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    through_wrapper(model, lambda: None)  # FSDP initialises in its first call, which has to be the root's
    for module in sharded:
        module.unshard()
    # The hooks of FSDP2 would free each layer's weights after its forward, and fork streams in each layer,
    # which a CUDA graph cannot record.
    hooks = [(part, name, getattr(part, name)) for part in sharded for name in FORWARD_HOOKS]
    for part, name, _ in hooks:
        setattr(part, name, OrderedDict())
    try:
        yield
    finally:
        for part, name, own in hooks:
            setattr(part, name, own)
        for module in sharded:
            module.reshard()


def keep_figures_exact(accelerator: Accelerator) -> None:
    """Keep FSDP2's outputs and sums of gradients in float32 under bf16 mixed precision, before a model is
    prepared. (accelerate rounds both to bf16: log-probs near -5 would move in steps of 0.03.)
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def check_sharding_of(model: nn.Module, accelerator: Accelerator) -> None:
    """Raise ConfigError for FSDP version 1 (no whole weights in a rollout), sharded checkpoints (no model),
    and a sharded model of the general path (each rank runs layers as often as its own questions need).
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        for name, found, wanted in (
            ("fsdp_version", plugin.fsdp_version, 2),
            ("fsdp_state_dict_type", plugin.state_dict_type.name, "FULL_STATE_DICT"),
        ):
            if found != wanted:
                raise ConfigError(
                    f"{name} is {found}, and only {wanted} trains and saves models here: set "
                    f"{name}: {wanted} in accelerate's file, as recipes/accelerate/fsdp2.yaml does"
                )
    kind = "FSDP2" if accelerator.is_fsdp2 else "ZeRO-3" if zero_stage(accelerator) == 3 else None
    inner = vision_language_model(model)
    if kind is not None and not in_one_row(inner):
        raise ConfigError(
            f"{type(inner).__name__} takes the general path, which does not work with weights that {kind} "
            "shards; use DDP or ZeRO-2"
        )


IN_CHECKPOINTS = frozenset(
    (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
)
"""Classes in DeepSpeed's training state beside those that torch calls safe."""


OPTIMIZER_FILES = {"FSDP": ("optimizer.bin", "optimizer_0"), "DeepSpeed": ("latest",), "": ("optimizer.pt",)}
"""File or folder of a checkpoint with the optimizer's state, by the kind of run that wrote it."""


def check_kind(checkpoint: Path, kind: str) -> None:
    """Raise ConfigError if a checkpoint has the optimizer's state of another kind of run than `kind`."""
    found = [
        name for name, files in OPTIMIZER_FILES.items() if any((checkpoint / file).exists() for file in files)
    ]
    if found and kind not in found:
        before, now = (f"under {name}" if name else "without sharding" for name in (found[0], kind))
        raise ConfigError(
            f"{checkpoint} was written by a run {before}, and this one is {now}, which cannot read its "
            "optimizer's state; start it in the same way (accelerate's configuration), or start another run "
            f"from its weights (model_name_or_path {checkpoint})"
        )


def zero_stage(accelerator: Accelerator) -> int | None:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.zero_stage)


def check_training_state(checkpoint: Path) -> None:
    """Raise VideoR1Error if unpickling a checkpoint of DeepSpeed would run foreign code."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return
    tag = latest.read_text(encoding="utf-8").strip()
    if Path(tag).name != tag:
        raise VideoR1Error(f"{latest} names {tag!r}, which is no folder of this checkpoint; take another one")
    for path in sorted((checkpoint / tag).rglob("*.pt")):
        try:
            foreign = set(get_unsafe_globals_in_checkpoint(str(path))) - IN_CHECKPOINTS
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            raise VideoR1Error(f"{path} cannot be read as a training state: {error}") from error
        if foreign:
            raise VideoR1Error(
                f"{path} is no training state that DeepSpeed writes: it would run "
                f"{', '.join(sorted(foreign))}. Take another checkpoint"
            )
