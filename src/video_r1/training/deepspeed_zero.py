"""What ZeRO asks for besides accelerate: all weights while sampling, a reference of its own, pickles that are
looked at before DeepSpeed opens them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from video_r1.errors import VideoR1Error

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
