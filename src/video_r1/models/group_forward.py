"""Log-probs of G completions at the cost of one prompt and G completions: the group in one row.

    vision tower, once a question ─► row [prompt, completion 1, …, completion G] of every question ─►
    head on the positions that predict completion tokens, in chunks

A token sees the same tokens and has the same position as in a sequence of its prompt and completion alone, so
values and gradients equal those of the expanded batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from video_r1.data.prompts import Prompt
from video_r1.errors import ConfigError, PromptError
from video_r1.models.attention import IMPLEMENTATION, RowLayout, replaced, row_layout
from video_r1.models.checked import works
from video_r1.models.families import check_kind, family_names, family_of, find_family, text_of, tower_of
from video_r1.models.gated_delta import forking_states
from video_r1.models.general_forward import Encoded, encode_prompts, general_scores
from video_r1.models.vision import attending_in_segments, encode_visuals
from video_r1.processes import process_count

Result = TypeVar("Result")
KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
"""Names of the features with the pixels of images and of videos, and with their grids."""
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}  # logits of one chunk of tokens; a CPU's fit its cache
LEAST_ROWS = 64  # tokens of a chunk at least: the backward pass adds a gradient of the head's size per chunk


class TokenScores(NamedTuple):
    """Scores of N given tokens; those besides the log-probs on request."""

    logprobs: Tensor  # [N] float32, nats
    entropy: Tensor | None = None  # [N] float32, nats, of each token's distribution
    likeliest: Tensor | None = None  # [N] bool, whether the token is the arg max


@dataclass(slots=True)
class GroupLogprobs:
    """TokenScores of all completion tokens of a batch of groups, in order."""

    logprobs: Tensor
    lengths: Tensor  # [completions] int64: logprobs.split(lengths.tolist()) are those of each completion
    entropy: Tensor | None = None
    likeliest: Tensor | None = None


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """The vision tower's output for one prompt."""

    embeddings: Tensor  # [V, d] in the order of the prompt's visual placeholders
    deepstack: tuple[Tensor, ...] = ()  # [V, d] each, added after the first decoder layers (Qwen3-VL)

    def permuted(self, patches: Tensor, grids: Tensor) -> VisionFeatures:
        """Return the features of a prompt that shows this prompt's temporal patches in another order.

        patches: [T'] int64, numbers of temporal patches, counted over all clips; grids: [clips, 3] int64 of
        this prompt's clips. The towers attend within one temporal patch, wherever it is in the clip.
        """
        sizes = (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0])
        lengths = (sizes * len(self.embeddings) // sizes.sum()).tolist()  # patches are merged

        def turned(features: Tensor) -> Tensor:
            parts = features.split(lengths)
            return torch.cat([parts[patch] for patch in patches.tolist()])

        return VisionFeatures(turned(self.embeddings), tuple(map(turned, self.deepstack)))


VisualFeatures = VisionFeatures | Encoded
"""Features of a known family, or of the general path."""
Pieces = Sequence[Tensor | Prompt]
"""Tokens that the policy sampled, and prompts with visuals, in the order of a sequence."""
Answers = Sequence[Sequence[Pieces]]
"""Completions of each question."""
Features = Sequence[VisualFeatures | None] | None
"""The tower's output of each prompt, None for a prompt without visuals; or not yet computed."""


def all_parts(prompts: Sequence[Prompt], pieces: Answers) -> list[Prompt]:
    """Return each question's prompt, followed by the tool turns of its completions."""
    return [
        part
        for prompt, group in zip(prompts, pieces, strict=True)
        for part in (prompt, *(piece for answer in group for piece in answer if isinstance(piece, Prompt)))
    ]


def group_logprobs(
    model: nn.Module,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],
    temperature: float = 1.0,
    with_entropy: bool = False,
    vision_features: Features = None,
    with_likeliest: bool = False,
    entropy_gradient: bool = False,
    pieces: Answers | None = None,
) -> GroupLogprobs:
    """Return the log-probs of every completion's tokens after its prompt.

    model: for conditional generation, also inside PEFT, DDP or FSDP; of no known family: see
    general_forward.py. With autocast, call within its context. `completions[q][g]`: token ids [L_qg] int64 of
    any lengths. vision_features: one a prompt from `encode_vision`, to share a frozen tower's output; by
    default the tower runs here. entropy_gradient: keep the entropy's gradient. `pieces[q][g]`: the completion
    with what tools returned (`Rollout.pieces`), whose features follow those of its prompt. Raises PromptError
    if placeholders and pixels do not match, and ConfigError if the model is no vision-language model.
    """
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} groups of completions")

    def forward() -> tuple[Tensor | None, ...]:  # FSDP finds no tensors in a record
        inner = vision_language_model(model)
        scoring = Scoring(temperature, with_entropy, with_likeliest, entropy_gradient)
        score = partial(token_logprobs, scoring=scoring)
        if not in_one_row(inner):
            if pieces is not None and len(all_parts(prompts, pieces)) > len(prompts):
                raise ConfigError(f"{type(inner).__name__}: tools need a model of {family_names()}")
            visuals: Any = vision_features or encode_prompts(inner, prompts)
            return tuple(_joined(general_scores(inner, prompts, completions, visuals, score)))
        answers = pieces or [[[tokens] for tokens in group] for group in completions]
        hidden = _predicting_states(inner, prompts, answers, vision_features)
        targets = torch.cat([tokens for group in completions for tokens in group]).to(hidden.device)
        vocabulary = inner.config.get_text_config().vocab_size
        return tuple(score(inner.get_output_embeddings(), hidden, targets, vocabulary=vocabulary))

    logprobs, entropy, likeliest = through_wrapper(model, forward)
    assert logprobs is not None
    lengths = torch.tensor([len(tokens) for group in completions for tokens in group], device=logprobs.device)
    return GroupLogprobs(logprobs, lengths, entropy, likeliest)


