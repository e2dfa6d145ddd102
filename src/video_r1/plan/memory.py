"""GPU memory that a recipe needs, before any weights are loaded: `video-r1 plan RECIPE`.

The update and the prefill are traced without storage (trace.py); the rest is counted. Not counted: the CUDA
context and the allocator's unused blocks (1 to 2 GB on common GPUs, for which a limit in GB, not GiB, leaves
room), and the pixels of a batch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from video_r1.errors import ConfigError, first_line
from video_r1.models.families import find_family
from video_r1.plan.fake_trace import Policy, Traced
from video_r1.plan.shapes import model_config
from video_r1.plan.trace import Row, longest_row, trace, trace_scoring
from video_r1.recipe import Recipe
from video_r1.recipe_files import RECIPES, checkpoint_behind, model_folder
from video_r1.rollout.engine import MAX_SEQUENCES
from video_r1.rollout.shared_prefix import first_capacity
from video_r1.rollout.transformers import MAX_PREFILL_TOKENS
from video_r1.settings.commands import GPUSharding
from video_r1.settings.decoding import SCHEMES
from video_r1.settings.shared import ModelSettings, PromptSettings
from video_r1.settings.tools import TrainingToolSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings
from video_r1.settings.vllm import MAX_BATCHED_TOKENS, EngineSettings, VLLMSettings

FLOAT32 = ("fp32", "float32", "float")  # as DeepSpeed reads it
BYTES = 2  # bf16
LIVE_COPIES = 2  # of a layer's largest activations
ADAM_STATES = 2
FSDP_LAYERS = 3  # the current layer, and the next one while it is received and copied
SAMPLING_COPIES = 4  # [completions, vocabulary] float32: logits, log-probs, probabilities, their sums


@dataclass(frozen=True, slots=True)
class Sharding:
    """Which parts (`weights`, `gradients`, `optimizer`) are split over the ranks."""

    name: str = "one GPU"
    processes: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    master: bool = False  # the optimizer keeps a float32 copy of bf16 weights (DeepSpeed)
    float32_gradients: bool = False  # gradients of bf16 weights are summed in float32 (DeepSpeed)
    offload: bool = False  # the optimizer is in main memory

    @property
    def fsdp(self) -> bool:
        return self.weights and not self.master

    def share(self, shared: bool) -> float:
        return 1 / self.processes if shared else 1.0


def sharding_of(training: Mapping[str, Any], gpus: int = 1, kind: GPUSharding | None = None) -> Sharding:
    """Return the sharding of this kind, by default that of TrainingArguments. Raises ConfigError."""
    given = training.get("deepspeed") if kind is None else None
    if kind in ("zero2", "zero3"):
        given = RECIPES / "deepspeed" / f"{kind}.json"
    if given:
        options = given if isinstance(given, Mapping) else read_deepspeed(Path(given))
        zero = options.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        return Sharding(
            f"{gpus} GPUs, DeepSpeed ZeRO-{stage}{', optimizer in main memory' * offload}", gpus,
            weights=stage >= 3, gradients=stage >= 2, optimizer=stage >= 1, master=True, offload=offload,
            float32_gradients=options.get("data_types", {}).get("grad_accum_dtype") in FLOAT32,
        )  # fmt: skip
    if kind == "fsdp2" or (kind is None and training.get("fsdp")):
        return Sharding(f"{gpus} GPUs, FSDP2", gpus, True, True, True)
    return Sharding(f"{gpus} GPUs, each with all weights" if gpus > 1 else "one GPU", gpus)


def read_deepspeed(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as DeepSpeed's JSON: {first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class VLLMShare:
    """Bytes on one GPU that vLLM has in colocate mode (`share`) and needs: weights, profiling run, and keys
    and values of each question's prompts and completions.
    """

    share: int
    weights: int
    profile: int
    question: int

    @property
    def questions(self) -> int:
        """Number of questions whose keys and values fit at once; vLLM does not fit if it is 0."""
        return max(0, self.share - self.weights - self.profile) // self.question

    @property
    def least(self) -> int:
        """Bytes to sample one question at a time."""
        return self.weights + self.profile + self.question


def vllm_share(
    config: Any, parameters: int, row: Row, training: TGRPOSettings, settings: VLLMSettings, gpu_memory: int
) -> VLLMShare:
    text, vision, parts = config.get_text_config(), config.vision_config, settings.tensor_parallel_size
    heads = math.ceil(text.num_key_value_heads / parts)
    of_a_token = 2 * BYTES * text.num_hidden_layers * heads * head_size(text)
    orders = 2 if training.contrast_generations else 1
    completions = training.num_generations + training.contrast_generations
    tokens = orders * row.prompt + completions * (row.completion + row.returned)
    tower = max(row.patches, math.prod(row.look_grid)) * (
        4 * vision.hidden_size + 2 * vision.intermediate_size
    )
    layer = MAX_BATCHED_TOKENS * (4 * text.hidden_size + 2 * text.intermediate_size // parts)
    profile = LIVE_COPIES * BYTES * max(tower, layer)
    share = int(settings.gpu_memory_utilization * gpu_memory)
    return VLLMShare(share, BYTES * parameters // parts, profile, tokens * of_a_token)


def head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one GPU. parts: do not all exist at once; "gathered" are weights of other ranks. phases: peaks
    while sampling (rollout), in forward and backward (update), in the optimizer step and the weight sync.
    """

    recipe: Recipe
    sharding: Sharding
    row: Row  # of one forward and backward pass
    traced: Traced
    parts: dict[str, int]
    phases: dict[str, int]
    gpu_memory: int | None = None
    vllm: VLLMShare | None = None
    processor: Any = None  # on the general path
    teacher: "TeacherPlan | None" = None

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool | None:
        """None if the GPU is not known."""
        if self.gpu_memory is None:
            return None
        return self.peak <= self.gpu_memory and (self.vllm is None or self.vllm.questions > 0)


