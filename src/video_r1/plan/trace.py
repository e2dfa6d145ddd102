"""The tensors of one update and of one prefill, counted without making them.

Both are run on tensors that have shapes but no storage (torch's FakeTensorMode), through the model's own
transformers code and this project's head, and every allocation is added up while it lives. What a model
keeps for its backward pass, with or without gradient checkpointing, adapters or mixed precision, is therefore
not estimated from formulas. Stand-ins (plan/kernels.py) are attention, experts and layers with a state; and
the pixels' way into windows and positions is computed beforehand from the grid.
"""

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, DynamicCache, PreTrainedConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from video_r1.models.family import family_of, text_of, tower_of
from video_r1.models.group_forward import vision_language_model
from video_r1.models.head import CHUNK_LOGITS, token_logprobs
from video_r1.models.loading import with_trained_parts
from video_r1.plan.kernels import ATTENTION_NAME, EXPERTS_NAME, states_without_storage
from video_r1.plan.low_bits import eight_bit_states, in_four_bits
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens of one forward pass: `questions` prompts and their `completions` (SFT: one each)."""

    questions: int
    grid: tuple[int, int, int]  # patches of one question's clip in time, down and across
    visual: int  # tokens
    prompt: int  # tokens, visual ones included
    completions: int
    completion: int  # tokens

    @property
    def tokens(self) -> int:
        """The last token of a completion predicts nothing and is left out."""
        return self.questions * (self.prompt + self.completions * (self.completion - 1))


@dataclass(frozen=True, slots=True)
class Policy:
    """How the model is built and run. `autocast`: dtype of mixed precision, or None."""

    settings: ModelSettings
    training: TGRPOSettings | SFTSettings
    dtype: torch.dtype  # while it computes; FSDP gathers weights in autocast's
    stored: int  # bytes of a weight at rest for each byte of it in `dtype`
    autocast: torch.dtype | None
    device_type: str
    gradients_kept: float  # share of a gradient's bytes that stays here once it is whole

    @property
    def reference(self) -> bool:
        """Whether there is a KL term against the policy that training started from."""
        return isinstance(self.training, TGRPOSettings) and self.training.beta != 0

    @property
    def copied(self) -> bool:
        """Whether the reference is a model of its own, and not this one with its first adapters."""
        return self.reference and not self.settings.use_peft


@dataclass(slots=True)
class Traced:
    """All in bytes but what is said to be numbers of weights: `parameters` and `trainable` as well."""

    parameters: int = 0
    trainable: int = 0
    weights: int = 0
    gradients: int = 0
    states_8bit: int = 0  # of an 8-bit AdamW
    largest_layer: int = 0  # weights of one decoder layer
    outside_layers: int = 0  # weights of no layer, vision block or untied embedding: FSDP keeps these whole
    text_linear: tuple[int, ...] = ()  # numbers of weights of the text model's linear layers and of the head
    vision_linear: int = 0  # number of weights of the vision tower's linear layers
    linear: int = 0  # number of weights of all linear layers, without a head that is the embedding too
    activations: int = 0  # what the backward pass needs, when it begins
    logits: int = 0  # most that the head needs at once
    update_peak: int = 0  # beyond weights, optimizer and reference
    prefill_peak: int = 0  # of one chunk of prompts, their keys and values included
    prompt_cache: int = 0  # keys and values of that chunk
    prompt_states: int = 0  # recurrent states of that chunk
    prefill_copies: int = 0  # weights in autocast's number format, which last as long as sampling does


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, until they die. `peak` is the most that lived at once.

    Of `gradients`, bytes that are among the live ones, only the share `gradients_kept` counts.
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
        """The module's weights and buffers are there already."""
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


def trace(config: PreTrainedConfig, policy: Policy, row: Row, prefill: Row | None) -> Traced:
    """The memory of one update on `row` and, if there is one, of the prefill of the prompts in `prefill`."""
    traced, live = Traced(), LiveBytes(policy.gradients_kept)
    autocast = torch.autocast("cpu", dtype=policy.autocast) if policy.autocast is not None else nullcontext()
    indices = _vision_indices(config, row), _vision_indices(config, prefill) if prefill else {}
    with torch.device("meta"):
        model = _build(config, policy)
        judge = _untrained(config, policy).requires_grad_(False).eval() if policy.copied else model
    states = states_without_storage(family_of(config).state_functions)
    with states, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in {model, judge}:  # weights that say they are on the CPU
            module.to_empty(device="cpu")
            vision_language_model(module).tie_weights()
            live.ignore(module)
        update_indices, prefill_indices = (
            {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in found.items()}
            for found in indices
        )
        _count_weights(traced, model)
        if prefill is not None:
            with live, torch.no_grad(), autocast:
                model.eval()
                traced.prompt_cache, traced.prompt_states = _prefill(model, prefill, prefill_indices)
                traced.prefill_copies = live.live
            traced.prefill_peak = live.peak
            live.peak = live.live
        model.train()
        _count_gradients(live, model)
        # from the second micro-batch of an optimizer step on, gradients are there when a pass begins
        for _ in range(min(2, policy.training.gradient_accumulation_steps)):
            with live:
                _update(traced, live, autocast, model, judge, policy, row, update_indices)
        traced.update_peak = live.peak
    return traced


