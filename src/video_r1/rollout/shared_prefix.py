"""Decoding many completions of a prompt over one copy of the prompt's keys and values.

A new token attends to [prompt ; its own completion] with one softmax. The queries of all completions of a
prompt are multiplied with the prompt's keys in one matrix product, so the prompt is stored and read once, not
once per completion (Hydragen, arXiv 2402.05099).

Letters: R prompts (rows), P prompt tokens, B completions, K key-value heads, g query heads per key-value
head, D head size, w slots a row. A decoding step has the same shapes for every token: a completion's keys
have room for `capacity` tokens, and the empty ones are masked. A layer with a recurrent state has no keys:
every completion gets a copy of its prompt's state, which each token changes in place.

On a GPU the step is a CUDA graph (`Recording`). A step of a 7B model is some 3,000 launches of small kernels,
which take the CPU longer than the GPU needs for the work; replayed, they are one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from video_r1.models.checked import Checked

ATTENTION_NAME = "video_r1_shared_prefix"
RECORDED_ON = ("cuda",)  # devices on which a decoding step is a CUDA graph
FIRST_CAPACITY = {"cpu": 64, "cuda": 256}  # tokens of a completion; doubled when full, and recorded again


def first_capacity(device_type: str) -> int:
    return FIRST_CAPACITY.get(device_type, FIRST_CAPACITY["cuda"])


class ForkedState:
    """The cache of a layer with a state, by transformers' names.

    conv_states: last inputs of its convolution [B, C, K]; recurrent_states: [B, H, Dk, Dv]. Both are written
    in place.
    """

    record_past = False

    def __init__(self, inputs: Tensor, state: Tensor) -> None:
        self.conv_states, self.recurrent_states = [inputs], [state]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.conv_states[0], self.recurrent_states[0]

    def select(self, rows: Tensor) -> ForkedState:
        """Return a copy of the states of `rows`."""
        return ForkedState(*(tensor.index_select(0, rows) for tensor in self.tensors))


class SharedPrefixCache:
    """Keys and values of R prompts and of the completions that continue them, for all layers.

    layers: keys and values [R, K, P, D] of each, prompts shorter than P padded at the end; for the layers in
        `stateful` the two tensors of ForkedState.
    lengths: [R] int64, prompt tokens.
    rows: [B] int64, the prompt of each completion.
    own: keys and values [B, K, S, D] of what completions have already, by layer; the shorter ones begin with
        `blank` [B] empty places.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor,
        rows: Tensor,
        stateful: Collection[int] = (),
        own: Sequence[tuple[Tensor, Tensor]] | None = None,
        blank: Tensor | None = None,
    ) -> None:
        self.layers = {number: ForkedState(*layers[number]).select(rows) for number in stateful}
        self.prefix = {number: list(pair) for number, pair in enumerate(layers) if number not in stateful}
        self.first = min(self.prefix)  # the first layer with keys
        keys = self.prefix[self.first][0]
        _, heads, prompt, size = keys.shape
        capacity = first_capacity(keys.device.type)
        self.room = {  # keys and values [B, K, capacity, D] of the completions' tokens
            number: [part.new_zeros(len(rows), heads, capacity, size) for part in pair]
            for number, pair in self.prefix.items()
        }
        self.length = 0  # tokens of every completion in the batch
        self.blank = blank
        if own is not None:
            self.length = own[0][0].shape[2]
            for number, pair in self.room.items():
                pair[:] = [torch.cat(both, 2) for both in zip(own[number], pair, strict=True)]
        place = self.length - 1
        self.place = torch.full((1,), place, device=rows.device)  # index of the newest token, on the device
        self.used = 0  # tokens of the room that are attended to
        self.own_bias: Tensor | None = None  # [capacity] or [B, 1, 1, capacity], -inf where the room is empty
        padding = torch.arange(prompt, device=lengths.device) >= lengths[:, None]
        self.bias = torch.zeros_like(padding, dtype=keys.dtype).masked_fill_(padding, -torch.inf)
        self.padded = bool(padding.any())
        self.remembered: dict[int, list[Tensor]] = {}
        self.recording: Recording | None = None
        self._place(rows)

    @property
    def capacity(self) -> int:
        return self.room[self.first][0].shape[2]

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
        self.recording = None
        for pair in self.room.values():
            pair[:] = [part.index_select(0, kept) for part in pair]
        self.layers = {number: layer.select(kept) for number, layer in self.layers.items()}
        if self.blank is not None:
            self.blank = self.blank[kept]
        rows = self.rows[kept]
        needed = rows.unique()
        if 2 * len(needed) <= len(self.bias):  # copying the prompts pays off only when many are done
            for pair in self.prefix.values():
                pair[:] = [part.index_select(0, needed) for part in pair]
            self.bias = self.bias.index_select(0, needed)
            rows = torch.searchsorted(needed, rows)
        self._place(rows)

    def make_room(self) -> None:
        """Make room for one more token of every completion, before each decoding step."""
        self.length += 1
        self.place += 1
        if self.length > self.capacity:
            self.recording = None
            for pair in self.room.values():
                pair[:] = [torch.cat([part, torch.zeros_like(part)], dim=2) for part in pair]

    def hide_empty(self) -> None:
        """Compute the mask of the empty room, for all layers of a decoding step.

        A CPU, which records no graph, gets a view of the used part instead.
        """
        on_cpu = self.place.device.type == "cpu"
        self.used, self.own_bias = (self.length if on_cpu else self.capacity), None
        if on_cpu and self.blank is None:
            return
        places = torch.arange(self.used, device=self.place.device)
        empty = places > self.place
        if self.blank is not None:
            empty = (empty | (places < self.blank[:, None]))[:, None, None]
        self.own_bias = torch.zeros_like(empty, dtype=self.bias.dtype).masked_fill_(empty, -torch.inf)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Write one token's keys and values [B, K, 1, D]; return the room, [B, K, capacity, D]."""
        if layer == self.first:
            self.hide_empty()
        for part, new in zip(self.room[layer], (keys, values), strict=True):
            part.index_copy_(2, self.place, new.to(part.dtype))  # under autocast keys come in float32
        return tuple(part[:, :, : self.used] for part in self.room[layer])

    def has_previous_state(self, layer: int, *args: Any, **kwargs: Any) -> bool:
        return True  # the prompt has been read

    def get_conv_state(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        return self.layers[layer].conv_states[0]

    def get_recurrent_state(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        return self.layers[layer].recurrent_states[0]

    def is_recording_past(self, layer: int) -> bool:
        return False

    def update_recurrent_state(self, state: Tensor, layer: int, *args: Any, **kwargs: Any) -> None:
        self.layers[layer].recurrent_states[0].copy_(state)

    def remember(self, wanted: bool) -> None:
        """Save the states before a token whose step may run more than once (`wanted`)."""
        layers = self.layers.items() if wanted else ()
        self.remembered = {number: [part.clone() for part in layer.tensors] for number, layer in layers}

    def rewind(self) -> None:
        """Restore the saved states, if any."""
        for number, saved in self.remembered.items():
            for part, before in zip(self.layers[number].tensors, saved, strict=True):
                part.copy_(before)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.bias.shape[1] + self.length


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
    prefix_keys, prefix_values = cache.prefix[module.layer_idx]
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


AttentionInterface.register(ATTENTION_NAME, attend)  # without a mask function: transformers builds no mask


# ---- A decoding step as a CUDA graph

Step = Callable[[Tensor, Tensor, SharedPrefixCache], Tensor]
"""Returns logits [B, V] after tokens [B] at position [B] and writes the tokens into the cache; it can be
repeated with the same arguments after `rewind`."""


class Recording(NamedTuple):
    """A step as a CUDA graph over the cache's buffers, its inputs and its logits."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    position: Tensor
    logits: Tensor


def decode_step(step: Step, tokens: Tensor, position: Tensor, cache: SharedPrefixCache) -> Tensor:
    """Run `step`, after `make_room`; on a GPU as a CUDA graph. The next call may overwrite the logits."""
    recorded = tokens.device.type in RECORDED_ON and replayed_step.agrees is not False
    cache.remember(recorded and cache.recording is None)
    if not recorded:
        return plain_step(tokens, position, cache, step)
    try:
        return replayed_step(tokens, position, cache, step)
    except RuntimeError as error:  # of a later recording, when memory is short
        replayed_step.refuse(f"fails with {type(error).__name__}: {error}")
        cache.recording = None
    return plain_step(tokens, position, cache, step)


def plain_step(tokens: Tensor, position: Tensor, cache: SharedPrefixCache, step: Step) -> Tensor:
    cache.rewind()
    return step(tokens, position, cache)


def _replayed(tokens: Tensor, position: Tensor, cache: SharedPrefixCache, step: Step) -> Tensor:
    if cache.recording is None:
        cache.recording = _record(tokens, position, cache, step)
    recording = cache.recording
    recording.tokens.copy_(tokens)
    recording.position.copy_(position)
    cache.rewind()
    recording.graph.replay()
    return recording.logits


def _record(tokens: Tensor, position: Tensor, cache: SharedPrefixCache, step: Step) -> Recording:
    plain_step(tokens, position, cache, step)  # warms the kernels up
    graph, inputs = torch.cuda.CUDAGraph(), (tokens.clone(), position.clone())
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
            logits = step(*inputs, cache)
    finally:
        torch.cuda.set_stream(stream)  # after a failure torch leaves the stream of the recording current
    return Recording(graph, *inputs, logits)


replayed_step = Checked("decoding by a CUDA graph", _replayed, plain_step)