def memory_plan(
    config: PreTrainedConfig,
    recipe: Recipe,
    *,
    gpu_memory: int | None = None,
    sharding: Sharding | None = None,
    text_tokens: int = 300,
    device_type: str = "cuda",
    processor: Any = None,
) -> MemoryPlan:
    """Plan an `rl` or `sft` recipe for a model of this config, with the longest lengths that it allows.

    gpu_memory: bytes. sharding: by default that of the recipe's TrainingArguments on one GPU. processor:
    needed on the general path. Raises ConfigError if the frames of a clip alone exceed max_prompt_length, and
    for settings that the general path does not support.
    """
    sharding = sharding or sharding_of(recipe.training)
    training: Any = recipe.section(TGRPOSettings if recipe.command == "rl" else SFTSettings)
    known, rl = find_family(config) is not None, recipe.command == "rl"
    if not known:
        check_general(config, recipe, sharding)
    frames, tools = recipe.section(PromptSettings), recipe.section(TrainingToolSettings)
    row = longest_row(config, frames, training, text_tokens, processor, tools)
    policy = _policy(config, recipe.section(ModelSettings), training, sharding, device_type)
    vllm = recipe.section(EngineSettings) if rl and recipe.section(EngineSettings).use_vllm else None
    questions = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sampled = prompts = sequences = 0
    if rl and not known:  # one question at a time, the prompt repeated for each completion
        prompts = sequences = max(training.num_generations, training.contrast_generations)
        sampled = min(prompts, MAX_SEQUENCES)
    elif rl and vllm is None:
        prompts = questions * (2 if training.contrast_generations else 1)
        sequences = questions * (training.num_generations + training.contrast_generations)
        sampled = max(1, min(prompts, MAX_PREFILL_TOKENS // row.prompt))
    traced = trace(config, policy, row, sampled)
    teacher = _teacher(config, recipe, policy, text_tokens, processor) if rl else None
    weights = int(traced.weights * policy.stored * sharding.share(sharding.weights))
    optimizer = _optimizer_bytes(str(recipe.values().get("optim", "")), traced, policy.stored, sharding)
    update, left, whole = _gathered(traced, sharding, policy)
    beside = None
    if vllm is not None and vllm.server is None:
        if sharding.processes % (size := vllm.vllm.tensor_parallel_size):
            raise ConfigError(
                f"vllm_tensor_parallel_size is {size}; it must divide {sharding.processes} GPUs"
            )
        beside = vllm_share(config, traced.parameters, row, training, vllm.vllm, gpu_memory or 0)
    cache = decoding = 0
    if sampled:
        vocabulary, first = config.get_text_config().vocab_size, first_capacity(device_type)
        cache, decoding = _sampling(vocabulary, traced, row, sampled, prompts, sequences, first)
    parts = {
        "weights": weights,
        "gradients": int(traced.gradients * policy.summed * sharding.share(sharding.gradients)),
        "optimizer": 0 if sharding.offload else int(optimizer * sharding.share(sharding.optimizer)),
        # every rank has a whole copy of reference adapters
        "reference": policy.reference * _reference_bytes(policy, traced, weights, sharding),
        "teacher": 0 if teacher is None else int(teacher.weights * sharding.share(sharding.weights)),
        "gathered": max(update, left, whole),
        "activations": traced.activations,
        "KV cache": cache,
        "vLLM": 0 if beside is None else beside.share,
    }
    # from the second step on, when the optimizer has its states
    always = parts["weights"] + parts["reference"] + parts["teacher"] + parts["optimizer"]
    if sharding.processes > 1 and not (sharding.weights or sharding.gradients or sharding.optimizer):
        always += traced.gradients  # the second copy that DistributedDataParallel keeps
    # The teacher reads while the policy's activations wait for their backward pass.
    scoring = 0 if teacher is None else traced.activations + teacher.peak
    awake = 0 if vllm is None or vllm.vllm.enable_sleep_mode else parts["vLLM"]
    phases = {
        "update": always + max(traced.update_peak, scoring) + update + awake,
        "optimizer step": always + parts["gradients"] + left + awake,
    }
    if vllm is not None:
        phases["weight sync"] = always + whole + parts["vLLM"]
    if sampled or beside is not None:
        phases["rollout"] = always + (whole + decoding if sampled else left + parts["vLLM"])
    unused = math.inf if gpu_memory is None else gpu_memory - always - whole
    if sampled and unused > 2 * traced.adapted:  # as `has_memory_for` asks
        phases["rollout"] += traced.adapted
    return MemoryPlan(recipe, sharding, row, traced, parts, phases, gpu_memory, beside, processor, teacher)


class TeacherPlan(NamedTuple):
    """A teacher's longest row, its number of weights, their bytes (0: the policy's), and a pass's peak."""

    row: Row
    parameters: int
    weights: int
    peak: int


def _teacher(
    config: PreTrainedConfig, recipe: Recipe, policy: Policy, text_tokens: int, processor: Any
) -> TeacherPlan | None:
    training, tools = recipe.section(TGRPOSettings), recipe.section(TrainingToolSettings)
    name = training.teacher.model_name_or_path
    if name is None or name.startswith(SCHEMES):
        return None
    if name != "self":
        config = model_config(model_folder(checkpoint_behind(name)))
    frames = recipe.section(PromptSettings)
    frames = replace(
        frames,
        max_frames=training.teacher.frames or frames.max_frames,
        frame_pixels=training.teacher.pixels or frames.frame_pixels,
        max_prompt_length=1 << 30,
    )
    row = longest_row(config, frames, training, text_tokens, processor, tools)
    policy = replace(policy, dtype=policy.autocast or policy.dtype)
    parameters, weights, peak = trace_scoring(config, policy, row)
    return TeacherPlan(row, parameters, 0 if name == "self" else weights, peak)


def _policy(
    config: Any,
    settings: ModelSettings,
    training: TGRPOSettings | SFTSettings,
    sharding: Sharding,
    device_type: str,
) -> Policy:
    named = config.dtype if settings.dtype == "auto" else settings.dtype
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named or "float32"))
    autocast = None
    if training.bf16 if training.bf16 is not None else device_type == "cuda":
        if sharding.master:  # DeepSpeed turns the weights themselves into bf16
            dtype = torch.bfloat16
        elif sharding.fsdp and not settings.use_peft:  # accelerate makes trained weights float32
            dtype, autocast = torch.float32, torch.bfloat16
        elif dtype == torch.float32:
            autocast = torch.bfloat16
    kept = sharding.share(sharding.gradients)
    if sharding.fsdp and training.gradient_accumulation_steps > 1:
        kept = 1.0  # FSDP sums unsharded gradients of several passes and shards them after the last one
    computing = autocast if sharding.fsdp and autocast else dtype
    stored = dtype.itemsize // computing.itemsize
    exact = sharding.float32_gradients or (sharding.fsdp and autocast is not None)
    summed = 4 // computing.itemsize if exact else 1
    return Policy(settings, training, computing, stored, autocast, device_type, summed, summed * kept)


