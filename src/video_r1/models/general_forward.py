"""The general path: any vision-language model of transformers, through its own forward.

    towers, once a question (`mm_encoder_outputs`; else once a row) ─► rows [prompt, completion] of a
    question, similar lengths together ─► logits that predict completion tokens (`logits_to_keep`)

The model itself computes positions and masks and places the features. The prompt is computed again for each
completion. A model expects a visual for every placeholder, so completions must not contain any: these tokens
have no probability, neither here nor in sampling (rollout/general.py).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from video_r1.data.prompts import TOKEN_FEATURES, Prompt

MICRO_BATCH_TOKENS = 16384  # of the rows of one forward, including padding
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index")
NO_CHANCE = -1e9  # a logit; unlike −∞ it leaves entropies finite


Encoded = dict[str, Tensor | list[Tensor]]
"""A model's tower output for one prompt: "image" and "video" → [visuals, tokens, d], or a list of tensors."""


def encode_prompts(model: Any, prompts: Sequence[Prompt]) -> list[Encoded | None]:
    """Return the towers' output for each prompt; None if the model's forward needs the pixels."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return [None] * len(prompts)
    return [_encoded(model, prompt) for prompt in prompts]


def _encoded(model: Any, prompt: Prompt) -> Encoded | None:
    outputs: Encoded = {}
    for kind in ("image", "video"):
        encoder = getattr(model.base_model, f"get_{kind}_features", None)
        names = () if encoder is None else inspect.signature(encoder).parameters
        given = {name: _placed(model, prompt.features[name]) for name in names if name in prompt.features}
        if encoder is None or not any(name.startswith("pixel_values") for name in given):
            continue
        output = encoder(**given, return_dict=True)
        made = output.keys() - {"last_hidden_state", "hidden_states", "attentions"}
        if made != {"pooler_output"}:  # of a Q-Former, or for several layers
            return None
        features = output.pooler_output
        outputs[kind] = features if isinstance(features, Tensor) else list(features)
    return outputs


def prompt_inputs(
    model: Any, prompt: Prompt, visuals: Encoded | None, rows: int, longer: int = 0
) -> dict[str, Any]:
    """Return the inputs besides ids and mask of forward and `generate` for `rows` rows with this prompt.

    visuals: from `encode_prompts`. longer: tokens by which the rows are longer than the prompt.
    """
    inputs: dict[str, Any] = {}
    for name, value in prompt.features.items():
        if name in TOKEN_FEATURES:
            kinds = functional.pad(_placed(model, value), (0, longer))
            inputs[name] = kinds.expand(rows, -1)
        elif visuals is None or not name.startswith("pixel_"):
            inputs[name] = _repeated(_placed(model, value), rows)
    if visuals:
        inputs["mm_encoder_outputs"] = {
            kind: BaseModelOutputWithPooling(pooler_output=_repeated(output, rows))  # pyright: ignore[reportArgumentType]
            for kind, output in visuals.items()
        }
    return inputs


def _repeated(visuals: Tensor | list[Tensor], rows: int) -> Tensor | list[Tensor]:
    if isinstance(visuals, Tensor):
        return visuals.repeat(rows, *[1] * (visuals.ndim - 1))
    return visuals * rows


def _placed(model: Any, value: Tensor) -> Tensor:
    """Move a tensor to the model's device, and pixels to its number format."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def general_scores(
    model: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    visuals: Sequence[Encoded | None],
    score: Callable[..., Any],
) -> Iterator[Any]:
    """Yield the scores of each non-empty completion's tokens in order; arguments as for `group_logprobs`.

    model: the transformers model without wrappers. visuals: from `encode_prompts`. score: `token_logprobs`
    with its settings.
    """
    head = without_placeholders(model)
    for prompt, group, encoded in zip(prompts, completions, visuals, strict=True):
        found = {}
        for rows in micro_batches(len(prompt.input_ids), [len(tokens) for tokens in group]):
            logits = _predicting_logits(model, prompt, [group[row] for row in rows], encoded)
            for row, of_row in zip(rows, logits, strict=True):
                targets = group[row].to(of_row.device)
                found[row] = score(head, of_row[: len(targets)], targets, vocabulary=of_row.shape[-1])
        yield from (found[row] for row in sorted(found))


def _predicting_logits(
    model: Any, prompt: Prompt, completions: Sequence[Tensor], visuals: Encoded | None
) -> Tensor:
    """Return the logits [rows, L, V] that predict completion tokens, L of the longest completion."""
    length = len(prompt.input_ids)
    rows = [torch.cat([prompt.input_ids, tokens[:-1].to(prompt.input_ids)]) for tokens in completions]
    ids = pad_sequence(rows, batch_first=True, padding_value=int(prompt.input_ids[-1])).to(model.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    kept = places[length - 1 :]
    chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(
        input_ids=ids,
        attention_mask=(places < lengths[:, None]).long(),
        use_cache=False,
        return_dict=True,
        **prompt_inputs(model, prompt, visuals, len(rows), ids.shape[1] - length),
        **({"logits_to_keep": kept} if chooses else {}),
    ).logits
    return logits if chooses else logits[:, kept]


def micro_batches(prompt: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of the completions of each forward, by their tokens: longest first, no empty ones."""
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    while order:
        rows = max(1, MICRO_BATCH_TOKENS // (prompt + lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def placeholder_ids(config: Any) -> list[int]:
    """Return the ids of the placeholders of visuals and sounds."""
    ids = {getattr(config, name, None) for name in PLACEHOLDERS}
    return sorted(number for number in ids if isinstance(number, int))


def without_placeholders(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function of logits [..., V] that gives placeholders no chance."""
    size = model.get_output_embeddings().weight.shape[0]
    ids = torch.tensor([n for n in placeholder_ids(model.config) if n < size], dtype=torch.long)
    return lambda logits: logits.float().index_fill(-1, ids.to(logits.device), NO_CHANCE)
