"""The group in one row: log-probabilities of G completions at the cost of one prompt plus G completions.

    vision tower, once a question ─► [prompt, completion 1, …, completion G] of every question, end to end ─►
    head on the positions that predict completion tokens, in chunks

What a token sees and which position it has are those of its completion standing alone behind its prompt, so
values and gradients equal those of the expanded batch, where pixels and prompt are repeated G times.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from video_r1.data.prompts import Prompt
from video_r1.errors import ConfigError, PromptError
from video_r1.models.attention import IMPLEMENTATION, row_layout
from video_r1.models.families import check_kind, family_of, find_family, text_of
from video_r1.models.gated_delta import fork_states
from video_r1.models.general_forward import EncodedVisuals, encode_prompts, general_logprobs
from video_r1.models.head import token_logprobs
from video_r1.models.vision import encode_visuals

Result = TypeVar("Result")
KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
"""The features that hold the pixels of images and of videos, and their grids."""


@dataclass(slots=True)
class GroupLogprobs:
    """Packed results of a batch of groups; torch.split(logprobs, lengths.tolist()) gives them by completion.

    `logprobs`: [N] float32, nats, all completion tokens of all groups in order. `lengths`: [completions]
    int64, tokens of each completion. Where asked for: `entropy` [N] float32, nats; `likeliest` [N] bool,
    whether the token is the arg max.
    """

    logprobs: Tensor
    lengths: Tensor
    entropy: Tensor | None = None
    likeliest: Tensor | None = None


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the vision tower makes of one prompt.

    `embeddings`: [V, d] in the order of the prompt's visual placeholders. `deepstack`: for models that have
    them (Qwen3-VL), features [V, d] that are added after the first decoder layers; else empty.
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def permuted(self, patches: Tensor, grids: Tensor) -> VisionFeatures:
        """Those of a prompt that shows the temporal patches of this one's clips in another order.

        patches: [T'] int64, by number, which counts on from clip to clip; grids: [clips, 3] int64 of this
        prompt's clips. The towers attend within one temporal patch (their `cu_seqlens`), and nothing in them
        depends on its place in the clip.
        """
        sizes = (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0])
        lengths = (sizes * len(self.embeddings) // sizes.sum()).tolist()  # a merged patch is some of these

        def turned(features: Tensor) -> Tensor:
            parts = features.split(lengths)
            return torch.cat([parts[patch] for patch in patches.tolist()])

        return VisionFeatures(turned(self.embeddings), tuple(map(turned, self.deepstack)))


VisualFeatures = VisionFeatures | EncodedVisuals
"""Of a known family, or of the general path."""


def group_logprobs(
    model: nn.Module,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    temperature: float = 1.0,
    with_entropy: bool = False,
    vision_features: Sequence[VisualFeatures | None] | None = None,
    with_likeliest: bool = False,
    entropy_gradient: bool = False,
) -> GroupLogprobs:
    """Log-probabilities of every completion's tokens behind its prompt.

    model: for conditional generation, also inside PEFT, DDP or FSDP. A known family (families.py) has its
    text attention is set to "video_r1_groups", which outside of this function is transformers' SDPA; others
    take the general path (general_forward.py). With autocast, call within its context. `completions[q][g]`:
    token ids [L_qg] int64 of any lengths. vision_features: from `encode_vision`, one a prompt, to share a
    frozen tower's output; else it runs here. entropy_gradient: the entropy has one too. Raises PromptError
    when a prompt's placeholders and its pixels do not match, ConfigError for no vision-language model.
    """
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} groups of completions")

    def forward() -> tuple[Tensor | None, ...]:  # FSDP finds no tensors in a record
        inner = vision_language_model(model)
        if find_family(inner) is None:
            visuals: Any = vision_features or encode_prompts(inner, prompts)
            flags = (with_entropy, with_likeliest, entropy_gradient)
            return tuple(general_logprobs(inner, prompts, completions, temperature, visuals, *flags))
        hidden = _predicting_states(inner, prompts, completions, vision_features)
        targets = torch.cat([tokens for group in completions for tokens in group]).to(hidden.device)
        vocabulary = inner.config.get_text_config().vocab_size
        head = inner.get_output_embeddings()
        scores = token_logprobs(
            head, hidden, targets, temperature, with_entropy, vocabulary,
            with_likeliest=with_likeliest, entropy_gradient=entropy_gradient,
        )  # fmt: skip
        return tuple(scores)

    logprobs, entropy, likeliest = through_wrapper(model, forward)
    assert logprobs is not None
    lengths = torch.tensor([len(tokens) for group in completions for tokens in group], device=logprobs.device)
    return GroupLogprobs(logprobs, lengths, entropy, likeliest)


def encode_vision(model: nn.Module, prompts: Sequence[Prompt]) -> list[Any]:
    """The vision tower's output for each prompt, as VisualFeatures; None for a prompt without visuals.

    It is called once, for images and videos together (on the general path for each prompt). Gradients follow
    grad mode and whether it is frozen.
    """
    inner = vision_language_model(model)
    encode: Callable[..., Any] = encode_prompts if find_family(inner) is None else visual_features
    return through_wrapper(model, lambda: encode(inner, prompts))


def visual_features(model: Any, prompts: Sequence[Prompt]) -> list[VisionFeatures | None]:
    """As `encode_vision`, for the transformers model within the wrappers, of a known family, here and now.

    Each visual attends to itself alone, so that all may stand in one row. One call, and not one for each kind
    that a batch happens to have, is what all processes of a sharded model make alike.
    """
    names = [[kind for kind in KINDS if kind[0] in prompt.features] for prompt in prompts]
    if not any(names):
        return [None] * len(prompts)
    having = [(prompt.features, kind) for prompt, kinds in zip(prompts, names, strict=True) for kind in kinds]
    pixels = torch.cat([features[name] for features, (name, _) in having])
    grids = torch.cat([features[name] for features, (_, name) in having]).cpu()
    output = encode_visuals(model, pixels, grids)
    layers = getattr(output, "deepstack_features", None) or []
    visuals = zip(output.pooler_output, *layers, strict=True)
    encoded: list[VisionFeatures | None] = []
    for prompt, kinds in zip(prompts, names, strict=True):
        if not kinds:
            encoded.append(None)
            continue
        count = sum(len(prompt.features[grid]) for _, grid in kinds)
        found = list(itertools.islice(visuals, count))
        parts = [torch.cat(part) for part in zip(*found, strict=True)]
        if len(kinds) > 1:  # its images come first, wherever they stand in the prompt
            visual = prompt.input_ids[_is_visual(model.config, prompt.input_ids)]
            is_video = visual == model.config.video_token_id
            images = sum(len(image) for image, *_ in found[: len(prompt.features[kinds[0][1]])])
            if (len(visual), int(is_video.sum())) != (len(parts[0]), len(parts[0]) - images):
                raise PromptError("the placeholders of images and videos are not as many as their features")
            order = torch.argsort(torch.argsort(is_video.int(), stable=True)).to(parts[0].device)
            parts = [part[order] for part in parts]
        encoded.append(VisionFeatures(parts[0], tuple(parts[1:])))
    return encoded


def _is_visual(config: Any, ids: Tensor) -> Tensor:
    """Which tokens are placeholders of images or videos."""
    return (ids == config.image_token_id) | (ids == config.video_token_id)


def vision_language_model(model: nn.Module) -> Any:
    """The transformers model inside DDP, FSDP, DeepSpeed and PEFT. Raises ConfigError (see `check_kind`)."""
    inner = _inside(model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    check_kind(inner)
    return inner


def _inside(model: Any) -> Any:
    """The model inside DDP, FSDP and DeepSpeed."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def prompt_positions(model: Any, prompt: Prompt) -> tuple[Tensor, int]:
    """Rotary positions [3, P] (time, height, width) of a prompt, and the position of the token after it.

    Both are what `forward` and `generate` use for a sequence alone: text after the prompt counts on from its
    last token. (A video's time positions may reach beyond that.)
    """
    ids = prompt.input_ids[None].cpu()
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    grids = {name: prompt.features[name].cpu() for name in names if name in prompt.features}
    if not grids.keys() & set(names[:2]):
        return torch.arange(ids.shape[1]).expand(3, -1), ids.shape[1]
    kinds = prompt.features.get("mm_token_type_ids")
    if kinds is None:
        kinds = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds.view(1, -1).cpu(), **grids)
    return positions[:, 0], int(positions[:, 0, -1].max()) + 1