def encode_vision(model: nn.Module, prompts: Sequence[Prompt]) -> list[Any]:
    """Return each prompt's output of the vision tower, as VisualFeatures; None for a prompt without visuals.

    Gradients follow grad mode and whether the tower is frozen.
    """
    inner = vision_language_model(model)
    encode: Callable[..., Any] = visual_features if in_one_row(inner) else encode_prompts
    return through_wrapper(model, lambda: encode(inner, prompts))


def encode_groups(model: nn.Module, prompts: Sequence[Prompt], pieces: Answers) -> list[list[Any]]:
    """Return `encode_vision` of each question's prompt and of its completions' tool turns (`all_parts`)."""
    parts = [all_parts([prompt], [group]) for prompt, group in zip(prompts, pieces, strict=True)]
    found = iter(encode_vision(model, list(itertools.chain(*parts))))
    return [[next(found) for _ in own] for own in parts]


def visual_features(model: Any, prompts: Sequence[Prompt]) -> list[VisionFeatures | None]:
    """Do the work of `encode_vision` for an unwrapped transformers model of a known family.

    All visuals are one row, as each attends only to itself. All ranks of a sharded model have to make the
    same calls, so there is one call, not one for each kind of visual in the batch; a rank with text alone
    encodes one patch, of which no feature is used.
    """
    kinds = [next((kind for kind in KINDS if kind[0] in prompt.features), None) for prompt in prompts]
    shown = [(prompt.features, kind) for prompt, kind in zip(prompts, kinds, strict=True) if kind]
    if not shown:
        return [_nothing_seen(model) if process_count() > 1 else None, *[None] * (len(prompts) - 1)]
    pixels = torch.cat([features[name] for features, (name, _) in shown])
    grids = [features[name].cpu() for features, (_, name) in shown]
    output = encode_visuals(model, pixels, torch.cat(grids))
    layers = getattr(output, "deepstack_features", None) or []
    visuals, counts = zip(output.pooler_output, *layers, strict=True), map(len, grids)
    encoded: list[VisionFeatures | None] = []
    for kind in kinds:
        found = itertools.islice(visuals, next(counts)) if kind else ()
        parts = [torch.cat(part) for part in zip(*found, strict=True)]
        encoded.append(VisionFeatures(parts[0], tuple(parts[1:])) if parts else None)
    return encoded