def _optimizer_bytes(name: str, traced: Traced, stored: int, sharding: Sharding) -> int:
    """AdamW's states have the dtype of the trained weights."""
    if "8bit" in name:
        return traced.states_8bit // (2 if "lion" in name else 1)  # Lion has one moment
    if name.startswith(("sgd", "adafactor")):
        return 0
    if sharding.master:
        return 4 * (ADAM_STATES + 1) * traced.trainable
    return ADAM_STATES * traced.gradients * stored


def _sampling(
    vocabulary: int, traced: Traced, row: Row, sampled: int, prompts: int, sequences: int, first: int
) -> tuple[int, int]:
    """Return the bytes of the KV cache of prompts and completions, and the peak of sampling beyond weights.

    first: the cache's capacity for completions, which doubles whenever it is full.
    """
    waves = math.ceil(sequences / MAX_SEQUENCES)
    of_a_token = traced.prompt_cache / (sampled * row.prompt) / waves
    state = traced.prompt_states / sampled / waves
    room = first * 2 ** max(0, math.ceil(math.log2((row.completion + row.returned) / first)))
    ours = int(prompts * (row.prompt * of_a_token + state))
    theirs = int(sequences * (room * of_a_token + state))
    decoding = SAMPLING_COPIES * 4 * min(sequences, MAX_SEQUENCES) * vocabulary
    cached = traced.prompt_cache + traced.prompt_states
    joined = 2 * ours if ours > cached else 0
    most = max(joined, ours + theirs + decoding) + traced.prefill_copies
    return ours + theirs, max(ours + traced.prefill_peak - cached, most)


