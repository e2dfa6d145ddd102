"""Decoding many completions of a prompt over one copy of the prompt's keys and values.

A new token attends to [prompt ; its own completion] with one softmax. The queries of all completions of a
prompt are multiplied with the prompt's keys in one matrix product, so the prompt is stored and read once, not
once per completion (Hydragen, arXiv 2402.05099). The models are unmodified: the attention function is
registered with transformers' AttentionInterface and used within `shared_prefix_attention` only.

Letters: R prompts (rows), P prompt tokens, B completions, K key-value heads, g query heads per key-value
head, D head size, w slots a row. A decoding step has the same shapes for every token: a completion's keys
have room for `capacity` tokens, and the empty ones are masked. A layer with a recurrent state has no keys:
every completion gets a copy of its prompt's state, which each token changes in place.

On a GPU the step is a CUDA graph (`DecodingStep`). A step of a 7B model is some 3,000 launches of small
kernels, which take the CPU longer than the GPU needs for the work; replayed, they are one launch.
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
    """The cache of a layer with a state, by transformers' names.

    conv_states: last inputs of its convolution [B, C, K]; recurrent_states: [B, H, Dk, Dv]. Both are written
    in place.
    """

    record_past = False

    def __init__(self, inputs: Tensor, state: Tensor) -> None:
        self.conv_states, self.recurrent_states = [inputs], [state]
        self.remembered: tuple[Tensor, Tensor] | None = None

    def select(self, rows: Tensor) -> ForkedState:
        """Return a copy of the states of `rows`."""
        return ForkedState(*(x.index_select(0, rows) for (x,) in (self.conv_states, self.recurrent_states)))


class SharedPrefixCache:
    """Keys and values of R prompts and of the completions that continue them, for all layers.

    layers: keys and values [R, K, P, D] of each, prompts shorter than P padded at the end; for the layers in
        `stateful` the two tensors of ForkedState.
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
        self.place = torch.full((1,), -1, device=rows.device)  # index of the newest token, on the device
        self.used = 0  # tokens of the room that are attended to
        self.own_bias: Tensor | None = None  # [capacity], -inf where the room is empty
        padding = torch.arange(prompt, device=lengths.device) >= lengths[:, None]
        self.bias = torch.zeros_like(padding, dtype=prefix.dtype).masked_fill_(padding, -torch.inf)
        self.padded = bool(padding.any())
        self._place(rows)

    def _place(self, rows: Tensor) -> None:
        """Give every completion a slot in the [R, w] layout that multiplies queries with prompt keys."""
        self.rows = rows
        rank = (rows[:, None] == rows).tril(-1).sum(1)  # earlier completions of the same prompt
        self.width = int(rank.max()) + 1
        slot_of = rows * self.width + rank  # [B]
        sequence_in = torch.zeros(len(self.bias) * self.width, dtype=torch.long, device=rows.device)
        sequence_in[slot_of] = torch.arange(len(rows), device=rows.device)  # empty slots: any
        # Without empty slots both are the identity: completions are sorted by prompt.
        full = len(rows) == len(sequence_in) and torch.equal(slot_of, sequence_in)
        self.slot_of, self.sequence_in = (None, None) if full else (slot_of, sequence_in)

    def keep(self, kept: Tensor) -> None:
        """Drop all completions but `kept` ([B'] int64 indices), and prompts that no completion needs."""
        self.keys, self.values = (
            _each(lambda room: room.index_select(0, kept), states) for states in (self.keys, self.values)
        )
        self.layers = {number: layer.select(kept) for number, layer in self.layers.items()}
        rows = self.rows[kept]
        needed = rows.unique()
        if 2 * len(needed) <= len(self.bias):  # copying the prompts pays off only when many are done
            self.prefix_keys, self.prefix_values = (
                _each(lambda prefix: prefix.index_select(0, needed), states)
                for states in (self.prefix_keys, self.prefix_values)
            )
            self.bias = self.bias.index_select(0, needed)
            rows = torch.searchsorted(needed, rows)
        self._place(rows)

    def make_room(self) -> None:
        """Make room for one more token of every completion, before each decoding step."""
        self.length += 1
        self.place += 1
        if self.length > self.keys[self.first].shape[2]:
            self.keys, self.values = (
                _each(lambda room: torch.cat([room, torch.zeros_like(room)], dim=2), states)
                for states in (self.keys, self.values)
            )

    def hide_empty(self) -> None:
        """Compute the mask of the empty room, for all layers of a decoding step.

        A CPU, which records no graph, gets a view of the used part instead.
        """
        self.own_bias, self.used = None, self.keys[self.first].shape[2]
        if self.place.device.type == "cpu":
            self.used = self.length
            return
        empty = torch.arange(self.used, device=self.place.device) > self.place
        self.own_bias = torch.zeros_like(empty, dtype=self.bias.dtype).masked_fill_(empty, -torch.inf)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [B, K, 1, D]; return the room, [B, K, capacity, D].

        Its shape and address stay the same until `make_room` doubles it.
        """
        if layer == self.first:
            self.hide_empty()
        for room, new in ((self.keys[layer], keys), (self.values[layer], values)):
            room.index_copy_(2, self.place, new.to(room.dtype))  # under autocast keys come in float32
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    def has_previous_state(self, layer: int, *args: Any, **kwargs: Any) -> bool:
        return True  # the prompt has been read

    def update_recurrent_state(self, state: Tensor, layer: int) -> None:
        self.layers[layer].recurrent_states[0].copy_(state)

    def remember(self, wanted: bool) -> None:
        """Save the states before a token whose step may run more than once (`wanted`)."""
        for layer in self.layers.values():
            layer.remembered = (
                (layer.conv_states[0].clone(), layer.recurrent_states[0].clone()) if wanted else None
            )

    def rewind(self) -> None:
        """Restore the saved states, if any."""
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
    """Attend for one new token of each completion, with the signature of transformers' attention functions.

    query: [B, K*g, 1, D]; keys, values: [B, K, capacity, D], the room of its own tokens. Returns
    [B, 1, K*g, D].
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
    """Make text models of this config use `attend`; the caller passes `shared_prefix=cache` to the model.

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
    """Runs `step(tokens [B], position [B], cache)`, on a GPU as a CUDA graph recorded once for its shapes.

    `step` returns logits [B, V] and writes the tokens into the cache; it can be repeated with the same
    arguments. The next call may overwrite the logits of a call.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor, SharedPrefixCache], Tensor], cache: SharedPrefixCache
    ) -> None:
        self.step, self.cache = step, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.buffers: dict[int, Tensor] = {}

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Return logits [B, V] after `tokens` [B] at `position` [B]; `make_room` comes first."""
        recorded = tokens.device.type in RECORDED_ON
        self.cache.remember(recorded and replayed_step.agrees is not False and self.outdated)
        return (replayed_step if recorded else plain_step)(tokens, position, self)

    @property
    def outdated(self) -> bool:
        """Whether no graph has been recorded for these shapes."""
        return self.graph is None or self.buffers is not self.cache.keys

    def record(self, tokens: Tensor, position: Tensor) -> None:
        """Record the step for these shapes and the cache's present buffers."""
        self.graph = None  # frees its memory for the next one
        plain_step(tokens, position, self)  # warms the kernels up
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
