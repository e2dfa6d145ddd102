"""A model without storage, and the bytes of the tensors that live while it runs.

Tensors have shapes but no memory (torch's FakeTensorMode); every allocation is counted while it lives.
Attention, experts and layers with a state have stand-ins that allocate what the GPU kernels allocate.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from video_r1.models.attention import replaced
from video_r1.models.families import find_family, text_of, tower_of, vision_parameters
from video_r1.models.gated_delta import RULE
from video_r1.models.group_forward import vision_language_model
from video_r1.models.loading import with_trained_parts
from video_r1.models.lora import IN_FULL, adapted_linears
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings


@dataclass(frozen=True, slots=True)
class Policy:
    """Settings with which the model is built and run. `autocast`: dtype of mixed precision, or None."""

    settings: ModelSettings
    training: TGRPOSettings | SFTSettings
    dtype: torch.dtype  # compute dtype of weights; under FSDP that of autocast
    stored: int  # bytes of a stored weight for each byte in `dtype`
    autocast: torch.dtype | None
    device_type: str
    summed: int  # bytes of a summed gradient for each byte of a weight in `dtype`
    gradients_kept: float  # share of a complete gradient that stays on this GPU

    @property
    def reference(self) -> bool:
        return isinstance(self.training, TGRPOSettings) and self.training.beta != 0

    @property
    def copied(self) -> bool:
        """Whether the reference is a second model, not the policy with its first adapters."""
        return self.reference and not self.settings.use_peft


@dataclass(slots=True)
class Traced:
    """Counts of a traced model, in bytes unless a comment says numbers of weights."""

    parameters: int  # number of weights
    trainable: int  # number of weights
    weights: int
    gradients: int
    states_8bit: int  # of an 8-bit AdamW
    largest_layer: int  # weights of one decoder layer
    outside_layers: int  # weights that FSDP does not shard: of no layer, vision block, untied embedding
    text_linear: int  # number of weights of the text model's linear layers and the head
    vision_linear: int  # number of weights of the vision tower's linear layers
    linear: int  # number of weights of all linear layers, without a tied head
    adapted: int  # weights of linear layers with adapters, which rollouts copy and merge
    dequantised: int  # the largest layer of 4-bit weights in full
    activations: int = 0  # kept when the backward pass starts
    update_peak: int = 0  # beyond weights, optimizer and reference
    prefill_peak: int = 0  # of one chunk of prompts, including keys and values
    prompt_cache: int = 0  # keys and values of that chunk
    prompt_states: int = 0  # recurrent states of that chunk
    prefill_copies: int = 0  # weights in autocast's dtype, which exist while sampling


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of live storages that operators create, and of their peak. Of `gradients` only the
    share `gradients_kept` counts.
    """

    def __init__(self, gradients_kept: float) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = 0
        self.gradients_kept = gradients_kept
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def ignore(self, module: nn.Module) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            self.known.add(tensor.untyped_storage()._cdata)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        weakref.finalize(storage, self.remove, key, size)
        self.peak = max(self.peak, self.live - int(self.gradients * (1 - self.gradients_kept)))

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def add_gradient(self, weight: Tensor) -> None:
        self.gradients += weight.nbytes


def build_models(config: PreTrainedConfig, policy: Policy) -> tuple[Any, Any]:
    """Return the policy and its reference without storage; the policy itself if there is no copy."""
    with torch.device("meta"):
        model = with_trained_parts(untrained(config, policy), policy.settings)
        if policy.training.gradient_checkpointing:
            inner = vision_language_model(model)
            inner.gradient_checkpointing_enable({"use_reentrant": False})
            if policy.settings.use_peft:
                inner.enable_input_require_grads()
        return model, untrained(config, policy).requires_grad_(False).eval() if policy.copied else model


def untrained(config: PreTrainedConfig, policy: Policy) -> Any:
    """Return a model of this config in the policy's compute dtype, as it is on the current device."""
    model: Any = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=policy.dtype)
    model.config._attn_implementation = ATTENTION_NAME
    model.config._experts_implementation = EXPERTS_NAME
    return model


@contextmanager
def without_storage(*models: nn.Module, gradients_kept: float) -> Iterator[tuple[FakeTensorMode, LiveBytes]]:
    """Let the models of `build_models` run on fake tensors, whose bytes LiveBytes counts while entered."""
    live, family = LiveBytes(gradients_kept), find_family(vision_language_model(models[0]))
    module = None if family is None else family.state_functions  # of layers with a state
    rule = replaced(import_module(module), RULE, gated_delta_rule) if module else nullcontext()
    with rule, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in {*models}:  # fake weights on the CPU
            module.to_empty(device="cpu")
            vision_language_model(module).tie_weights()
            live.ignore(module)
        yield mode, live


