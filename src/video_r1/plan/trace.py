"""Bytes of one update and of one prefill, counted without making the tensors (fake_trace.py).

Both run through the model's own transformers code and this project's head. On the general path
(models/general_forward.py) a row is a prompt and a completion, and the processor says how many tokens a clip
has. The tower is counted: a layer keeps 17 numbers a patch and hidden unit (arXiv 2205.05198, equation 2,
without attention scores, which kernels do not keep).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from video_r1.data.decoding.media import Media
from video_r1.data.manifests.records import Sample
from video_r1.data.prompts import Prompt, PromptBuilder
from video_r1.errors import ConfigError
from video_r1.models.families import family_of, find_family, text_of, tower_of, vision_parameters, with_cache
from video_r1.models.general_forward import micro_batches
from video_r1.models.group_forward import CHUNK_LOGITS, Scoring, token_logprobs, vision_language_model
from video_r1.models.loading import size_multiple
from video_r1.models.vision import tower_arguments
from video_r1.plan.fake_trace import Policy, Traced, build_models, count_weights, untrained, without_storage
from video_r1.plan.shapes import published_frame
from video_r1.rollout.episodes import NOTICE_TOKENS
from video_r1.settings.shared import PromptSettings
from video_r1.settings.tools import ToolSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings

NUMBERS_KEPT = 17  # by a tower's layer, for each patch and hidden unit
TURN_TOKENS = 64  # of a tool turn, besides frames and their times
QUESTION = Sample("plan", "?", "video", "free-form", "", "")


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one forward pass: `questions` prompts and their `completions` (SFT: one each)."""

    questions: int
    grid: tuple[int, int, int]  # patches of one question's clip: time, height, width
    visual: int  # tokens
    prompt: int  # tokens, including visual ones
    completions: int
    completion: int  # tokens
    patches: int  # of one question's frames
    repeated: bool = False  # the prompt is repeated for every completion, on the general path
    looks: int = 0  # of a completion, each of the largest size
    look_grid: tuple[int, int, int] = (1, 1, 1)
    returned: int = 0  # tokens that tools return to a completion

    @property
    def tokens(self) -> int:
        """Tokens of the row, without the last token of each completion, which predicts nothing."""
        prompts, answer = self.completions if self.repeated else 1, self.completion - 1 + self.returned
        return self.questions * (prompts * self.prompt + self.completions * answer)

    @property
    def looked(self) -> int:
        """Patches of the looks of one question's completions."""
        return self.completions * self.looks * math.prod(self.look_grid)


