"""The reference model of the KL term: the policy that training starts from."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel

from video_r1.processes import process_count
from video_r1.training.sharded import zero_stage


class Reference:
    """A frozen copy of the policy, or of its adapters if these train.

    Every rank copies it when the trainer is built, also in a resumed run: before the checkpoint is read, the
    weights are those of the run's start.
    """

    def __init__(self, policy: PreTrainedModel, accelerator: Accelerator) -> None:
        self.model: nn.Module | None = None
        self.adapters: dict[str, nn.Module] = {}
        if hasattr(policy, "disable_adapter"):
            self.adapters = frozen_adapters(policy, accelerator.device)
        else:
            self.model = prepare_reference(frozen_copy(policy, accelerator), accelerator)

    @contextmanager
    def in_place_of(self, policy: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
        """policy: the model as prepared for training."""
        with torch.no_grad():
            if self.model is not None:
                yield self.model
                return
            inner: Any = accelerator.unwrap_model(policy)
            with starting_adapters(inner, self.adapters):
                yield policy


def frozen_adapters(policy: nn.Module, device: torch.device) -> dict[str, nn.Module]:
    """Copy the modules whose own weights train, by name; the same on every rank."""
    copies: dict[str, nn.Module] = {}
    for name, module in policy.named_modules():
        trains = any(weight.requires_grad for weight in module.parameters(recurse=False))
        if trains and not any(name.startswith(f"{outer}.") for outer in copies):
            frozen = copy.deepcopy(module, whole_parameters(module)).to(device).requires_grad_(False)
            for weight in frozen.parameters() if process_count() > 1 else ():
                torch.distributed.broadcast(weight.data, 0)  # FSDP may have loaded weights on rank 0 only
            copies[name] = frozen.eval()
    return copies


@contextmanager
def starting_adapters(policy: nn.Module, adapters: dict[str, nn.Module]) -> Iterator[None]:
    """Replace the policy's adapters inside, without dropout. Modules are exchanged, not values: the trained
    ones may be sharded, and the backward pass still needs them.
    """
    trained = {name: policy.get_submodule(name) for name in adapters}
    was_training = policy.training
    for name, module in trained.items():
        # DeepSpeed has rounded the trained ones to its dtype
        policy.set_submodule(name, adapters[name].to(next(module.parameters()).dtype))
    policy.eval()
    try:
        yield
    finally:
        for name, module in trained.items():
            policy.set_submodule(name, module)
        policy.train(was_training)


def frozen_copy(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Copy the whole model, frozen; each weight `as_computed`. Every rank calls it."""
    copies = whole_parameters(model) | as_computed(model, accelerator)
    return copy.deepcopy(model, copies).eval().requires_grad_(False)


def as_computed(model: PreTrainedModel, accelerator: Accelerator) -> dict[int, Any]:
    """Copy weights, by their id, in the bf16 or fp16 that mixed precision rounds them to in each forward (the
    same values in half the memory): all weights with FSDP2, those of linear layers with autocast. Copies that
    wait for the weights of rank 0 have no storage.
    """
    if zero_stage(accelerator) is not None:
        return {}
    rounded = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    fsdp, plugin = accelerator.is_fsdp2, getattr(accelerator.state, "fsdp_plugin", None)
    waits = (
        fsdp and plugin is not None and plugin.cpu_ram_efficient_loading and not accelerator.is_main_process
    )
    embedding = model.get_input_embeddings().weight  # autocast does not round it; a head may share it
    copies: dict[int, Any] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            linear = isinstance(module, nn.Linear | nn.Conv3d) and weight is not embedding
            rounds = rounded is not None and weight.dtype == torch.float32 and (fsdp or linear)
            if (rounds or waits) and id(weight) not in copies:
                device, dtype = "meta" if waits else weight.device, rounded if rounds else weight.dtype
                copies[id(weight)] = nn.Parameter(weight.detach().to(device, dtype, copy=True), False)
    return copies


def prepare_reference(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Prepare a `frozen_copy` for its forward, sharded if the policy is sharded."""
    if zero_stage(accelerator) is None:
        if accelerator.is_fsdp2:
            return fsdp2_prepare_model(accelerator, reference)
        return accelerator.prepare_model(reference, evaluation_mode=True)
    import deepspeed  # pyright: ignore[reportMissingImports]  # an extra

    # DeepSpeed: a second engine in the policy's dtype
    plugin: Any = accelerator.state.deepspeed_plugin
    policy: dict[str, Any] = plugin.deepspeed_config
    config: dict[str, Any] = {name: policy[name] for name in ("bf16", "fp16") if name in policy}
    # ZeRO-2 has whole weights on every rank, hence stage 0.
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


def whole_parameters(model: nn.Module) -> dict[int, Any]:
    """Copy each parameter that ZeRO-3 has sharded, by its id: the memo with which `copy.deepcopy` copies such
    a model, whose tensors are empty. Every rank calls it.
    """
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    copies: dict[int, Any] = {}
    for parameter in sharded:
        import deepspeed  # pyright: ignore[reportMissingImports]  # it has sharded the parameter

        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().to("cpu", copy=True)
        copies[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    return copies