def count_weights(model: nn.Module, policy: Policy) -> Traced:
    inner = vision_language_model(model)
    text, known = text_of(inner), find_family(inner) is not None
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    sizes = {weight: weight.nbytes for weight in model.parameters()}
    quantised = [
        layer.weight
        for name, layer in (model.named_modules() if policy.settings.load_in_4bit else ())
        if isinstance(layer, nn.Linear) and not any(part in name for part in (*IN_FULL, "lora_"))
    ]
    sizes |= {weight: four_bit_bytes(weight.numel()) for weight in quantised}

    def size(module: nn.Module) -> int:
        return sum(sizes[weight] for weight in module.parameters())

    def numbers(module: nn.Module, *kinds: type) -> dict[Tensor, int]:
        layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
        return {weight: weight.numel() for layer in layers for weight in layer.parameters(recurse=False)}

    layers = [*text.layers, *(tower_of(inner).blocks if known else ())]
    apart = [*layers, *([embedding] if embedding.weight is not head.weight else [])]
    linear, vision = numbers(inner, nn.Linear, nn.Conv3d), {*vision_parameters(inner)}
    return Traced(
        parameters=sum(weight.numel() for weight in sizes),
        trainable=sum(weight.numel() for weight in trained),
        weights=size(model) + sum(buffer.nbytes for buffer in model.buffers()),
        gradients=sum(weight.nbytes for weight in trained),
        states_8bit=eight_bit_states(model),
        largest_layer=size(layers[0]),
        outside_layers=size(model) - sum(map(size, apart)),
        text_linear=sum({**numbers(text, nn.Linear), head.weight: head.weight.numel()}.values()),
        vision_linear=sum(count for weight, count in linear.items() if weight in vision),
        linear=sum(linear.values()) - linear.get(embedding.weight, 0),  # one that the head shares
        adapted=0 if quantised else sum(layer.weight.nbytes for layer in adapted_linears(model).values()),
        dequantised=max((weight.nbytes + 4 * weight.numel() // BLOCK for weight in quantised), default=0),
    )


# "flash": transformers then hands vision attention whole sequences, without reading their lengths.
ATTENTION_NAME = "video_r1_flash_without_storage"
EXPERTS_NAME = "video_r1_experts_without_storage"
CHUNK = 64  # tokens of the gated delta rule between two states


class KernelMemory(torch.autograd.Function):
    """Memory of a fused kernel. allocate: makes the results and what is kept, first tensors of the inputs'
    shapes. scratch: makes what exists during the backward pass only.
    """

    @staticmethod
    def forward(ctx: Any, allocate: Callable[..., Any], scratch: Callable[..., Any], *inputs: Tensor) -> Any:
        results, kept = allocate(*inputs)
        ctx.save_for_backward(*kept)
        ctx.scratch, ctx.inputs = scratch, len(inputs)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        kept = ctx.saved_tensors
        ctx.scratch(*kept)
        return None, None, *map(torch.empty_like, kept[: ctx.inputs])


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
) -> tuple[Tensor, None]:
    """Allocate what an attention kernel without score matrix allocates: [B, H, S, D] -> [B, S, H, D]."""

    def allocate(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = query.new_empty(query.transpose(1, 2).shape)
        return out, (*inputs, out, query.new_empty(query.shape[:3], dtype=torch.float32))

    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    out: Any = KernelMemory.apply(allocate, lambda *kept: None, query, key, value)
    return out, None


def experts(module: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Allocate what grouped products allocate: states [S, d], chosen and weights [S, k] -> [S, d]."""
    rows = states.repeat_interleave(chosen.shape[1], 0)
    gate, up = nn.functional.linear(rows, module.gate_up_proj[0]).chunk(2, dim=-1)
    out = nn.functional.linear(module.act_fn(gate) * up, module.down_proj[0])
    return (out.unflatten(0, chosen.shape) * weights[..., None]).sum(1).to(states.dtype)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **unused: Any
) -> tuple[Tensor, Tensor]:
    """Allocate what the chunked rule of flash-linear-attention allocates.

    query, key [B, T, H, Dk], value [B, T, H, Dv], g, beta [B, T, H] -> [B, T, H, Dv] and the last states
    [B, H, Dk, Dv] in float32. It keeps normalised queries and keys, values, gates and products within chunks.
    The states between chunks, and what each token reads and writes, are computed again in backward.
    """

    def allocate(*inputs: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        kept = (*map(torch.empty_like, inputs[:2]), *inputs[2:], key.new_empty(*key.shape[:3], CHUNK))
        _between_chunks(*kept)
        state = key.new_empty(key.shape[0], *key.shape[2:], value.shape[-1], dtype=torch.float32)
        return (torch.empty_like(value), state), kept

    def scratch(*kept: Tensor) -> Any:
        return _between_chunks(*kept), _between_chunks(*kept)  # and their gradients

    return KernelMemory.apply(allocate, scratch, query, key, value, g, beta)  # pyright: ignore[reportReturnType]


def _between_chunks(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    batch, length, heads, size = key.shape
    states = key.new_empty(batch, -(-length // CHUNK), heads, size, value.shape[-1])
    return states, torch.empty_like(key), torch.empty_like(value), torch.empty_like(value)


AttentionInterface.register(ATTENTION_NAME, attention)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts)


BLOCK = 64  # 4-bit weights that share a scale, a byte
GROUP = 256  # scales, or optimizer states of 8 bits, that share a float32
SMALLEST = 4096  # weights of a tensor whose states are in 8 bits; smaller ones have float32


def four_bit_bytes(count: int) -> int:
    scales = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / GROUP)


def eight_bit_states(model: nn.Module) -> int:
    """Return the bytes of 8-bit AdamW's two moments; small tensors and embeddings have float32 ones."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    exact = {weight for weight in trained if weight.numel() < SMALLEST or weight in embeddings}
    sizes = [(each.numel(), each in exact) for each in trained]
    return sum(2 * (4 * n if in_full else n + 4 * math.ceil(n / GROUP)) for n, in_full in sizes)