def _predicting_states(
    model: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    vision_features: Sequence[VisualFeatures | None] | None,
) -> Tensor:
    """The last hidden states [N, d] at the positions that predict completion tokens."""
    text = text_of(model)
    if "sliding_attention" in (getattr(text.config, "layer_types", None) or ()):
        raise ConfigError("the text layers use sliding-window attention; one row needs full attention")
    text.config._attn_implementation = IMPLEMENTATION
    device = model.get_input_embeddings().weight.device

    inputs = [[tokens[:-1] for tokens in group] for group in completions]
    row_ids = torch.cat([t for p, group in zip(prompts, inputs, strict=True) for t in (p.input_ids, *group)])
    row_ids = row_ids.to(device)
    lengths = [len(prompt.input_ids) for prompt in prompts], [[len(t) for t in group] for group in inputs]
    kernel = None
    if states := family_of(model).state_functions:
        fork_states(states)
        kernel = text.config.linear_conv_kernel_dim
    layout = row_layout(*lengths, device, kernel)
    in_prompt = torch.zeros(1, len(row_ids), dtype=torch.bool)
    for span in layout.groups:
        in_prompt[0, span.start : span.prompt_end] = True
    features: Any = visual_features(model, prompts) if vision_features is None else vision_features
    hidden = text(
        **embedded(model, prompts, features, row_ids[None], in_prompt.to(device)),
        position_ids=_row_positions(model, prompts, inputs).to(device)[:, None],
        use_cache=False,
        group_layout=layout,
    ).last_hidden_state[0]

    return hidden[_predicting_positions(prompts, completions).to(device)]


