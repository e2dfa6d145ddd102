"""The general path: any vision-language model of transformers, through its own forward.

    towers, once a question (`mm_encoder_outputs`; else once a row) ─► rows [prompt, completion] of a
    question, similar lengths together ─► logits that predict completion tokens (`logits_to_keep`)

Positions, masks and where features stand are the model's own doing. Each completion costs its prompt once
more, which families of families.py have once a question.

A model looks for a visual behind every placeholder that it is given, so a completion must have none: these
tokens have no probability, neither here nor where completions are sampled (rollout/general.py).
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

MICRO_BATCH_TOKENS = 16384  # of the rows of one forward, padding included
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index")
NO_CHANCE = -1e9  # a logit; unlike −∞ it leaves entropies finite


@dataclass(frozen=True, slots=True)
class EncodedVisuals:
    """What a model's towers make of one prompt, as its forward takes it back.

    outputs: by "image" and "video", of its visuals: a tensor [visuals, tokens, d], or a tensor for each.
    """

    outputs: dict[str, Tensor | list[Tensor]]

    def of_rows(self, rows: int) -> dict[str, BaseModelOutputWithPooling]:
        """`mm_encoder_outputs` of that many rows with this prompt."""
        return {
            kind: BaseModelOutputWithPooling(pooler_output=_repeated(output, rows))  # pyright: ignore[reportArgumentType]
            for kind, output in self.outputs.items()
        }


def _repeated(visuals: Tensor | list[Tensor], rows: int) -> Tensor | list[Tensor]:
    if isinstance(visuals, Tensor):
        return visuals.repeat(rows, *[1] * (visuals.ndim - 1))
    return visuals * rows


def encode_prompts(model: Any, prompts: Sequence[Prompt]) -> list[EncodedVisuals | None]:
    """The towers' output for each prompt; None where the model's forward has to be given the pixels.

    model: of transformers. Gradients follow grad mode and what is frozen.
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
        if made != {"pooler_output"}:  # a Q-Former's, or features for several layers
            return None
        features = output.pooler_output
        outputs[kind] = features if isinstance(features, Tensor) else list(features)
    return EncodedVisuals(outputs)


def prompt_inputs(
    model: Any, prompt: Prompt, visuals: EncodedVisuals | None, rows: int, longer: int = 0
) -> dict[str, Any]:
    """What forward and `generate` take besides ids and mask for `rows` rows that begin with this prompt.

    visuals: of `encode_prompts`. longer: tokens by which the rows are longer than the prompt.
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
    """On the model's device; pixels in its number format."""
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
    """Scores [N] of all completion tokens in their order; arguments as `group_logprobs` has them.

    model: the transformers model within its wrappers. visuals: of `encode_prompts`.
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
    """[rows, L, V]: of the prompt's last token and of all of the longest completion's but its last."""
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
    """The completions, by number, of each forward: the longest ones first; empty ones in none.

    prompt, lengths: tokens of the prompt and of each completion.
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    while order:
        rows = max(1, MICRO_BATCH_TOKENS // (prompt + lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def placeholder_ids(config: Any) -> list[int]:
    """The tokens behind which a model looks for a visual or a sound."""
    ids = {getattr(config, name, None) for name in PLACEHOLDERS}
    return sorted(number for number in ids if isinstance(number, int))


def without_placeholders(model: Any) -> WithoutPlaceholders:
    size = model.get_output_embeddings().weight.shape[0]
    return WithoutPlaceholders([number for number in placeholder_ids(model.config) if number < size])


class WithoutPlaceholders(torch.nn.Module):
    """Logits [..., V], in which placeholders have no chance."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = list(ids)

    def forward(self, logits: Tensor) -> Tensor:
        ids = torch.tensor(self.ids, device=logits.device)
        return logits.float().index_fill(-1, ids, NO_CHANCE)


@cache
def warn_that_it_is_slower(name: str) -> None:
    """Once in a process."""
    logger.warning(
        "%s takes the general path: right, but slower, as every completion is read with its prompt "
        "(docs/models.md)", name,
    )  # fmt: skip
