"""Rollouts in the training process, by the trained model itself.

```
prompts ─► prefill: pixels and prompt once ─► keys and values [R, P] ─► decode B = R*n ─► Rollouts
                                                                    finished ones leave the batch
```
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from video_r1.data.prompts import Prompt
from video_r1.data.rollouts import Rollout
from video_r1.errors import ConfigError
from video_r1.models.attention import replaced
from video_r1.models.checked import works
from video_r1.models.families import text_of, with_cache
from video_r1.models.group_forward import (
    attending_in_rows,
    embedded,
    group_logprobs,
    prompt_positions,
    row_of,
    small_question,
    visual_features,
)
from video_r1.models.lora import merged_adapters
from video_r1.models.onednn import onednn_linears
from video_r1.rollout.engine import (
    Counts,
    Groups,
    InProcessEngine,
    OnToken,
    Prompts,
    SamplingSettings,
    as_rollouts,
    draw,
    eval_mode,
    uniform_numbers,
    useful_threads,
    wanted_counts,
)
from video_r1.rollout.shared_prefix import ATTENTION_NAME, SharedPrefixCache, decode_step

T = TypeVar("T")
# Finished completions leave the batch several at a time: copying the others' states is costly, and on a GPU
# (True) the step is recorded again.
KEEP_RATIO = {False: 0.875, True: 0.5}
TOKENS_BETWEEN_SYNCS = 8  # decoded on a GPU before the CPU reads which completions have ended
MAX_PREFILL_TOKENS = 16384  # in one prefill forward, padding included


class _Prefilled(NamedTuple):
    """R prompts after their prefill; of B answers that go on after tool calls, `rows` and what follows too,
    and then `logits` and `next_position` are of the answers.
    """

    layers: Sequence[tuple[Tensor, Tensor]]  # keys and values [R, K, P, D], or convolution inputs and state
    logits: Tensor  # [R, V] of the first completion token
    lengths: Tensor  # [R] int64
    next_position: Tensor  # [R] int64, of the first completion token
    rows: Tensor | None = None  # [B] int64, the prompt of each answer
    own: Sequence[tuple[Tensor, Tensor]] | None = None  # keys and values [B, K, S, D] behind the prompt
    blank: Tensor | None = None  # [B] int64, empty places at their beginning


class TransformersEngine(InProcessEngine):
    """Samples with a model of a known family, sharing each prompt's prefill.

    Prompts beyond `max_sequences` completions wait for the next wave. Raises ConfigError for models with
    sliding-window layers.
    """

    max_prefill_tokens = MAX_PREFILL_TOKENS

    def update_weights(self, model: Any) -> None:
        super().update_weights(model)
        self._text = text_of(self.model)
        self._text_config = self._text.config
        kinds = getattr(self._text_config, "layer_types", None) or ()
        if "sliding_attention" in kinds:
            raise ConfigError("rollouts: models with sliding-window attention are not supported")
        self._stateful = {number for number, kind in enumerate(kinds) if kind == "linear_attention"}

    def works(self) -> bool:
        """Return whether the log-probs of sampled tokens are those of a forward (`checked.works`)."""
        tokens: list[Tensor] = []

        def sampled(model: Any) -> Tensor:
            prompt, _ = small_question(model)
            (group,) = self.sample([prompt], SamplingSettings(n=2, max_tokens=4, seed=0))
            tokens[:] = [rollout.token_ids for rollout in group]
            return torch.cat([rollout.logprobs for rollout in group])

        def scored(model: Any) -> Tensor:
            prompt, _ = small_question(model)
            return group_logprobs(model, [prompt], [tokens]).logprobs.cpu()

        return works("decoding over a shared prompt", self.model, sampled, scored)

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, sampling: SamplingSettings, counts: Counts = None, on_token: OnToken = None
    ) -> Groups:
        """Sample as `RolloutEngine.sample` says. `on_token(q, g, token_id)` gets each token at once.

        Log-probs at temperature 0 are the model's own. Completion g depends on its prompt's seed and g, not
        on the other prompts or how they are batched.
        """
        counts = wanted_counts(prompts, sampling, counts)
        uniform = uniform_numbers(counts, sampling)
        # Answers to one question stand together
        firsts = [prompt.parts[0][1] if prompt.parts else prompt for prompt in prompts]
        place = {id(first): n for n, first in reversed(list(enumerate(firsts)))}
        order = sorted(
            (index for index, count in enumerate(counts) if count),
            key=lambda index: (len(firsts[index].input_ids), place[id(firsts[index])]),
        )

        def sequences(wave: Sequence[int]) -> int:
            tokens = sum(len(prompts[index].input_ids) for index in wave if prompts[index].parts)
            too_long = tokens > self.max_prefill_tokens  # their prefill is one row
            return self.max_sequences + 1 if too_long else sum(counts[index] for index in wave)

        results: Groups = [[] for _ in prompts]
        with eval_mode(self.model), merged_adapters(self.model):
            for wave in _cut(order, sequences, self.max_sequences):
                numbers = [(index, completion) for index in wave for completion in range(counts[index])]
                drawn = torch.cat([uniform[index] for index in wave])
                with useful_threads(self.model), onednn_linears(self.model, len(numbers)):
                    prefilled = self._prefill([prompts[index] for index in wave])
                    rollouts = self._decode(prefilled, numbers, drawn, sampling, on_token)
                for (index, _), rollout in zip(numbers, rollouts, strict=True):
                    results[index].append(rollout)
        return results

    def _prefill(self, prompts: Sequence[Prompt]) -> _Prefilled:
        if prompts[0].parts and not self._stateful:
            return self._prefill_answers(prompts)

        def tokens(chunk: Sequence[Prompt]) -> int:
            lengths = [len(prompt.input_ids) for prompt in chunk]
            if self._stateful and len(set(lengths)) > 1:  # padding would change the states
                return self.max_prefill_tokens + 1
            return len(chunk) * max(lengths)

        parts = [self._prefill_chunk(chunk) for chunk in _cut(prompts, tokens, self.max_prefill_tokens)]
        if len(parts) == 1:
            return parts[0]
        pairs = [zip(*chunks, strict=True) for chunks in zip(*(part.layers for part in parts), strict=True)]
        return _Prefilled(
            [(_stack(first), _stack(second)) for first, second in pairs],
            torch.cat([part.logits for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.next_position for part in parts]),
        )

    def _prefill_chunk(self, prompts: Sequence[Prompt]) -> _Prefilled:
        """Padding is at the end: causal attention hides it without a mask."""
        device = self._text.device
        rows = torch.arange(len(prompts), device=device)
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=device)
        input_ids = pad_sequence([prompt.input_ids for prompt in prompts], batch_first=True)
        in_prompt, shown = torch.zeros_like(input_ids, dtype=torch.bool), list[Prompt]()
        for row, prompt in enumerate(prompts):  # tokens of the policy keep their own embeddings
            for first, part in prompt.parts or ((0, prompt),):
                in_prompt[row, first : first + len(part.input_ids)] = True
                shown.append(part)
        parts, following = zip(*(prompt_positions(self.model, prompt) for prompt in prompts), strict=True)
        positions = pad_sequence([part.T for part in parts]).permute(2, 1, 0)  # [3, R, P]
        features = visual_features(self.model, shown)
        cache: Any = DynamicCache(config=self._text_config)
        hidden = self._text(
            **embedded(self.model, shown, features, input_ids.to(device), in_prompt.to(device)),
            position_ids=positions.to(device),
            **with_cache(self._text, cache),
        ).last_hidden_state
        return _Prefilled(
            layers=[self._kept(layer) for layer in cache.layers],
            logits=self.model.get_output_embeddings()(hidden[rows, lengths - 1]),
            lengths=lengths,
            next_position=torch.tensor(following, device=device),
        )

    def _prefill_answers(self, prompts: Sequence[Prompt]) -> _Prefilled:
        """Prefill answers that go on after tool calls, each question's own prompt once: a row of groups.

        prompt  answer 1 so far  answer 2 so far ─► keys and values of the prompt [R, K, P, D], and of the
                                                    answers [B, K, S, D], ends aligned
        """
        device, groups = self._text.device, list[tuple[Prompt, list[Prompt]]]()
        for prompt in prompts:
            if not groups or groups[-1][0] is not prompt.parts[0][1]:
                groups.append((prompt.parts[0][1], []))
            groups[-1][1].append(prompt)
        firsts = [first for first, _ in groups]
        with attending_in_rows(self.model):
            row = row_of(self.model, firsts, [[answer.pieces[1:] for answer in group] for _, group in groups])
            cache: Any = DynamicCache(config=self._text_config)
            hidden = self._text(**row.inputs, **with_cache(self._text, cache)).last_hidden_state[0]
        spans = [span for _, ends in row.layout.groups for span in itertools.pairwise(ends)]
        starts = [(start, ends[0]) for start, ends in row.layout.groups]

        def cut(tensor: Tensor, parts: Sequence[tuple[int, int]], side: str) -> Tensor:  # [1, K, N, D]
            found = [tensor[0, :, a:b].transpose(0, 1) for a, b in parts]
            return pad_sequence(found, batch_first=True, padding_side=side).transpose(1, 2)

        kept = [self._kept(layer) for layer in cache.layers]
        lengths = torch.tensor([b - a for a, b in spans], device=device)
        last = torch.tensor([b - 1 for _, b in spans], device=device)
        return _Prefilled(
            layers=[(cut(k, starts, "right"), cut(v, starts, "right")) for k, v in kept],
            logits=self.model.get_output_embeddings()(hidden[last]),
            lengths=torch.tensor([b - a for a, b in starts], device=device),
            next_position=torch.tensor(list(itertools.chain(*row.after)), device=device),
            rows=torch.tensor([n for n, (_, group) in enumerate(groups) for _ in group], device=device),
            own=[(cut(k, spans, "left"), cut(v, spans, "left")) for k, v in kept],
            blank=lengths.max() - lengths,
        )

    def _kept(self, layer: Any) -> tuple[Tensor, Tensor]:
        if hasattr(layer, "recurrent_states"):
            return layer.conv_states[0], layer.recurrent_states[0]
        dtype = layer.keys.dtype
        if torch.is_autocast_enabled(layer.keys.device.type):  # rotation leaves keys in float32
            dtype = torch.get_autocast_dtype(layer.keys.device.type)
        return layer.keys.to(dtype), layer.values.to(dtype)

    def _decode(
        self,
        prefilled: _Prefilled,
        numbers: Sequence[tuple[int, int]],
        uniform: Tensor,
        sampling: SamplingSettings,
        on_token: OnToken,
    ) -> list[Rollout]:
        """Decode the S completions of one wave, sorted by prompt.

        numbers: [S] indices of prompt and completion, in the prefill's order; uniform: [S, max_tokens].
        """
        device = prefilled.logits.device
        uniform = uniform.to(device)
        prompt_of = torch.tensor([prompt for prompt, _ in numbers], device=device)
        prefix = torch.unique_consecutive(prompt_of, return_inverse=True)[1]  # [S] in the prefill's order
        stop = torch.zeros(prefilled.logits.shape[-1], dtype=torch.bool, device=device)
        stop[self.stop_ids] = True
        logits, position = prefilled.logits[prefix], prefilled.next_position[prefix]
        rows, own, blank = prefix, prefilled.own, prefilled.blank
        if own is not None and prefilled.rows is not None and blank is not None:
            rows, blank = prefilled.rows[prefix], blank[prefix]
            own = [(keys[prefix], values[prefix]) for keys, values in own]
        cache = SharedPrefixCache(prefilled.layers, prefilled.lengths, rows, self._stateful, own, blank)
        token_ids = torch.zeros(len(rows), sampling.max_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(rows), sampling.max_tokens, device=device)
        lengths = torch.full_like(rows, sampling.max_tokens)
        stopped = torch.zeros_like(rows, dtype=torch.bool)
        active = torch.arange(len(rows), device=device)  # [B] completions in the batch
        on_gpu = device.type != "cpu"
        synced_every = TOKENS_BETWEEN_SYNCS if on_gpu else 1
        with replaced(self._text_config, "_attn_implementation", ATTENTION_NAME):
            for step in range(sampling.max_tokens):
                tokens, values = draw(logits, sampling, uniform[active, step])
                token_ids[active, step], logprobs[active, step] = tokens, values
                running = ~stopped[active]
                if on_token is not None:
                    for number, token in zip(active[running], tokens[running], strict=True):
                        on_token(*numbers[int(number)], int(token))
                ending = running & stop[tokens]
                lengths[active] = torch.where(ending, step + 1, lengths[active])
                stopped[active] = ending | ~running
                if step + 1 == sampling.max_tokens:
                    break
                if step % synced_every == 0:  # the only synchronisation with the device
                    kept = (~stopped[active]).nonzero().squeeze(1)
                    if len(kept) == 0:
                        break
                    if len(kept) <= KEEP_RATIO[on_gpu] * len(active):
                        active, tokens, position = active[kept], tokens[kept], position[kept]
                        cache.keep(kept)
                cache.make_room()
                logits = decode_step(self._next_logits, tokens, position, cache)
                position = position + 1
        return as_rollouts(self.tokenizer, token_ids, logprobs, lengths, stopped)

    def _next_logits(self, tokens: Tensor, position: Tensor, cache: SharedPrefixCache) -> Tensor:
        """Return logits [B, V] after `tokens` [B] at `position` [B], whose keys and values join the cache."""
        output = self._text(
            inputs_embeds=self.model.get_input_embeddings()(tokens[:, None]),
            position_ids=position[None, :, None].expand(3, -1, 1),
            **with_cache(self._text, cache),
            shared_prefix=cache,
        )
        return self.model.get_output_embeddings()(output.last_hidden_state[:, -1])


def _cut(items: Sequence[T], cost: Callable[[Sequence[T]], int], limit: int) -> Iterator[list[T]]:
    """Yield parts of the items, in order, each of which costs at most `limit` where it has several."""
    part: list[T] = []
    for item in items:
        if part and cost([*part, item]) > limit:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors [R_i, K, P_i, D] into [sum R_i, K, max P_i, D], zero-padded at the end of P.

    States, which differ in R_i alone, get no padding.
    """
    longest = max(tensor.shape[2] for tensor in tensors)
    if all(tensor.shape[2] == longest for tensor in tensors):
        return torch.cat(list(tensors))
    return torch.cat([nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[2])) for tensor in tensors])