def _reference_bytes(policy: Policy, traced: Traced, weights: int, sharding: Sharding) -> int:
    """Return the bytes of a frozen copy in the compute dtype, or of reference adapters."""
    if not policy.copied:
        return traced.gradients * policy.stored
    if policy.autocast is None or sharding.fsdp:
        return weights // policy.stored
    return weights - traced.linear * (policy.dtype.itemsize - policy.autocast.itemsize)


def _gathered(traced: Traced, sharding: Sharding, policy: Policy) -> tuple[int, int, int]:
    """Return the bytes of gathered weights of other ranks in an update, in the optimizer step, in a rollout.

    An update under FSDP2 gathers layers with their gradients, and weights of no layer (head, norms), which
    stay gathered for the reference.
    """
    if not sharding.weights:
        return 0, 0, 0
    layers, left = 2 * traced.largest_layer, 0
    if sharding.fsdp:
        left = traced.outside_layers if policy.copied else 0
        layers = FSDP_LAYERS * traced.largest_layer + traced.outside_layers
        if policy.autocast:  # float32 gradients of one layer and of weights in no layer while they are sent
            layers += 2 * (traced.largest_layer + traced.outside_layers)
        if not policy.settings.use_peft:
            layers += int(traced.outside_layers * (1 - policy.gradients_kept))
    return layers + left, left, traced.weights + left


def check_general(config: Any, recipe: Recipe, sharding: Sharding) -> None:
    """Raise ConfigError for settings that the general path does not support: see docs/models.md."""
    refused = {
        "engine vllm": recipe.values().get("engine", "transformers") != "transformers",
        "load_in_4bit": recipe.section(ModelSettings).load_in_4bit,
        f"sharded weights ({sharding.name})": sharding.weights,
    }
    found = [name for name, asked in refused.items() if asked]
    if found:
        raise ConfigError(
            f"{config.model_type} takes the general path, which does not work with {', '.join(found)} "
            "(docs/models.md)"
        )
