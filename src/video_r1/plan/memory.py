"""GPU memory that a recipe needs, before any weights are loaded: `video-r1 plan RECIPE`.

The update and the prefill are traced without storage (trace.py). Counted are weights, gradients, optimizer
states, keys and values of the completions, and what FSDP2 and ZeRO-3 gather: all weights while ranks sample,
layers in an update. Not counted: the CUDA context and the allocator's unused blocks (1 to 2 GB on common
GPUs, for which a limit in GB, not GiB, leaves room), and the pixels of a batch.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig

from video_r1.errors import ConfigError
from video_r1.models.families import find_family
from video_r1.models.onednn import LEAST_PRODUCTS, MOST_ARRANGED_BYTES
from video_r1.plan.fake_trace import Policy, Row, Traced
from video_r1.plan.trace import family_row, general_row, trace, trace_general
from video_r1.recipe import Recipe
from video_r1.rollout.shared_prefix import FIRST_CAPACITY
from video_r1.rollout.transformers import MAX_PREFILL_TOKENS, MAX_SEQUENCES
from video_r1.settings.commands import GPUSharding
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings
from video_r1.settings.vllm import VLLMSettings

FLOAT32 = ("fp32", "float32", "float")  # as DeepSpeed reads it


@dataclass(frozen=True, slots=True)
class Sharding:
    """Sharding of a run: `weights`, `gradients` and `optimizer` say which parts are split over the ranks."""

    name: str = "one GPU"
    processes: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    whole_in_step: bool = False  # sharded weights are gathered once for forward and backward
    master: bool = False  # the optimizer keeps a float32 copy of bf16 weights (DeepSpeed)
    float32_gradients: bool = False  # gradients of bf16 weights are summed in float32 (DeepSpeed)
    offload: bool = False  # the optimizer is in main memory

    @property
    def buckets(self) -> bool:
        """Whether DistributedDataParallel keeps a second copy of the gradients."""
        return self.processes > 1 and not (self.weights or self.gradients or self.optimizer)

    @property
    def fsdp(self) -> bool:
        """Whether weights are sharded by FSDP, which gathers them in the compute dtype."""
        return self.weights and not self.master

    def share(self, shared: bool) -> float:
        return 1 / self.processes if shared else 1.0


def sharding_of(training: Mapping[str, Any], gpus: int = 1, kind: GPUSharding | None = None) -> Sharding:
    """Return the sharding of this kind, by default that of TrainingArguments. Raises ConfigError."""
    if kind in ("zero2", "zero3"):  # as in the packaged DeepSpeed configs
        return _deepspeed(gpus, int(kind[-1]), offload=False, exact=True)
    if kind is None and training.get("deepspeed"):
        given = training["deepspeed"]
        options = given if isinstance(given, Mapping) else read_mapping(given)
        zero = options.get("zero_optimization", {})
        offload = bool(zero.get("offload_optimizer", {}).get("device", "none") != "none")
        exact = options.get("data_types", {}).get("grad_accum_dtype") in FLOAT32
        return _deepspeed(gpus, int(zero.get("stage", 0)), offload, exact)
    if kind == "fsdp2":
        return Sharding(f"{gpus} GPUs, FSDP2", gpus, True, True, True)
    if kind is None and training.get("fsdp"):
        options = training.get("fsdp_config") or {}
        options = dict(options) if isinstance(options, Mapping) else read_mapping(options)
        options = {name.removeprefix("fsdp_"): value for name, value in options.items()}
        asked = f"{training.get('fsdp', '')} {options.get('sharding_strategy', '')}".lower()
        keeps = options.get("reshard_after_forward") in (False, "false", "SHARD_GRAD_OP")
        keeps = keeps or "shard_grad_op" in asked
        offload = "offload" in asked or bool(options.get("offload_params", False))
        name = f"{gpus} GPUs, FSDP" + (" (weights whole in a step)" if keeps else "")
        return Sharding(name, gpus, True, True, True, whole_in_step=keeps, offload=offload)
    return Sharding(f"{gpus} GPUs, each with all weights" if gpus > 1 else "one GPU", gpus)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a mapping of settings")
    return values


def _deepspeed(processes: int, stage: int, offload: bool, exact: bool) -> Sharding:
    name = f"{processes} GPUs, DeepSpeed ZeRO-{stage}{', optimizer in main memory' * offload}"
    return Sharding(
        name, processes, stage >= 3, stage >= 2, stage >= 1,
        master=True, float32_gradients=exact, offload=offload,
    )  # fmt: skip


BYTES = 2  # bf16
PROFILED_TOKENS = 8192  # vLLM's max_num_batched_tokens
LIVE_COPIES = 2  # of a layer's largest activations


@dataclass(frozen=True, slots=True)
class VLLMShare:
    """Bytes on one GPU that vLLM has in colocate mode (`share`) and needs.

    It needs `weights`, its `profile` run, and keys and values of prompts and completions of each `question`.
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
    """Return vLLM's needs. parameters: number of the model's weights. row: longest prompt and completions."""
    text, vision, parts = config.get_text_config(), config.vision_config, settings.vllm_tensor_parallel_size
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_a_token = 2 * BYTES * text.num_hidden_layers * math.ceil(text.num_key_value_heads / parts) * size
    orders = 2 if training.shuffled_generations else 1
    completions = training.num_generations + training.shuffled_generations
    tokens = orders * row.prompt + completions * row.completion
    tower = (
        row.visual * vision.spatial_merge_size**2 * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    )
    layer = PROFILED_TOKENS * (4 * text.hidden_size + 2 * text.intermediate_size // parts)
    profile = LIVE_COPIES * BYTES * max(tower, layer)
    share = int(settings.vllm_gpu_memory_utilization * gpu_memory)
    return VLLMShare(share, BYTES * parameters // parts, profile, tokens * of_a_token)


ADAM_STATES = 2
FSDP_LAYERS = 3  # the current layer, and the next one while it is received and copied
SAMPLING_COPIES = 4  # [completions, vocabulary] float32: logits, log-probs, probabilities, their sums


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one GPU.

    `parts`: weights, gradients, optimizer, reference, gathered (weights of other ranks), activations (kept
    for the backward pass), logits, KV cache, vLLM; they do not all exist at once. `phases`: peaks while
    sampling (rollout), in forward and backward (update), in the optimizer step and while weights are sent to
    a server (weight sync).
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

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the GPU; None if the GPU is not known."""
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
    """Plan an `rl` or `sft` recipe (`load_recipe("rl", …)`) for a model of this config.

    Lengths are the longest that the recipe allows: frames at their budget, completions at their limit.
    gpu_memory: bytes. sharding: by default that of the recipe's TrainingArguments on one GPU. processor:
    needed on the general path. Raises ConfigError if the frames of a clip alone exceed max_prompt_length, and
    for settings that the general path does not support.
    """
    sharding = sharding or sharding_of(recipe.training)
    training = recipe.section(TGRPOSettings if recipe.command == "rl" else SFTSettings)
    values = recipe.values()
    known = find_family(config) is not None
    if not known:
        check_general(config, recipe, sharding)
    row = (
        family_row(config, recipe, training, text_tokens)
        if known
        else general_row(config, recipe, training, text_tokens, processor)
    )
    policy = _policy(config, recipe.section(ModelSettings), training, sharding, device_type)
    prefill, prompts, sequences = None, 0, 0
    if isinstance(training, TGRPOSettings):
        questions = training.per_device_train_batch_size * training.gradient_accumulation_steps
        prompts = questions * (2 if training.shuffled_generations else 1)
        sequences = questions * (training.num_generations + training.shuffled_generations)
        if not known:  # one question at a time, the prompt repeated for each completion
            prompts = sequences = max(training.num_generations, training.shuffled_generations)
            prefill = replace(row, questions=min(prompts, MAX_SEQUENCES))
        elif not values.get("use_vllm"):
            rows = max(1, min(prompts, MAX_PREFILL_TOKENS // row.prompt))
            prefill = replace(row, questions=rows)
    if known:
        traced = trace(config, policy, row, prefill)
    else:
        traced = trace_general(config, policy, row, 0 if prefill is None else prefill.questions)
    weights = int(traced.weights * policy.stored * sharding.share(sharding.weights))
    optimizer = _optimizer_bytes(str(values.get("optim", "")), traced, policy.stored, sharding)
    update, left, whole = _gathered(traced, sharding, policy)
    on_server, beside = False, None
    if values.get("use_vllm") and isinstance(training, TGRPOSettings):
        ours = recipe.section(VLLMSettings)
        on_server = ours.vllm_mode == "server"
        if not on_server:
            beside = vllm_share(config, traced.parameters, row, training, ours, gpu_memory or 0)
    vllm = 0 if beside is None else beside.share
    cache, sampling = 0, vllm
    if prefill is not None:
        cache, sampling = _sampling(config, policy, traced, row, prefill, prompts, sequences)
    parts = {
        "weights": weights,
        "gradients": int(traced.gradients * policy.summed * sharding.share(sharding.gradients)),
        "optimizer": 0 if sharding.offload else int(optimizer * sharding.share(sharding.optimizer)),
        # every rank has a whole copy of reference adapters
        "reference": policy.reference * _reference_bytes(policy, traced, weights, sharding),
        "gathered": max(update, left, whole),
        "activations": traced.activations,
        "logits": traced.logits,
        "KV cache": cache,
        "vLLM": vllm,
    }
    # from the second step on, when the optimizer has its states
    always = parts["weights"] + parts["reference"] + parts["optimizer"]
    always += traced.gradients if sharding.buckets else 0
    awake = 0 if values.get("vllm_enable_sleep_mode") else vllm
    phases = {
        "update": always + traced.update_peak + update + awake,
        "optimizer step": always + parts["gradients"] + left + awake,
    }
    if sampling:
        phases["rollout"] = always + whole + sampling
        unused = math.inf if gpu_memory is None else gpu_memory - always - whole
        if prefill is not None and unused > 2 * traced.adapted:  # as `has_memory_for` asks
            phases["rollout"] += traced.adapted
    if on_server:
        phases["weight sync"] = always + whole
    return MemoryPlan(recipe, sharding, row, traced, parts, phases, gpu_memory, beside, processor)


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
    """Return the bytes of the optimizer's states; AdamW's have the dtype of the trained weights."""
    if "8bit" in name:
        return traced.states_8bit // (2 if "lion" in name else 1)  # Lion has one moment
    if name.startswith(("sgd", "adafactor")):
        return 0
    if sharding.master:
        return 4 * (ADAM_STATES + 1) * traced.trainable
    return ADAM_STATES * traced.gradients * stored


def _sampling(
    config: Any, policy: Policy, traced: Traced, row: Row, prefill: Row, prompts: int, sequences: int
) -> tuple[int, int]:
    """Return the bytes of the KV cache of prompts and completions, and the peak of sampling beyond weights.

    The peak is in the prefill, when caches of its parts are joined, or while decoding. The cache's capacity
    for completions doubles whenever it is full.
    """
    waves = math.ceil(sequences / MAX_SEQUENCES)
    of_a_token = traced.prompt_cache / (prefill.questions * prefill.prompt) / waves
    state = traced.prompt_states / prefill.questions / waves
    room = FIRST_CAPACITY * 2 ** max(0, math.ceil(math.log2(row.completion / FIRST_CAPACITY)))
    ours = int(prompts * (row.prompt * of_a_token + state))
    theirs = int(sequences * (room * of_a_token + state))
    decoding = SAMPLING_COPIES * 4 * min(sequences, MAX_SEQUENCES) * config.get_text_config().vocab_size
    cached = traced.prompt_cache + traced.prompt_states
    joined = 2 * ours if ours > cached else 0
    arranged = 0  # oneDNN's copies of weights
    if policy.device_type == "cpu" and policy.dtype == torch.float32 and policy.autocast is None:
        arranged = 4 * sum(size for size in traced.text_linear if sequences * size >= LEAST_PRODUCTS)
        arranged = arranged if arranged <= MOST_ARRANGED_BYTES else 0
    most = max(
        ours + traced.prefill_peak - cached,
        traced.prefill_copies + max(joined, ours + theirs + decoding),
    )
    return ours + theirs, arranged + most


def _reference_bytes(policy: Policy, traced: Traced, weights: int, sharding: Sharding) -> int:
    """Return the bytes of a frozen copy in the compute dtype, or of reference adapters."""
    if not policy.copied:
        return traced.gradients * policy.stored
    follows = isinstance(policy.training, TGRPOSettings) and policy.training.sync_ref_model
    if policy.autocast is None or follows or sharding.fsdp:
        return weights // policy.stored
    return weights - traced.linear * (policy.dtype.itemsize - policy.autocast.itemsize)


def _gathered(traced: Traced, sharding: Sharding, policy: Policy) -> tuple[int, int, int]:
    """Return the bytes of gathered weights of other ranks in an update, in the optimizer step, in a rollout.

    A rollout gathers all weights of the policy. An update under FSDP2 gathers layers with their gradients,
    and weights of no layer (head, norms). Of the reference, the latter stay gathered.
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
    update = traced.weights if sharding.whole_in_step else layers
    return update + left, left, traced.weights + left


def check_general(config: Any, recipe: Recipe, sharding: Sharding) -> None:
    """Raise ConfigError for settings that the general path does not support: see docs/models.md."""
    refused = {
        "use_vllm": bool(recipe.values().get("use_vllm")),
        "load_in_4bit": recipe.section(ModelSettings).load_in_4bit,
        f"sharded weights ({sharding.name})": sharding.weights,
    }
    found = [name for name, asked in refused.items() if asked]
    if found:
        raise ConfigError(
            f"{config.model_type} takes the general path, which does not work with {', '.join(found)} "
            "(docs/models.md)"
        )
