"""What a recipe needs of a GPU's memory, before any weights are loaded: `video-r1 plan RECIPE`.

The update and the prefill are traced without storage (memory_trace.py); weights, gradients, optimizer and the
keys and values of the completions are counted, and so is what FSDP2 and ZeRO-3 gather: all weights while
processes sample, layers in an update. Not counted: the CUDA context and the allocator's unused blocks (1 to 2
GB on common GPUs, for which a limit in GB, not GiB, leaves room), and the pixels of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from video_r1.errors import ConfigError, first_line
from video_r1.models.loading import checked_source, lora_options
from video_r1.models.onednn import LEAST_PRODUCTS, MOST_ARRANGED_BYTES
from video_r1.plan.sharding import Sharding, sharding_of
from video_r1.plan.trace import Policy, Row, Traced, trace
from video_r1.recipe import Recipe, read_recipe
from video_r1.rollout.shared_prefix import FIRST_CAPACITY
from video_r1.rollout.transformers import MAX_PREFILL_TOKENS, MAX_SEQUENCES
from video_r1.settings.base import own_field_types
from video_r1.settings.commands import PlanSettings, parse_bytes
from video_r1.settings.shared import ModelSettings, PromptSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings

ADAM_STATES = 2
TIMESTAMP_TOKENS = 10  # Qwen3-VL writes a time and two marks before every temporal patch
FSDP_LAYERS = 3  # one at work, the next one as it arrives and in its place
SAMPLING_COPIES = 4  # [completions, vocabulary] float32: logits, log-probs, probabilities, their sums


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Tokens of a question, and bytes on one GPU.

    `parts`: weights, gradients, optimizer, reference, gathered (weights of other processes), activations
    (kept for the backward pass), logits, KV cache, vLLM; not all of them are there at once. `phases`: the
    most that is there while sampling (rollout), in the passes forward and back (update) and in the optimizer
    step.
    """

    stage: str
    model: str
    sharding: Sharding
    parameters: int
    trainable: int
    visual_tokens: int
    prompt_tokens: int
    completion_tokens: int  # of one completion or response, at most
    completions: int  # trained on, a question
    row_tokens: int  # of one forward and backward pass
    parts: dict[str, int]
    phases: dict[str, int]
    gpu_memory: int | None = None

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool | None:
        """None when the GPU is not known."""
        return None if self.gpu_memory is None else self.peak <= self.gpu_memory