def longest_row(
    config: Any,
    frames: PromptSettings,
    training: TGRPOSettings | SFTSettings,
    text_tokens: int,
    processor: Any,
    tools: ToolSettings,
) -> Row:
    """Return the longest row that the settings allow: of an image or a video, whichever has more tokens."""
    grid, timestamps, family = (1, 1, 1), 0, find_family(config)
    if family is None:
        visual, patches = _general_visuals(config, frames, processor)
    else:
        vision = config.vision_config
        merge, side = vision.spatial_merge_size, vision.patch_size * vision.spatial_merge_size
        times = max(1, frames.max_frames // vision.temporal_patch_size)
        image, frame = frames.image_pixels // side**2, frames.frame_pixels // side**2
        times, squares = (times, frame) if times * frame >= image else (1, image)
        grid, visual, timestamps = (times, merge, merge * squares), times * squares, family.timestamp_tokens
        patches = visual * merge**2
    if visual >= frames.max_prompt_length:
        raise ConfigError(
            f"the frames of a clip are {visual} tokens, which max_prompt_length ({frames.max_prompt_length}) "
            "does not allow; lower max_frames, frame_pixels or image_pixels, or raise max_prompt_length"
        )
    prompt = min(visual + timestamps * grid[0] + text_tokens, frames.max_prompt_length)
    completions = (
        (training.num_generations, training.max_completion_length)
        if isinstance(training, TGRPOSettings)
        else (1, training.max_response_length)
    )
    questions = training.per_device_train_batch_size
    row = Row(questions, grid, visual, prompt, *completions, patches, repeated=family is None)
    if family is None or not tools.tools:
        return row
    look = max(1, tools.look.frames // vision.temporal_patch_size)
    square = (tools.look.pixels or frames.frame_pixels) // side**2
    one = look * (square + timestamps) + TURN_TOKENS
    returned, looks = tools.max_tool_tokens, min(tools.max_looks, math.ceil(tools.max_tool_tokens / one))
    returned = min(tools.max_looks * one, returned) + NOTICE_TOKENS
    return replace(row, looks=looks, look_grid=(look, merge, merge * square), returned=returned)


def _general_visuals(config: Any, frames: PromptSettings, processor: Any) -> tuple[int, int]:
    """Return the tokens and patches of the longest clip or image."""
    vision = config.vision_config
    if processor is None:
        tokens = published_frame(config.model_type)
        return frames.max_frames * tokens, frames.max_frames * (vision.image_size // vision.patch_size) ** 2
    builder = PromptBuilder(processor, max_prompt_length=2**30)
    multiple = size_multiple(processor)

    def built(count: int, pixels: int) -> Prompt:
        side = max(1, math.isqrt(pixels) // multiple) * multiple
        kind = "video" if count > 1 else "image"
        times = torch.arange(count, dtype=torch.float64)
        clip = Media(torch.zeros(count, 3, side, side, dtype=torch.uint8), times, float(count), kind)
        return builder.build(QUESTION, clip)

    shown = [built(frames.max_frames, frames.frame_pixels), built(1, frames.image_pixels)]
    longest = max(shown, key=lambda prompt: len(prompt.input_ids))
    blind = builder.build(QUESTION, longest.media, torch.empty(0, dtype=torch.long), "blind")
    features = longest.features.items()
    pixels = sum(value.numel() for name, value in features if name.startswith("pixel_values"))
    sides = [vision.patch_size] if isinstance(vision.patch_size, int) else list(vision.patch_size)
    times = getattr(vision, "temporal_patch_size", 1)
    times = times if isinstance(times, int) else times[0]
    return len(longest.input_ids) - len(blind.input_ids), pixels // (3 * sides[0] * sides[-1] * times)


def trace(config: PreTrainedConfig, policy: Policy, row: Row, sampled: int) -> Traced:
    model, judge = build_models(config, policy)
    inner, traced = vision_language_model(model), count_weights(model, policy)
    looks = row.questions * row.completions * row.looks
    visuals = [_tower_inputs(inner, row, *counts) for counts in ((row.questions, looks), (sampled, 0))]
    autocast = torch.autocast("cpu", dtype=policy.autocast, enabled=policy.autocast is not None)

    with without_storage(*{model, judge}, gradients_kept=policy.gradients_kept) as (mode, live):
        for inputs in visuals:
            inputs |= {k: mode.from_tensor(v) for k, v in inputs.items() if isinstance(v, Tensor)}
        if sampled:
            with live, torch.no_grad(), autocast:
                model.eval()
                found = _prefill(inner, row, sampled, visuals[1])
                traced.prompt_cache, traced.prompt_states, traced.prefill_copies = *found, live.live
            traced.prefill_peak = live.peak + traced.dequantised
            live.peak = live.live
        model.train()
        with live:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            if policy.training.gradient_accumulation_steps > 1:  # gradients of the passes before
                for weight in trained:
                    weight.grad = torch.empty_like(weight)
                    live.add_gradient(weight)
            else:
                for weight in trained:
                    weight.register_post_accumulate_grad_hook(live.add_gradient)
            features = None
            if not row.repeated and policy.settings.freeze_vision_tower:
                with torch.no_grad(), autocast:
                    features = _vision(inner, visuals[0])
            start = live.live
            with autocast:
                loss = _loss(inner, policy, row, visuals[0], features)
            traced.activations = live.live - start
            if policy.reference:
                with torch.no_grad(), autocast:
                    _loss(vision_language_model(judge), policy, row, visuals[0], features)
            loss.backward()
        traced.update_peak = live.peak + traced.dequantised
    if row.repeated:
        layer, tower = _tower_bytes(inner, policy, row)
        traced.activations += tower
        traced.update_peak += tower
        traced.prefill_peak += layer * bool(sampled)
    return traced


def trace_scoring(config: PreTrainedConfig, policy: Policy, row: Row) -> tuple[int, int, int]:
    """Return a frozen model's number of weights, their bytes, and the peak of one forward pass besides."""
    with torch.device("meta"):
        model: Any = untrained(config, policy).requires_grad_(False)
    count, size = (sum(map(of, model.parameters())) for of in (Tensor.numel, lambda weight: weight.nbytes))
    inner, looks = vision_language_model(model), row.questions * row.completions * row.looks
    visuals = _tower_inputs(inner, row, row.questions, looks)
    with without_storage(model, gradients_kept=1.0) as (mode, live):
        visuals |= {k: mode.from_tensor(v) for k, v in visuals.items() if isinstance(v, Tensor)}
        with live, torch.no_grad():
            _loss(inner, policy, row, visuals, None, with_entropy=False)
    return count, size, live.peak


def _tower_inputs(model: Any, row: Row, questions: int, looks: int) -> dict[str, Any]:
    if row.repeated or not questions:
        return {}
    grids = torch.tensor([row.grid] * questions + [row.look_grid] * looks)
    found = tower_arguments(family_of(model), tower_of(model), grids, torch.device("cpu"))
    return {**found, "grid_thw": grids}


def _vision(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the tower's output for all clips, and DeepStack features if there are any."""
    vision, tower = model.config.vision_config, tower_of(model)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.empty(len(inputs["position_ids"]), values)
    output = tower(pixels.to(tower.dtype), **inputs, return_dict=True)
    return (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))


def _embeddings(model: Any, rows: int, tokens: int, features: tuple[Tensor, ...]) -> Tensor:
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    embedded = model.get_input_embeddings()(ids)
    return embedded.masked_scatter((ids > 0)[..., None], features[0].to(embedded.dtype))


def _prefill(model: Any, row: Row, prompts: int, visuals: dict[str, Any]) -> tuple[int, ...]:
    """Run a forward of `prompts` prompts with a cache; return the bytes of its keys, values and states."""
    text = text_of(model)
    cache: Any = DynamicCache(config=text.config)
    if row.repeated:
        inputs: dict[str, Any] = {"input_ids": torch.zeros(prompts, row.prompt, dtype=torch.long)}
    else:
        inputs = {"inputs_embeds": _embeddings(model, prompts, row.prompt, _vision(model, visuals))}
        inputs["position_ids"] = torch.zeros(3, prompts, row.prompt, dtype=torch.long)
    states = text(**inputs, **with_cache(text, cache)).last_hidden_state
    model.get_output_embeddings()(states[:, -1])
    stateful = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    kept = [state for layer in stateful for state in (layer.conv_states[0], layer.recurrent_states[0])]
    pairs = [x for layer in cache.layers if layer not in stateful for x in (layer.keys, layer.values)]
    if torch.is_autocast_enabled("cpu"):  # keys and values are kept in the compute dtype
        pairs = [state.to(torch.get_autocast_dtype("cpu")) for state in pairs]
    return tuple(sum(tensor.untyped_storage().nbytes() for tensor in part) for part in (pairs, kept))


def _loss(
    model: Any,
    policy: Policy,
    row: Row,
    visuals: dict[str, Any],
    features: tuple[Tensor, ...] | None,
    with_entropy: bool = True,
) -> Tensor:
    """Return a loss of all completions of a row: of separate rows in micro-batches on the general path."""
    head, vocabulary = model.get_output_embeddings(), model.config.get_text_config().vocab_size
    chunk = CHUNK_LOGITS.get(policy.device_type, CHUNK_LOGITS["cuda"])
    # T-GRPO's update has the entropy, SFT and teachers the likeliest tokens
    rl = isinstance(policy.training, TGRPOSettings) and with_entropy

    def mean_of(head: nn.Module, hidden: Tensor, vocabulary: int) -> Tensor:
        targets = torch.zeros(len(hidden), dtype=torch.long)
        scoring = Scoring(entropy=rl, likeliest=not rl)
        return token_logprobs(head, hidden, targets, vocabulary, scoring, chunk).logprobs.mean()

    if not row.repeated:
        features = features or _vision(model, visuals)
        states = text_of(model)(
            inputs_embeds=_embeddings(model, 1, row.tokens, features),
            position_ids=torch.zeros(3, 1, row.tokens, dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        for layer in features[1:]:  # DeepStack features are kept and get a gradient
            states = states + 0 * layer.sum()
        tokens = torch.zeros(row.questions * row.completions * row.completion, dtype=torch.long)
        return mean_of(head, states[0][tokens], vocabulary)
    total: Any = 0
    for rows in list(micro_batches(row.prompt, [row.completion] * row.completions)) * row.questions:
        ids = torch.zeros(len(rows), row.prompt + row.completion - 1, dtype=torch.long)
        states = text_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = head(states[:, row.prompt - 1 :]).flatten(0, 1)
        total = total + mean_of(nn.Identity(), logits, head.weight.shape[0])
    return total


def _tower_bytes(model: Any, policy: Policy, row: Row) -> tuple[int, int]:
    """Return the activations of one layer of the tower for one question, and those of all that are kept: of
    every layer if the tower trains, with gradient checkpointing of one and the inputs of all.
    """
    vision = model.config.vision_config
    layer = NUMBERS_KEPT * (policy.autocast or policy.dtype).itemsize * row.patches * vision.hidden_size
    kept = row.questions * tower_depth(model.config) * layer
    if not any(weight.requires_grad for weight in vision_parameters(model)):
        return layer, layer
    if policy.training.gradient_checkpointing:
        return layer, kept // NUMBERS_KEPT + layer
    return layer, kept


def tower_depth(config: Any) -> int:
    vision = config.vision_config
    return int(getattr(vision, "depth", None) or vision.num_hidden_layers)
