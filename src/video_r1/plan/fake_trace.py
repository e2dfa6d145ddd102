"""A model without storage, and the bytes of the tensors that live while it runs.

Tensors have shapes but no memory (torch's FakeTensorMode); every allocation is counted while it lives. So the
memory that a model keeps for its backward pass, with or without gradient checkpointing, adapters or mixed
precision, is not estimated from formulas. Attention, experts, layers with a state and bitsandbytes' 4-bit
layers have stand-ins that allocate what the GPU kernels allocate.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from video_r1.models.families import find_family, text_of, tower_of, vision_parameters
from video_r1.models.gated_delta import RULE
from video_r1.models.group_forward import vision_language_model
from video_r1.models.loading import with_trained_parts
from video_r1.models.lora import IN_FULL, adapted_linears
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one forward pass: `questions` prompts and their `completions` (SFT: one each)."""

    questions: int
    grid: tuple[int, int, int]  # patches of one question's clip: time, height, width
    visual: int  # tokens
    prompt: int  # tokens, including visual ones
    completions: int
    completion: int  # tokens
    patches: int = 0  # of one question's frames, on the general path, whose grids are not known
    repeated: bool = False  # the prompt is repeated for every completion, on the general path

    @property
    def tokens(self) -> int:
        """Tokens of the row, without the last token of each completion, which predicts nothing."""
        prompts = self.completions if self.repeated else 1
        return self.questions * (prompts * self.prompt + self.completions * (self.completion - 1))


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
        """Whether there is a KL term against a reference model."""
        return isinstance(self.training, TGRPOSettings) and self.training.beta != 0

    @property
    def copied(self) -> bool:
        """Whether the reference is a second model, not the policy with its first adapters."""
        return self.reference and not self.settings.use_peft


@dataclass(slots=True)
class Traced:
    """Counts of a traced model, in bytes unless a comment says numbers of weights."""

    parameters: int = 0  # number of weights
    trainable: int = 0  # number of weights
    weights: int = 0
    gradients: int = 0
    states_8bit: int = 0  # of an 8-bit AdamW
    largest_layer: int = 0  # weights of one decoder layer
    outside_layers: int = (
        0  # weights outside layers, vision blocks and untied embedding: FSDP does not shard these
    )
    text_linear: tuple[int, ...] = ()  # numbers of weights of the text model's linear layers and the head
    vision_linear: int = 0  # number of weights of the vision tower's linear layers
    adapted: int = 0  # weights of linear layers with adapters, which rollouts copy and merge
    linear: int = 0  # number of weights of all linear layers, without a tied head
    activations: int = 0  # kept when the backward pass starts
    logits: int = 0  # peak of the head
    update_peak: int = 0  # beyond weights, optimizer and reference
    prefill_peak: int = 0  # of one chunk of prompts, including keys and values
    prompt_cache: int = 0  # keys and values of that chunk
    prompt_states: int = 0  # recurrent states of that chunk
    prefill_copies: int = 0  # weights in autocast's dtype, which exist while sampling


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of live storages that operators create, and of their peak.

    `gradients`: those of the live bytes that are gradients; only their share `gradients_kept` counts.
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
        """Leave the module's weights and buffers out of the count."""
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
        self.peak = max(self.peak, self.here)

    @property
    def here(self) -> int:
        return self.live - int(self.gradients * (1 - self.gradients_kept))

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@dataclass(slots=True)
class Tracing:
    """A policy, its reference (`judge`; the policy itself if there is no copy) and the counts."""

    traced: Traced
    live: LiveBytes
    autocast: AbstractContextManager[Any]
    policy: Policy
    model: Any
    judge: Any
    mode: FakeTensorMode

    def prefill(self, run: Callable[[], tuple[int, int]]) -> None:
        """Count a forward of prompts. run: returns the bytes of their keys and values and of their states."""
        traced, live = self.traced, self.live
        with live, torch.no_grad(), self.autocast:
            self.model.eval()
            traced.prompt_cache, traced.prompt_states = run()
            traced.prefill_copies = live.live
        traced.prefill_peak = live.peak
        live.peak = live.live

    def updates(self, run: Callable[[], None]) -> None:
        """Count updates. run: forward and backward of a micro-batch."""
        self.model.train()
        _count_gradients(self.live, self.model)
        # from the second micro-batch of an optimizer step on, gradients exist when a pass starts
        for _ in range(min(2, self.policy.training.gradient_accumulation_steps)):
            with self.live:
                run()
        self.traced.update_peak = self.live.peak