def embedded(
    model: Any,
    prompts: Sequence[Prompt],
    features: Sequence[VisionFeatures | None],
    ids: Tensor,
    in_prompt: Tensor,
) -> dict[str, Any]:
    """What the text model takes in place of the token ids [B, S]: embeddings [B, S, d] with the prompts'
    visual features in their places, and what is added after its first layers.

    in_prompt: [B, S] bool, the prompts' tokens, in the order of the prompts. A placeholder id that the policy
    sampled keeps its plain embedding, as in generation. Raises PromptError when placeholders and features of
    a prompt differ in number.
    """
    embeddings = model.get_input_embeddings()(ids)
    present = [part for part in features if part is not None]
    for number, (prompt, part) in enumerate(zip(prompts, features, strict=True)):
        expected = int(_is_visual(model.config, prompt.input_ids).sum())
        found = 0 if part is None else len(part.embeddings)
        if expected != found:
            raise PromptError(f"prompt {number}: {expected} visual placeholders but {found} visual features")
    if not present:
        return {"inputs_embeds": embeddings}
    visual = torch.cat([part.embeddings for part in present]).to(embeddings)
    places = _is_visual(model.config, ids) & in_prompt
    result: dict[str, Any] = {"inputs_embeds": embeddings.masked_scatter(places[..., None], visual)}
    layers = [torch.cat(parts) for parts in zip(*(part.deepstack for part in present), strict=True)]
    if layers:
        result |= {"visual_pos_masks": places, "deepstack_visual_embeds": layers}
    return result


def _row_positions(model: Any, prompts: Sequence[Prompt], inputs: Sequence[Sequence[Tensor]]) -> Tensor:
    """Rotary positions [3, N] of the row: every completion continues where its prompt ends."""
    parts = []
    for prompt, group in zip(prompts, inputs, strict=True):
        positions, after = prompt_positions(model, prompt)
        parts.append(positions)
        parts += [torch.arange(after, after + len(tokens)).expand(3, -1) for tokens in group]
    return torch.cat(parts, dim=1)


def _predicting_positions(prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]) -> Tensor:
    """[N] row indices of the tokens that predict completion tokens; the prompt's last predicts each first."""
    parts = []
    position = 0
    for prompt, group in zip(prompts, completions, strict=True):
        position += len(prompt.input_ids)
        last_of_prompt = torch.tensor([position - 1])
        for tokens in group:
            if len(tokens):
                end = position + len(tokens) - 1
                parts += [last_of_prompt, torch.arange(position, end)]
                position = end
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def through_wrapper(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Run `function` as the forward pass of `model`, so that DDP's and FSDP's hooks work around it.

    Tensors with a gradient have to be the result, or in a tuple of it.
    """
    inner = _inside(model)
    replaced = inner.__dict__.get("forward")

    def restore() -> None:
        if replaced is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = replaced

    def forward(*args: Any, **kwargs: Any) -> Result:
        restore()
        return function()

    inner.forward = forward
    try:
        return model(None)  # on a GPU, DDP moves the first argument there and fails where there is none
    finally:
        restore()