def memory_plan(
    config: PreTrainedConfig,
    recipe: Recipe,
    *,
    gpu_memory: int | None = None,
    sharding: Sharding | None = None,
    text_tokens: int = 300,
    device_type: str = "cuda",
) -> MemoryPlan:
    """The plan of an `rl` or `sft` recipe (`load_recipe("rl", …)`) for a model of this config.

    Lengths are the longest that the recipe allows: frames at their budget, completions at their limit.
    gpu_memory: bytes. sharding: default what the recipe's TrainingArguments say, for one process. Raises
    ConfigError when the frames of a clip alone exceed max_prompt_length.
    """
    if sharding is None:
        sharding = sharding_of(recipe.training)
    settings = recipe.section(ModelSettings)
    training = recipe.section(TGRPOSettings if recipe.command == "rl" else SFTSettings)
    row = _row(config, recipe, training, text_tokens)
    dtype, autocast = _number_formats(config, settings, training, sharding, device_type)
    passes = training.gradient_accumulation_steps
    policy = Policy(
        dtype=autocast if sharding.fsdp and autocast else dtype,
        autocast=autocast,
        device_type=device_type,
        freeze_vision=settings.freeze_vision_tower,
        checkpointing=training.gradient_checkpointing,
        reference=isinstance(training, TGRPOSettings) and training.beta != 0,
        lora=lora_options(settings) if settings.use_peft else None,
        four_bits=_product_format(device_type) if settings.load_in_4bit else None,
        gradients_kept=_gradients_kept(sharding, passes, autocast is not None),
    )
    prefill, sequences = None, 0
    if isinstance(training, TGRPOSettings):
        questions = training.per_device_train_batch_size * training.gradient_accumulation_steps
        prompts = questions * (2 if training.shuffled_generations else 1)
        sequences = questions * (training.num_generations + training.shuffled_generations)
        if not recipe.values().get("use_vllm"):
            rows = max(1, min(prompts, MAX_PREFILL_TOKENS // row.prompt))
            prefill = Row(rows, row.grid, row.prompt, 1, 1)
    traced = trace(config, policy, row, prefill, passes)
    if device_type == "cpu" and dtype == torch.float32 and autocast is None:
        arranged = 4 * sum(size for size in traced.text_linear if sequences * size >= LEAST_PRODUCTS)
        arranged = arranged if arranged <= MOST_ARRANGED_BYTES else 0  # oneDNN's copies, while sampling
        traced.prefill_copies += arranged
        traced.prefill_peak += arranged
    values = recipe.values()
    in_this_process = values.get("use_vllm") and values.get("vllm_mode", "colocate") == "colocate"
    vllm = int((gpu_memory or 0) * values.get("vllm_gpu_memory_utilization", 0.3)) if in_this_process else 0
    stored = dtype.itemsize // policy.dtype.itemsize  # bytes of a share for each byte that is traced
    weights = int(traced.weights * stored * sharding.share(sharding.weights))
    optimizer = _optimizer_bytes(str(values.get("optim", "")), traced, stored, sharding)
    gathered = _gathered(traced, sharding, policy)
    cache = (0, 0) if prefill is None else _kv_cache(traced, prefill, row, prompts, sequences)
    parts = {
        "weights": weights,
        "gradients": int(traced.gradients * stored * sharding.share(sharding.gradients)),
        "optimizer": 0 if sharding.offload else int(optimizer * sharding.share(sharding.optimizer)),
        # of adapters, a whole copy in every process
        "reference": policy.reference * (weights if policy.lora is None else traced.gradients * stored),
        "gathered": max(gathered.values()),
        "activations": traced.activations,
        "logits": traced.logits,
        "KV cache": sum(cache),
        "vLLM": vllm,
    }
    sampled = SAMPLING_COPIES * 4 * min(sequences, MAX_SEQUENCES) * config.get_text_config().vocab_size
    sleeps = bool(values.get("vllm_enable_sleep_mode"))
    return MemoryPlan(
        stage=recipe.command,
        model=str(settings.model_name_or_path),
        sharding=sharding,
        parameters=traced.parameters,
        trainable=traced.trainable,
        visual_tokens=math.prod(row.grid) // config.vision_config.spatial_merge_size**2,
        prompt_tokens=row.prompt,
        completion_tokens=row.completion,
        completions=row.completions,
        row_tokens=math.prod(row.shape),
        parts=parts,
        phases=_phases(
            parts,
            gathered,
            traced,
            sharding,
            None if prefill is None else _rollout(traced, cache, sampled),
            sleeps,
        ),
        gpu_memory=gpu_memory,
    )


def _row(config: Any, recipe: Recipe, training: TGRPOSettings | SFTSettings, text_tokens: int) -> Row:
    """The longest forward pass that the settings allow, for an image or a video: the one with more tokens."""
    vision, frames = config.vision_config, recipe.section(PromptSettings)
    side = vision.patch_size * vision.spatial_merge_size
    times = max(1, frames.max_frames // vision.temporal_patch_size)
    video, image = times * (frames.frame_pixels // side**2), frames.image_pixels // side**2
    squares = video // times if video >= image else image
    grid = times if video >= image else 1, vision.spatial_merge_size, vision.spatial_merge_size * squares
    visual = max(video, image)
    if visual >= frames.max_prompt_length:
        raise ConfigError(
            f"the frames of a clip are {visual} tokens, which max_prompt_length ({frames.max_prompt_length}) "
            "does not allow; lower max_frames, frame_pixels or image_pixels, or raise max_prompt_length"
        )
    marks = TIMESTAMP_TOKENS * grid[0] if config.model_type.startswith("qwen3") else 0
    prompt = min(visual + marks + text_tokens, frames.max_prompt_length)
    rl = isinstance(training, TGRPOSettings)
    return Row(
        questions=training.per_device_train_batch_size,
        grid=grid,
        prompt=prompt,
        completions=training.num_generations if rl else 1,
        completion=training.max_completion_length if rl else training.max_response_length,
        with_entropy=rl,
    )


def _number_formats(
    config: Any, settings: ModelSettings, training: Any, sharding: Sharding, device_type: str
) -> tuple[torch.dtype, torch.dtype | None]:
    """The weights' dtype, and that of mixed precision or None."""
    named = config.dtype if settings.dtype == "auto" else settings.dtype
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named or "float32"))
    mixed = training.bf16 if training.bf16 is not None else device_type == "cuda"
    if mixed and sharding.master:  # DeepSpeed turns the weights themselves into bf16
        return torch.bfloat16, None
    return dtype, torch.bfloat16 if mixed and dtype == torch.float32 else None


def _product_format(device_type: str) -> torch.dtype:
    """In which 4-bit weights are multiplied; as in `four_bits`."""
    return torch.bfloat16 if device_type == "cuda" else torch.float32


def _optimizer_bytes(name: str, traced: Traced, stored: int, sharding: Sharding) -> int:
    """Bytes of the optimizer's states. AdamW has those of 32 bits in the number format of what it trains."""
    if "8bit" in name:
        return traced.states_8bit // (2 if "lion" in name else 1)  # Lion has one moment
    if name.startswith(("sgd", "adafactor")):
        return 0
    if sharding.master:
        return 4 * (ADAM_STATES + 1) * traced.trainable
    return ADAM_STATES * traced.gradients * stored


def _kv_cache(traced: Traced, prefill: Row, row: Row, prompts: int, sequences: int) -> tuple[int, int]:
    """Keys and values of the prompts and of the completions that are decoded at once.

    The room for completions is doubled whenever it is used up.
    """
    waves = math.ceil(sequences / MAX_SEQUENCES)
    of_a_token = traced.prompt_cache / (prefill.questions * prefill.prompt)
    room = FIRST_CAPACITY * 2 ** max(0, math.ceil(math.log2(row.completion / FIRST_CAPACITY)))
    return int(prompts * row.prompt * of_a_token / waves), int(sequences * room * of_a_token / waves)


def _rollout(traced: Traced, cache: tuple[int, int], decoding: int) -> int:
    """The most that sampling needs beyond weights: in the prefill, when the caches of its parts are joined,
    or with the completions' keys and values beside those of the prompts.
    """
    prompts, completions = cache
    prefill = prompts + traced.prefill_peak - traced.prompt_cache
    joined = 2 * prompts if prompts > traced.prompt_cache else 0
    return max(prefill, traced.prefill_copies + max(joined, prompts + completions + decoding))


def _gradients_kept(sharding: Sharding, passes: int, mixed: bool) -> float:
    """The share of a gradient that this process keeps when its layer is done.

    FSDP2 sums the gradients of several passes whole, in the number format that computes, before it shares
    them out; a share is then float32.
    """
    if sharding.fsdp:
        return 1.0 if passes > 1 else (2 if mixed else 1) * sharding.share(True)
    return sharding.share(sharding.gradients)


def _gathered(traced: Traced, sharding: Sharding, policy: Policy) -> dict[str, int]:
    """Weights of other processes that are here too, by phase.

    While processes sample, all weights of the policy. In an update, of FSDP2: layers at work and on their way
    with their gradients, and what belongs to no layer (head, norms); of the reference, which has no backward
    pass that would give it back, the latter stays.
    """
    if not sharding.weights:
        return {"update": 0, "optimizer step": 0, "rollout": 0}
    layers, left = 2 * traced.largest_layer, 0
    if sharding.fsdp:
        left = traced.outside_layers if policy.reference and policy.lora is None else 0
        layers = FSDP_LAYERS * traced.largest_layer + traced.outside_layers
        trained = traced.outside_layers if policy.lora is None else 0
        layers += int(trained * (1 - policy.gradients_kept))
    update = traced.weights if sharding.whole_in_step else layers
    return {"update": update + left, "optimizer step": left, "rollout": traced.weights + left}


def _phases(
    parts: dict[str, int],
    gathered: dict[str, int],
    traced: Traced,
    sharding: Sharding,
    sampling: int | None,
    sleeps: bool,
) -> dict[str, int]:
    """The peak of each phase of a step after the first one, when the optimizer has its states.

    sampling: bytes beyond weights, or None where another engine samples.
    """
    always = parts["weights"] + parts["reference"] + parts["optimizer"]
    buckets = traced.gradients if sharding.buckets else 0
    vllm = 0 if sleeps else parts["vLLM"]
    phases = {
        "update": always + traced.update_peak + gathered["update"] + buckets + vllm,
        "optimizer step": always + parts["gradients"] + gathered["optimizer step"] + buckets + vllm,
    }
    if sampling is not None:
        phases["rollout"] = always + buckets + gathered["rollout"] + sampling
    elif parts["vLLM"]:
        phases["rollout"] = always + buckets + gathered["rollout"] + parts["vLLM"]
    return phases


def plan_of(recipe: Recipe) -> MemoryPlan:
    """The plan that `video-r1 plan` was asked for. Raises ConfigError when the model's shape is unknown."""
    settings = recipe.section(PlanSettings)
    stage = settings.stage or _stage(recipe)
    config = model_config(settings.model_config or recipe.section(ModelSettings).model_name_or_path)
    memory = None if settings.gpu_memory is None else parse_bytes(settings.gpu_memory)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    planned = replace(recipe, command=stage)
    if stage == "sft":
        values = {name: recipe.values()[name] for name in own_field_types(SFTSettings)}
        planned = replace(planned, sections=(*recipe.sections, SFTSettings(**values)))
    sharding = sharding_of(recipe.training, settings.processes, settings.accelerate_config)
    return memory_plan(
        config, planned, gpu_memory=memory, sharding=sharding, text_tokens=settings.text_tokens
    )


def model_config(source: str | None) -> PreTrainedConfig:
    """The config of a checkpoint folder or hub id. Raises ConfigError and says what to do instead."""
    if not source:
        raise ConfigError(
            "a plan needs the model's config.json: name a folder or hub id that has it in model_name_or_path "
            "or with --model_config"
        )
    try:
        config = AutoConfig.from_pretrained(checked_source(source, with_weights=False))
    except (OSError, ValueError, ConfigError) as error:
        reason = first_line(error).removeprefix(f"{source}: ")
        raise ConfigError(
            f"{source}: its config.json cannot be read ({reason}); it is all "
            "that a plan needs: if the checkpoint does not exist yet or the hub is out of reach, name a "
            "folder with the config.json of a model of the same shape in --model_config"
        ) from error
    if not hasattr(config, "vision_config"):
        raise ConfigError(f"{source}: {config.model_type!r} is not a video-language model, e.g. Qwen2.5-VL")
    return config


def _stage(recipe: Recipe) -> str:
    """rl when the recipe file has a setting that only rl has, or there is no file; else sft."""
    if recipe.source is None:
        return "rl"
    names = {field for field in TGRPOSettings.__dataclass_fields__}
    of_both = names & set(SFTSettings.__dataclass_fields__)
    return "rl" if (names - of_both) & read_recipe(recipe.source)[0].keys() else "sft"


def described(plan: MemoryPlan) -> str:
    """The plan as text."""
    unit, name_of_unit = (2**30, "GiB") if plan.peak >= 2**30 else (2**20, "MiB")
    sizes = {name: f"{size / unit:9.2f}" for name, size in {**plan.parts, **plan.phases}.items()}
    answers = "completions" if plan.stage == "rl" else "response"
    lines = [
        f"{plan.stage} of {plan.model}: {plan.parameters / 1e9:.2f} billion weights, "
        f"{plan.trainable / 1e9:.2f} trained; {plan.sharding.name}",
        f"a question has up to {plan.prompt_tokens:,} prompt tokens ({plan.visual_tokens:,} visual) and "
        f"{plan.completions} {answers} of up to {plan.completion_tokens:,}; "
        f"a pass has up to {plan.row_tokens:,} tokens",
        "",
        f"on each GPU, {name_of_unit}",
        *(f"  {name:<15}{sizes[name]}" for name in plan.parts),
        f"most at once, {name_of_unit}",
        *(f"  {name:<15}{sizes[name]}" for name in plan.phases),
    ]
    if plan.gpu_memory is not None:
        verdict = "fits" if plan.fits else "does not fit"
        lines += ["", f"{verdict}: {plan.peak / unit:,.2f} of {plan.gpu_memory / unit:,.2f} {name_of_unit}"]
    return "\n".join(lines)


def run_plan(recipe: Recipe) -> int:
    """Prints the plan. Returns 1 when it does not fit the GPU, else 0."""
    plan = plan_of(recipe)
    print(described(plan))
    return 1 if plan.fits is False else 0