@contextmanager
def without_storage(config: PreTrainedConfig, policy: Policy) -> Iterator[Tracing]:
    """Build the model of a plan without storage and count its weights."""
    traced, live = Traced(), LiveBytes(policy.gradients_kept)
    autocast = torch.autocast("cpu", dtype=policy.autocast) if policy.autocast is not None else nullcontext()
    with torch.device("meta"):
        model = _build(config, policy)
        judge = _untrained(config, policy).requires_grad_(False).eval() if policy.copied else model
    family = find_family(config)
    states = states_without_storage(None if family is None else family.state_functions)
    with states, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in {model, judge}:  # fake weights on the CPU
            module.to_empty(device="cpu")
            vision_language_model(module).tie_weights()
            live.ignore(module)
        _count_weights(traced, model)
        yield Tracing(traced, live, autocast, policy, model, judge, mode)


def cached_bytes(cache: Any) -> tuple[int, int]:
    """Return the bytes of a cache's keys and values in the compute dtype, and of its recurrent states."""
    stateful = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    states_kept = [state for layer in stateful for state in (layer.conv_states[0], layer.recurrent_states[0])]
    attention = [layer for layer in cache.layers if layer not in stateful]
    pairs = [state for layer in attention for state in (layer.keys, layer.values)]
    mixed = torch.is_autocast_enabled("cpu")
    kept = [state.to(torch.get_autocast_dtype("cpu")) if mixed else state for state in pairs]
    return _storage(kept), _storage(states_kept)


def _storage(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _build(config: PreTrainedConfig, policy: Policy) -> Any:
    settings = policy.settings
    model = with_trained_parts(_untrained(config, policy), settings)
    if settings.load_in_4bit:
        in_four_bits(model, torch.bfloat16 if policy.device_type == "cuda" else torch.float32)
    if policy.training.gradient_checkpointing:
        inner = vision_language_model(model)
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.use_peft:
            inner.enable_input_require_grads()
    return model


def _untrained(config: PreTrainedConfig, policy: Policy) -> Any:
    model: Any = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=policy.dtype)
    model.config._attn_implementation = ATTENTION_NAME
    model.config._experts_implementation = EXPERTS_NAME
    return model


def _count_weights(traced: Traced, model: nn.Module) -> None:
    traced.weights = sum(weight.nbytes for weight in [*model.parameters(), *model.buffers()])
    traced.parameters = sum(  # uint8: two weights of 4 bits
        weight.numel() * (2 if weight.dtype == torch.uint8 else 1) for weight in model.parameters()
    )
    traced.states_8bit = eight_bit_states(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    traced.trainable, traced.gradients = sum(w.numel() for w in trained), sum(w.nbytes for w in trained)
    inner = vision_language_model(model)
    text, known = text_of(inner), find_family(inner) is not None
    layers = [*text.layers, *(tower_of(inner).blocks if known else ())]
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    apart = [*layers, *([embedding] if embedding.weight is not head.weight else [])]
    traced.largest_layer = _bytes(layers[0])
    linear = [module for module in [*text.modules(), head] if type(module) is nn.Linear]
    traced.text_linear = tuple(module.weight.numel() for module in linear)
    traced.adapted = sum(layer.weight.nbytes for layer in adapted_linears(model).values())
    weights, vision = _products(inner), {id(weight) for weight in vision_parameters(inner)}
    traced.vision_linear = sum(size for number, size in weights.items() if number in vision)
    traced.linear = sum(weights.values()) - weights.get(id(embedding.weight), 0)  # one that the head shares
    traced.outside_layers = _bytes(model) - sum(_bytes(module) for module in apart)


def _products(model: nn.Module) -> dict[int, int]:
    """Map the id of each linear layer's parameter to its number of weights."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv3d)]
    return {id(weight): weight.numel() for layer in layers for weight in layer.parameters(recurse=False)}


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _count_gradients(live: LiveBytes, model: nn.Module) -> None:
    def counted(weight: Tensor) -> None:
        if weight not in seen:
            seen.add(weight)
            live.gradients += weight.nbytes

    seen: set[Tensor] = set()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(counted)


# "flash": transformers then hands vision attention whole sequences, without reading their lengths.
ATTENTION_NAME = "video_r1_flash_without_storage"
EXPERTS_NAME = "video_r1_experts_without_storage"
CHUNK = 64  # tokens of the gated delta rule between two states


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
) -> tuple[Tensor, None]:
    """Allocate what an attention kernel without score matrix allocates: [B, H, S, D] -> [B, S, H, D]."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    return _AttentionMemory.apply(query, key, value), None  # pyright: ignore[reportReturnType]


class _AttentionMemory(torch.autograd.Function):
    """Memory of attention: query, key, value, result and log-sum-exp; backward makes three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, size = query.shape
        out = query.new_empty(batch, length, heads, size)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def experts(module: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Allocate what grouped products allocate: states [S, d], chosen and weights [S, k] -> [S, d]."""
    rows = states.repeat_interleave(chosen.shape[1], 0)
    gate, up = nn.functional.linear(rows, module.gate_up_proj[0]).chunk(2, dim=-1)
    out = nn.functional.linear(module.act_fn(gate) * up, module.down_proj[0])
    return (out.unflatten(0, chosen.shape) * weights[..., None]).sum(1).to(states.dtype)


@contextmanager
def states_without_storage(module: str | None) -> Iterator[None]:
    """Let layers with a state in transformers' module (None: no such layers) call `gated_delta_rule`."""
    if module is None:
        yield
        return
    found = import_module(module)
    real = getattr(found, RULE)
    setattr(found, RULE, gated_delta_rule)
    try:
        yield
    finally:
        setattr(found, RULE, real)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **unused: Any
) -> tuple[Tensor, Tensor]:
    """Allocate what the chunked rule of flash-linear-attention allocates.

    query, key [B, T, H, Dk], value [B, T, H, Dv], g, beta [B, T, H] -> [B, T, H, Dv] and the last states
    [B, H, Dk, Dv] in float32.
    """
    return _RuleMemory.apply(query, key, value, g, beta)  # pyright: ignore[reportReturnType]


