"""The general path: any vision-language model of transformers, through its own forward.

    towers, once a question (`mm_encoder_outputs`; else once a row) ─► rows [prompt, completion] of a
    question, similar lengths together ─► logits that predict completion tokens (`logits_to_keep`)

The model itself computes positions and masks and places the features. The prompt is computed again for each
completion; families of families.py compute it once a question.

A model expects a visual for every placeholder, so completions must not contain any: these tokens have no
probability, neither here nor in sampling (rollout/general.py).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from video_r1.data.prompts import TOKEN_FEATURES, Prompt
from video_r1.models.head import TokenScores, token_logprobs

logger = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = 16384  # of the rows of one forward, including padding
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index")
NO_CHANCE = -1e9  # a logit; unlike −∞ it leaves entropies finite


@dataclass(frozen=True, slots=True)
class EncodedVisuals:
    """Output of a model's towers for one prompt, in the form that its forward takes.

    outputs: for "image" and "video" a tensor [visuals, tokens, d], or a list of tensors.
    """

    outputs: dict[str, Tensor | list[Tensor]]

    def of_rows(self, rows: int) -> dict[str, BaseModelOutputWithPooling]:
        """Return `mm_encoder_outputs` for this many rows with this prompt."""
        return {
            kind: BaseModelOutputWithPooling(pooler_output=_repeated(output, rows))  # pyright: ignore[reportArgumentType]
            for kind, output in self.outputs.items()
        }


def _repeated(visuals: Tensor | list[Tensor], rows: int) -> Tensor | list[Tensor]:
    if isinstance(visuals, Tensor):
        return visuals.repeat(rows, *[1] * (visuals.ndim - 1))
    return visuals * rows


def encode_prompts(model: Any, prompts: Sequence[Prompt]) -> list[EncodedVisuals | None]:
    """Return the towers' output for each prompt; None if the model's forward needs the pixels.

    model: a transformers model. Gradients follow grad mode and frozen weights.
    """
    warn_that_it_is_slower(type(model).__name__)
    return [_encoded(model, prompt) for prompt in prompts]


def _encoded(model: Any, prompt: Prompt) -> EncodedVisuals | None:
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return None
    outputs = {}
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
    return EncodedVisuals(outputs)


def prompt_inputs(
    model: Any, prompt: Prompt, visuals: EncodedVisuals | None, rows: int, longer: int = 0
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
    if visuals is not None and visuals.outputs:
        inputs["mm_encoder_outputs"] = visuals.of_rows(rows)
    return inputs


def _placed(model: Any, value: Tensor) -> Tensor:
    """Move a tensor to the model's device, and pixels to its number format."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def general_logprobs(
    model: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    temperature: float,
    visuals: Sequence[EncodedVisuals | None],
    with_entropy: bool,
    with_likeliest: bool,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Return scores [N] of all completion tokens in order; arguments as for `group_logprobs`.

    model: the transformers model without wrappers. visuals: from `encode_prompts`.
    """
    head = without_placeholders(model)
    parts: list[TokenScores] = []
    for prompt, group, encoded in zip(prompts, completions, visuals, strict=True):
        found: dict[int, TokenScores] = {}
        for rows in micro_batches(len(prompt.input_ids), [len(tokens) for tokens in group]):
            logits = _predicting_logits(model, prompt, [group[row] for row in rows], encoded)
            for row, of_row in zip(rows, logits, strict=True):
                targets = group[row].to(of_row.device)
                found[row] = token_logprobs(
                    head, of_row[: len(targets)], targets, temperature, with_entropy,
                    of_row.shape[-1], with_likeliest=with_likeliest, entropy_gradient=entropy_gradient,
                )  # fmt: skip
        parts += [found[row] for row in sorted(found)]
    logprobs, *others = zip(*parts, strict=True)
    return TokenScores(
        torch.cat(logprobs), *(None if column[0] is None else torch.cat(column) for column in others)
    )


def _predicting_logits(
    model: Any, prompt: Prompt, completions: Sequence[Tensor], visuals: EncodedVisuals | None
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
    """Yield the indices of the completions of each forward, longest first, without empty ones.

    prompt, lengths: tokens of the prompt and of each completion.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    while order:
        rows = max(1, MICRO_BATCH_TOKENS // (prompt + lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def placeholder_ids(config: Any) -> list[int]:
    """Return the ids of the placeholders of visuals and sounds."""
    ids = {getattr(config, name, None) for name in PLACEHOLDERS}
    return sorted(number for number in ids if isinstance(number, int))


def without_placeholders(model: Any) -> WithoutPlaceholders:
    size = model.get_output_embeddings().weight.shape[0]
    return WithoutPlaceholders([number for number in placeholder_ids(model.config) if number < size])


class WithoutPlaceholders(torch.nn.Module):
    """Layer that gives placeholders no chance in logits [..., V]."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = list(ids)

    def forward(self, logits: Tensor) -> Tensor:
        ids = torch.tensor(self.ids, device=logits.device)
        return logits.float().index_fill(-1, ids, NO_CHANCE)


@cache  # once a process
def warn_that_it_is_slower(name: str) -> None:
    logger.warning(
        "%s takes the general path: correct, but slower, as the prompt is computed again for each completion "
        "(docs/models.md)", name,
    )  # fmt: skip