def _small_image(model: Any, side: int) -> tuple[Tensor, Tensor]:
    """Return pixels and grid of an image of side x side visual tokens."""
    vision, weight = model.config.vision_config, next(tower_of(model).parameters())
    side *= vision.spatial_merge_size
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.linspace(-1, 1, side**2 * numbers, device=weight.device, dtype=weight.dtype)
    return pixels.view(side**2, numbers), torch.tensor([[1, side, side]])


def _nothing_seen(model: Any) -> VisionFeatures:
    """Return the features [0, d] of no visuals, with a gradient of 0 for the tower's weights."""
    output = encode_visuals(model, *_small_image(model, 1))
    layers = getattr(output, "deepstack_features", None) or []
    return VisionFeatures(output.pooler_output[0][:0], tuple(layer[0][:0] for layer in layers))


def _is_visual(config: Any, ids: Tensor) -> Tensor:
    return (ids == config.image_token_id) | (ids == config.video_token_id)


def vision_language_model(model: nn.Module) -> Any:
    """Return the transformers model inside DDP, FSDP, DeepSpeed and PEFT. Raises as `check_kind`."""
    inner = _inside(model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    check_kind(inner)
    return inner


def _inside(model: Any) -> Any:  # DDP, FSDP, DeepSpeed
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def prompt_positions(model: Any, prompt: Prompt) -> tuple[Tensor, int]:
    """Return a prompt's rotary positions [3, P] (time, height, width) and the position of the next token.

    As in `generate`, it follows the position of the last token. (Time positions of a video may be larger.)
    """
    if prompt.parts:
        return piece_positions(model, prompt.pieces)
    ids = prompt.input_ids[None].cpu()
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    grids = {name: prompt.features[name].cpu() for name in names if name in prompt.features}
    if not grids.keys() & set(names[:2]):
        return torch.arange(ids.shape[1]).expand(3, -1), ids.shape[1]
    kinds = prompt.features["mm_token_type_ids"].view(1, -1).cpu()
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
    return positions[:, 0], int(positions[:, 0, -1].max()) + 1


def piece_positions(model: Any, pieces: Pieces, start: int = 0) -> tuple[Tensor, int]:
    """Return the positions [3, S] of pieces that follow one another from `start`, and the next position."""
    parts = [torch.empty(3, 0, dtype=torch.long)]
    for piece in pieces:
        if isinstance(piece, Prompt):
            positions, length = prompt_positions(model, piece)
        else:
            positions, length = torch.arange(len(piece)).expand(3, -1), len(piece)
        parts.append(positions + start)
        start += length
    return torch.cat(parts, 1), start


@contextmanager
def attending_in_rows(model: nn.Module) -> Iterator[None]:
    """Let a model of a known family follow a row's layout inside; calls without a layout are as outside.

    `group_logprobs` enters it by itself. A backward pass with activation checkpointing runs layers again, so
    it has to be inside, too. model: also within PEFT, DDP or FSDP.
    """
    inner = vision_language_model(model)
    family, config = find_family(inner), text_of(inner).config
    with ExitStack() as changed:
        if family is not None and config._attn_implementation != IMPLEMENTATION:
            changed.enter_context(replaced(config, "_attn_implementation", IMPLEMENTATION))
            changed.enter_context(attending_in_segments(tower_of(inner)))
            if family.state_functions:
                changed.enter_context(forking_states(family.state_functions))
        yield


class Row(NamedTuple):
    """Inputs of the text model for a row of groups, and where completions start and end [G of each group]."""

    inputs: dict[str, Any]
    layout: RowLayout
    after: list[list[int]]  # the position that follows each completion


def row_of(model: Any, prompts: Sequence[Prompt], answers: Answers, vision_features: Features = None) -> Row:
    """Build the row of groups: every completion continues where its prompt ends.

    Raises ConfigError for a text model with sliding-window attention.
    """
    text = text_of(model)
    if "sliding_attention" in (getattr(text.config, "layer_types", None) or ()):
        raise ConfigError("the text layers use sliding-window attention; one row needs full attention")
    device = model.get_input_embeddings().weight.device
    ids, given, positions, after = [], [], [], []
    for prompt, group in zip(prompts, answers, strict=True):
        found, following = prompt_positions(model, prompt)
        positions.append(found)
        after.append([])
        for answer in group:
            found, end = piece_positions(model, answer, following)
            positions.append(found)
            after[-1].append(end)
        for piece in (prompt, *itertools.chain(*group)):
            is_given = isinstance(piece, Prompt)
            ids.append(piece.input_ids if is_given else piece)
            given.append(torch.full((len(ids[-1]),), is_given))
    row_ids, in_prompt = torch.cat(ids)[None].to(device), torch.cat(given)[None].to(device)
    lengths = [[sum(map(_length, answer)) for answer in group] for group in answers]
    kernel = text.config.linear_conv_kernel_dim if family_of(model).state_functions else None
    layout = row_layout([len(prompt.input_ids) for prompt in prompts], lengths, device, kernel)
    parts = all_parts(prompts, answers)
    features: Any = visual_features(model, parts) if vision_features is None else vision_features
    inputs = embedded(model, parts, features, row_ids, in_prompt)
    inputs["position_ids"] = torch.cat(positions, 1).to(device)[:, None]
    return Row({**inputs, "group_layout": layout}, layout, after)


def _length(piece: Tensor | Prompt) -> int:
    return len(piece.input_ids if isinstance(piece, Prompt) else piece)


def _predicting_states(
    model: Any, prompts: Sequence[Prompt], answers: Answers, vision_features: Features
) -> Tensor:
    """Return the last hidden states [N, d] at the positions that predict the policy's tokens."""
    inputs: list[list[Pieces]] = [
        [[*answer[:-1], cast(Tensor, answer[-1])[:-1]] for answer in group] for group in answers
    ]
    with attending_in_rows(model):
        row = row_of(model, prompts, inputs, vision_features)
        hidden = text_of(model)(**row.inputs, use_cache=False).last_hidden_state[0]
    return hidden[_predicting_positions(row.layout, answers).to(hidden.device)]


def embedded(
    model: Any,
    prompts: Sequence[Prompt],
    features: Sequence[VisionFeatures | None],
    ids: Tensor,
    in_prompt: Tensor,
) -> dict[str, Any]:
    """Return the text model's inputs for the token ids [B, S]: embeddings [B, S, d], and DeepStack features.

    in_prompt: [B, S] bool, the prompts' tokens, in the order of the prompts; their placeholders get visual
    features. One that the policy sampled keeps its plain embedding, as in generation. Raises PromptError if
    placeholders and features of a prompt differ in number.
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


def _predicting_positions(layout: RowLayout, answers: Answers) -> Tensor:
    """Return row indices [N] of the tokens that predict the policy's, each first one by the prompt's last."""
    parts = [torch.empty(0, dtype=torch.long)]
    for (_, ends), group in zip(layout.groups, answers, strict=True):
        for start, answer in zip(ends, group, strict=False):  # the last end starts nothing
            place, own = start - 1, []
            for piece in answer:
                if not isinstance(piece, Prompt):
                    own.append(torch.arange(place, place + len(piece)))
                place += _length(piece)
            predicting = torch.cat(own)
            if len(predicting):
                predicting[0] = ends[0] - 1
            parts.append(predicting)
    return torch.cat(parts)


def through_wrapper(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Run `function` as the forward pass of `model`, so that the hooks of DDP and FSDP run around it.

    Tensors with a gradient have to be the result, or elements of a tuple.
    """
    inner = _inside(model)
    replaced = inner.__dict__.get("forward")

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if replaced is not None:
            inner.forward = replaced

    def forward(*args: Any, **kwargs: Any) -> Result:
        restore()
        return function()

    inner.forward = forward
    try:
        return model(None)  # on a GPU, DDP moves the first argument there and fails without one
    finally:
        restore()


# ---- The choice of the path


def in_one_row(model: Any) -> bool:
    """Return whether a group of this transformers model is one row: it is of a known family, and a library
    newer than the tested ones has not broken the row. Otherwise it takes the general path.
    """
    return find_family(model) is not None and works("a group in one row", model, _by_row, _by_general_path)


def small_question(model: Any) -> tuple[Prompt, list[Tensor]]:
    """Return a question with an image of four tokens, and two answers, to compare paths with."""
    config = model.config
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    words = list(itertools.islice((n for n in itertools.count() if n not in special), 9))
    ids = torch.tensor([config.vision_start_token_id, *[config.image_token_id] * 4, *words[:4]])
    pixels, grid = _small_image(model, 2)
    kinds = (ids == config.image_token_id).long()[None]
    features = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    return Prompt(ids, features, (), None, []), [torch.tensor(words[4:7]), torch.tensor(words[7:])]


def _by_row(model: Any) -> Tensor:
    """Return the log-probs of `small_question`."""
    prompt, answers = small_question(model)
    hidden = _predicting_states(model, [prompt], [[[tokens] for tokens in answers]], None)
    return _of_tokens(model.get_output_embeddings()(hidden), torch.cat(answers))


def _by_general_path(model: Any) -> Tensor:
    prompt, answers = small_question(model)
    visuals = encode_prompts(model, [prompt])
    score: Any = lambda _, logits, targets, **names: _of_tokens(logits, targets)  # noqa: E731
    return torch.cat(list(general_scores(model, [prompt], [answers], visuals, score)))


def _of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None].to(logits.device))