def _build(config: PreTrainedConfig, policy: Policy) -> Any:
    """The policy as `setup.model_of` makes it."""
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
    text, tower = text_of(inner), tower_of(inner)
    layers = [*text.layers, *tower.blocks]
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    apart = [*layers, *([embedding] if embedding.weight is not head.weight else [])]
    traced.largest_layer = _bytes(layers[0])
    linear = [module for module in [*text.modules(), head] if type(module) is nn.Linear]
    traced.text_linear = tuple(module.weight.numel() for module in linear)
    traced.vision_linear = sum(_products(tower).values())
    weights = _products(inner)
    traced.linear = sum(weights.values()) - weights.get(id(embedding.weight), 0)  # one that the head shares
    traced.outside_layers = _bytes(model) - sum(_bytes(module) for module in apart)


def _products(model: nn.Module) -> dict[int, int]:
    """Numbers of weights of all linear layers, by the identity of the parameter."""
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


def _update(
    traced: Traced, live: LiveBytes, autocast: Any, model: Any, judge: Any, policy: Policy, row: Row,
    indices: dict[str, Any],
) -> None:  # fmt: skip
    inner, judge, features = vision_language_model(model), vision_language_model(judge), None
    if policy.settings.freeze_vision_tower:
        with torch.no_grad(), autocast:
            features = _vision(inner, row, indices)
    start = live.live
    with autocast:
        states = _hidden(inner, row, features or _vision(inner, row, indices))
        before, most, live.peak = live.here, live.peak, live.here
        loss = _loss(inner, policy, row, states)
        traced.logits, live.peak = live.peak - before, max(live.peak, most)
    del states
    traced.activations = live.live - start
    if policy.reference:
        with torch.no_grad(), autocast:
            _loss(judge, policy, row, _hidden(judge, row, features or _vision(judge, row, indices)))
    loss.backward()


def _vision(model: Any, row: Row, indices: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tower's output for all clips of a row, and DeepStack features where there are some."""
    vision = model.config.vision_config
    across = vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.empty(len(indices["position_ids"]), vision.in_channels * across)
    grid = torch.tensor([row.grid] * row.questions)
    tower = tower_of(model)
    output = tower(pixels.to(tower.dtype), grid, return_dict=True, **indices)
    return (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))


def _embeddings(model: Any, rows: int, tokens: int, features: tuple[Tensor, ...]) -> Tensor:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    embedded = model.get_input_embeddings()(ids)
    mask = (ids > 0)[..., None]
    return embedded.masked_scatter(mask, features[0].to(embedded.dtype))


def _hidden(model: Any, row: Row, features: tuple[Tensor, ...]) -> Tensor:
    """The last hidden states [1, tokens, d]. DeepStack features are held and get a gradient."""
    states = text_of(model)(
        inputs_embeds=_embeddings(model, 1, row.tokens, features),
        position_ids=torch.zeros(3, 1, row.tokens, dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    for layer in features[1:]:
        states = states + 0 * layer.sum()
    return states


def _loss(model: Any, policy: Policy, row: Row, states: Tensor) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    head = model.get_output_embeddings()
    chosen = torch.zeros(row.questions * row.completions * row.completion, dtype=torch.long)
    chunk = CHUNK_LOGITS.get(policy.device_type, CHUNK_LOGITS["cuda"])
    rl = isinstance(policy.training, TGRPOSettings)  # with the entropy; SFT with the likeliest tokens
    return token_logprobs(head, states[0][chosen], chosen, 1.0, rl, vocabulary, chunk, not rl).logprobs.mean()


def _prefill(model: Any, row: Row, indices: dict[str, Any]) -> tuple[int, int]:
    """One forward of `row.questions` prompts with a cache. Returns the bytes of its keys and values, in the
    format that computes, and of its recurrent states."""
    inner = vision_language_model(model)
    cache: Any = DynamicCache(config=text_of(inner).config)
    states = text_of(inner)(
        inputs_embeds=_embeddings(inner, row.questions, row.prompt, _vision(inner, row, indices)),
        position_ids=torch.zeros(3, row.questions, row.prompt, dtype=torch.long),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    stateful = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    states_kept = [state for layer in stateful for state in (layer.conv_states[0], layer.recurrent_states[0])]
    attention = [layer for layer in cache.layers if layer not in stateful]
    pairs = [state for layer in attention for state in (layer.keys, layer.values)]
    mixed = torch.is_autocast_enabled("cpu")
    kept = [state.to(torch.get_autocast_dtype("cpu")) if mixed else state for state in pairs]
    inner.get_output_embeddings()(states[:, -1])
    return _storage(kept), _storage(states_kept)


def _storage(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _vision_indices(config: Any, row: Row) -> dict[str, Any]:
    """What the tower computes from the grid's values: order, positions and lengths of the patches."""
    grid = torch.tensor([row.grid] * row.questions)
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patches = row.grid[1] * row.grid[2]
    found: dict[str, Any] = {
        "position_ids": get_vision_position_ids(grid, merge),
        "cu_seqlens": get_vision_cu_seqlens(grid),
        "max_seqlen": patches,
    }
    if family_of(config).windows:
        window = get_vision_window_index(grid, merge, vision.window_size, vision.patch_size)
        found |= dict(zip(("window_index", "cu_window_seqlens"), window, strict=True))
        found["max_window_seqlen"] = patches
    if family_of(config).resampled_positions:
        side = int(vision.num_position_embeddings**0.5)
        taps = get_vision_interpolation_indices_and_weights(grid, side, spatial_merge_size=merge)
        found |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    return found