class _RuleMemory(torch.autograd.Function):
    """Memory of the rule: it keeps normalised queries and keys, values, gates and products within chunks.

    The states between chunks are computed in forward and again in backward, and not kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Any:
        within = key.new_empty(*key.shape[:3], CHUNK)
        ctx.save_for_backward(*map(torch.empty_like, (query, key)), value, g, beta, within)
        made = _between_chunks(key, value)
        del made
        state = key.new_empty(key.shape[0], *key.shape[2:], value.shape[-1], dtype=torch.float32)
        return torch.empty_like(value), state

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_state: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, g, beta, _ = ctx.saved_tensors
        made = _between_chunks(key, value), _between_chunks(key, value)  # and their gradients
        del made
        return tuple(map(torch.empty_like, (query, key, value, g, beta)))


def _between_chunks(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Allocate the states at the start of chunks, and what each token reads and writes."""
    batch, length, heads, size = key.shape
    states = key.new_empty(batch, -(-length // CHUNK), heads, size, value.shape[-1])
    return states, torch.empty_like(key), torch.empty_like(value), torch.empty_like(value)


AttentionInterface.register(ATTENTION_NAME, attention)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, experts)


BLOCK = 64  # weights that share a scale, a byte
SCALES = 256  # scales that share a float32
STATES = 256  # optimizer states of 8 bits that share a float32
SMALLEST = 4096  # weights of a tensor whose states are in 8 bits; smaller ones have float32


class FourBitLinear(nn.Module):
    """Stand-in for bitsandbytes' 4-bit linear layer: codes (two weights a byte) and scales."""

    def __init__(self, layer: nn.Linear, compute: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.compute = compute
        count = layer.weight.numel()
        self.weight = nn.Parameter(torch.empty(math.ceil(count / 2), dtype=torch.uint8), requires_grad=False)
        scales = math.ceil(count / BLOCK)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
        self.register_buffer("coarse", torch.empty(math.ceil(scales / SCALES)))

    def forward(self, x: Tensor) -> Tensor:
        product = _Product.apply(x.to(self.compute), self.weight, self.out_features)
        assert product is not None
        return (product if self.bias is None else product + self.bias.to(self.compute)).to(x.dtype)


class _Product(torch.autograd.Function):
    """Memory of the product: forward and backward allocate the dequantised weight; the input is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, out_features: int) -> Tensor:
        ctx.shape = out_features, x.shape[-1]
        return x @ _whole(x, ctx.shape).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ _whole(grad, ctx.shape), None, None


def _whole(like: Tensor, shape: tuple[int, int]) -> Tensor:
    scales = like.new_empty(math.ceil(math.prod(shape) / BLOCK), dtype=torch.float32)
    weight = like.new_empty(shape)
    del scales
    return weight


def in_four_bits(model: nn.Module, compute: torch.dtype) -> None:
    """Replace the layers that `load_in_4bit` quantises by stand-ins, also below adapters."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not any(part in name for part in (*IN_FULL, "lora_")):
            model.set_submodule(name, FourBitLinear(layer, compute))


def eight_bit_states(model: nn.Module) -> int:
    """Return the bytes of 8-bit AdamW's two moments; small tensors and embeddings have float32 ones."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    total = 0
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        count = weight.numel()
        in_full = count < SMALLEST or any(weight is embedding for embedding in embeddings)
        total += 2 * (4 * count if in_full else count + 4 * math.ceil(count / STATES))
    return total
