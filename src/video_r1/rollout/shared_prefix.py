"""Decoding many completions of a prompt over one copy of the prompt's keys and values.

Attention of a new token runs over [prompt ; its own completion] with one softmax. The queries of all
completions of a prompt meet the prompt's keys in one matrix product, so the prompt is stored and read once,
not once per completion (the idea of Hydragen, arXiv 2402.05099). The models are unmodified: the function is
registered with transformers' AttentionInterface and is in force within `shared_prefix_attention` only.

Letters: R prompts (rows), P prompt tokens, B completions, K key-value heads, g query heads per key-value
head, D head size, w slots a row. A decoding step has the same shapes whichever token it is at: a completion's
keys have room for `capacity` tokens, of which the empty ones are hidden. A layer with a recurrent state has
no keys: every completion gets a copy of its prompt's state, which each token changes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from video_r1.models.checked import Checked

ATTENTION_NAME = "video_r1_shared_prefix"
RECORDED_ON = ("cuda",)  # devices on which a decoding step is a CUDA graph
FIRST_CAPACITY = 64  # tokens of a completion; doubled when full


class ForkedState:
    """What a layer with a state looks for in its cache, by transformers' names: the last inputs of its
    convolution [B, C, K] and its recurrent state [B, H, Dk, Dv]. Both are written in place.
    """

    record_past = False

    def __init__(self, inputs: Tensor, state: Tensor) -> None:
        self.conv_states, self.recurrent_states = [inputs], [state]
        self.remembered: tuple[Tensor, Tensor] | None = None

    def select(self, rows: Tensor) -> ForkedState:
        """The states of `rows`, copied."""
        return ForkedState(*(x.index_select(0, rows) for (x,) in (self.conv_states, self.recurrent_states)))


class SharedPrefixCache:
    """Keys and values of R prompts and of the completions that continue them, for all layers.

    layers: two tensors for each: keys and values [R, K, P, D], prompts shorter than P padded at the end; for
        those numbered in `stateful` what ForkedState takes, of the prompts.
    lengths: [R] int64, prompt tokens.
    rows: [B] int64, the prompt of each completion.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor,
        rows: Tensor,
        stateful: Collection[int] = (),
    ) -> None:
        attention = {number: pair for number, pair in enumerate(layers) if number not in stateful}
        self.layers = {number: ForkedState(*layers[number]).select(rows) for number in stateful}
        self.first = min(attention)  # the first layer with keys
        self.prefix_keys = {number: keys for number, (keys, _) in attention.items()}
        self.prefix_values = {number: values for number, (_, values) in attention.items()}
        prefix = self.prefix_keys[self.first]
        _, heads, prompt, size = prefix.shape
        self.keys = {  # [B, K, capacity, D] a layer
            number: keys.new_zeros(len(rows), heads, FIRST_CAPACITY, size)
            for number, keys in self.prefix_keys.items()
        }
        self.values = _each(torch.zeros_like, self.keys)
        self.length = 0  # t, the same for every completion in the batch
        self.place = torch.full((1,), -1, device=rows.device)  # of the newest token, where the device sees it
        self.used = 0  # tokens of the room that are attended to
        self.own_bias: Tensor | None = None  # [capacity], -inf where the room is empty
        padding = torch.arange(prompt, device=lengths.device) >= lengths[:, None]
        self.bias = torch.zeros_like(padding, dtype=prefix.dtype).masked_fill_(padding, -torch.inf)
        self.padded = bool(padding.any())
        self._place(rows)

    def _place(self, rows: Tensor) -> None:
        """Gives every completion a slot in the [R, w] layout in which queries meet the prompts."""
        self.rows = rows
        rank = (rows[:, None] == rows).tril(-1).sum(1)  # completions of the same prompt that stand before
        self.width = int(rank.max()) + 1
        slot_of = rows * self.width + rank  # [B]
        sequence_in = torch.zeros(len(self.bias) * self.width, dtype=torch.long, device=rows.device)
        sequence_in[slot_of] = torch.arange(len(rows), device=rows.device)  # empty slots: any
        # Without empty slots both are the identity: completions of a prompt stand side by side.
        full = len(rows) == len(sequence_in) and torch.equal(slot_of, sequence_in)
        self.slot_of, self.sequence_in = (None, None) if full else (slot_of, sequence_in)

    def keep(self, kept: Tensor) -> None:
        """Leaves only the completions `kept` ([B'] int64 indices), and the prompts that they still need."""
        self.keys, self.values = (
            _each(lambda room: room.index_select(0, kept), states) for states in (self.keys, self.values)
        )
        self.layers = {number: layer.select(kept) for number, layer in self.layers.items()}
        rows = self.rows[kept]
        needed = rows.unique()
        if 2 * len(needed) <= len(self.bias):  # copying the prompts pays off only when many of them are done
            self.prefix_keys, self.prefix_values = (
                _each(lambda prefix: prefix.index_select(0, needed), states)
                for states in (self.prefix_keys, self.prefix_values)
            )
            self.bias = self.bias.index_select(0, needed)
            rows = torch.searchsorted(needed, rows)
        self._place(rows)

    def make_room(self) -> None:
        """For one more token of every completion, before each decoding step."""
        self.length += 1
        self.place += 1
        if self.length > self.keys[self.first].shape[2]:
            self.keys, self.values = (
                _each(lambda room: torch.cat([room, torch.zeros_like(room)], dim=2), states)
                for states in (self.keys, self.values)
            )

    def hide_empty(self) -> None:
        """Notes which of the room is empty, for all layers of a decoding step. On a CPU, where nothing is
        recorded, the used part is given out alone.
        """
        self.own_bias, self.used = None, self.keys[self.first].shape[2]
        if self.place.device.type == "cpu":
            self.used = self.length
            return
        empty = torch.arange(self.used, device=self.place.device) > self.place
        self.own_bias = torch.zeros_like(empty, dtype=self.bias.dtype).masked_fill_(empty, -torch.inf)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Puts one token's keys and values [B, K, 1, D] in place; returns the room, [B, K, capacity, D],
        whose shape and address stay while it lasts.
        """
        if layer == self.first:
            self.hide_empty()
        for room, new in ((self.keys[layer], keys), (self.values[layer], values)):
            room.index_copy_(2, self.place, new.to(room.dtype))  # under autocast keys come in float32
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    def has_previous_state(self, layer: int, *args: Any, **kwargs: Any) -> bool:
        """For a layer with a state: whether its prompt has been read."""
        return True

    def update_recurrent_state(self, state: Tensor, layer: int) -> None:
        self.layers[layer].recurrent_states[0].copy_(state)

    def remember(self, wanted: bool) -> None:
        """Before a token. wanted: its step may run more than once, each time from the present states."""
        for layer in self.layers.values():
            layer.remembered = (
                (layer.conv_states[0].clone(), layer.recurrent_states[0].clone()) if wanted else None
            )

    def rewind(self) -> None:
        """Back to the states that are remembered, if any."""
        for layer in self.layers.values():
            if layer.remembered is not None:
                layer.conv_states[0].copy_(layer.remembered[0])
                layer.recurrent_states[0].copy_(layer.remembered[1])

    def get_seq_length(self, layer: int = 0) -> int:
        return self.bias.shape[1] + self.length


def _each(function: Callable[[Tensor], Tensor], layers: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {number: function(tensor) for number, tensor in layers.items()}


def attend(
    module: Any,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    shared_prefix: SharedPrefixCache,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a completion. query: [B, K*g, 1, D]; keys, values: [B, K, capacity, D], the
    room of its own tokens. Returns [B, 1, K*g, D]. The signature is that of transformers' attention
    functions.
    """
    cache = shared_prefix
    prefix_keys, prefix_values = cache.prefix_keys[module.layer_idx], cache.prefix_values[module.layer_idx]
    count, heads, size = len(query), query.shape[1], query.shape[3]
    prompts, groups, prompt_length = prefix_keys.shape[:3]
    per_group, width = heads // groups, cache.width

    def to_slots(tensor: Tensor) -> Tensor:  # [B, K, g, X] -> [R*K, w*g, X]
        placed = tensor if cache.sequence_in is None else tensor.index_select(0, cache.sequence_in)
        placed = placed.view(prompts, width, groups, per_group, -1).transpose(1, 2)
        return placed.reshape(prompts * groups, width * per_group, -1)

    def from_slots(tensor: Tensor) -> Tensor:  # [R*K, w*g, X] -> [B, K, g, X]
        placed = tensor.view(prompts, groups, width, per_group, -1).transpose(1, 2)
        placed = placed.reshape(prompts * width, groups, per_group, -1)
        return placed if cache.slot_of is None else placed.index_select(0, cache.slot_of)

    query = query.to(keys.dtype).view(count, groups, per_group, size) * scaling
    prefix_scores = torch.bmm(to_slots(query), prefix_keys.flatten(0, 1).transpose(1, 2))
    if cache.padded:
        prefix_scores += cache.bias.repeat_interleave(groups, 0).unsqueeze(1)  # [R*K, 1, P]
    own_scores = torch.matmul(query, keys.transpose(2, 3))
    if cache.own_bias is not None:
        own_scores = own_scores + cache.own_bias
    own_scores = to_slots(own_scores)
    weights = torch.cat([prefix_scores, own_scores], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    output = from_slots(torch.bmm(weights[..., :prompt_length], prefix_values.flatten(0, 1)))
    output = output + torch.matmul(from_slots(weights[..., prompt_length:]), values)
    return output.reshape(count, 1, heads, size), None


AttentionInterface.register(ATTENTION_NAME, attend)


@contextmanager
def shared_prefix_attention(text_config: Any) -> Iterator[None]:
    """Within it, a text model of this config attends by `attend`; its caller passes `shared_prefix=cache`.

    No mask function is registered under the name, so transformers builds no mask.
    """
    previous = text_config._attn_implementation
    text_config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        text_config._attn_implementation = previous


# ---- A decoding step as a CUDA graph


class DecodingStep:
    """`step(tokens [B], position [B], cache)` as the device runs it best. It gives logits [B, V] and puts the
    tokens into the cache, the same ones when it is called again with the same arguments.

    The logits of a call may be overwritten by the next one.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor, SharedPrefixCache], Tensor], cache: SharedPrefixCache
    ) -> None:
        self.step, self.cache = step, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.buffers: dict[int, Tensor] = {}

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [B, V] after `tokens` [B] at `position` [B], for which the cache has room."""
        recorded = tokens.device.type in RECORDED_ON
        self.cache.remember(recorded and replayed_step.agrees is not False and self.outdated)
        return (replayed_step if recorded else plain_step)(tokens, position, self)

    @property
    def outdated(self) -> bool:
        """Whether there is no recording of these shapes."""
        return self.graph is None or self.buffers is not self.cache.keys

    def record(self, tokens: Tensor, position: Tensor) -> None:
        """Records the step for these shapes and the cache's present buffers."""
        self.graph = None  # before the next one is made: its memory can serve again
        plain_step(tokens, position, self)  # sets up what kernels keep
        self.tokens, self.position = tokens.clone(), position.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.step(self.tokens, self.position, self.cache)
        self.graph, self.buffers = graph, self.cache.keys


def plain_step(tokens: Tensor, position: Tensor, decoding: DecodingStep) -> Tensor:
    decoding.cache.rewind()
    return decoding.step(tokens, position, decoding.cache)


def _replayed(tokens: Tensor, position: Tensor, decoding: DecodingStep) -> Tensor:
    if decoding.outdated:
        decoding.record(tokens, position)
    assert decoding.graph is not None
    decoding.tokens.copy_(tokens)
    decoding.position.copy_(position)
    decoding.cache.rewind()
    decoding.graph.replay()
    return decoding.logits


replayed_step = Checked("decoding by a CUDA graph", _replayed, plain_step)