# ---- The head


class Scoring(NamedTuple):
    """Temperature of the log-probs, further scores, and whether the entropy has a gradient (for a bonus)."""

    temperature: float = 1.0
    entropy: bool = False
    likeliest: bool = False
    entropy_gradient: bool = False


def token_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    scoring: Scoring,
    chunk_logits: int | None = None,
) -> TokenScores:
    """Return log softmax(head(hidden) / temperature) at `targets`, for hidden [N, d] and targets [N] int64.

    The logits exist one chunk at a time; the backward pass computes them again. chunk_logits: elements of one
    chunk (default: by the device); a chunk has at least LEAST_ROWS tokens.
    """
    if chunk_logits is None:
        chunk_logits = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cuda"])
    rows = max(LEAST_ROWS, chunk_logits // vocabulary)
    run: Any = _chunk
    if torch.is_grad_enabled():
        run = partial(checkpoint, _chunk, use_reentrant=False, preserve_rng_state=False)
    return _joined(
        run(head, states, tokens, scoring)
        for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True)
    )


def _joined(parts: Iterable[Any]) -> TokenScores:
    columns = zip(*parts, strict=True)
    joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
    return TokenScores(*joined)


def _chunk(
    head: Any, hidden: Tensor, targets: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(head, FSDPModule):  # its hooks expect one call a step, not one a chunk
        head.unshard()
        linear = cast(nn.Linear, head)
        logits = nn.functional.linear(hidden, linear.weight, linear.bias).float()
    else:
        logits = head(hidden).float()
    if scoring.temperature != 1.0:
        logits = logits / scoring.temperature
    scores = torch.log_softmax(logits, dim=-1)
    entropy = likeliest = None
    if scoring.entropy:
        values = scores if scoring.entropy_gradient else scores.detach()
        entropy = -(values.exp() * values).sum(-1)
    if scoring.likeliest:
        likeliest = scores.detach().argmax(-1) == targets
    return scores.gather(1, targets[:, None])[:, 0], entropy, likeliest
