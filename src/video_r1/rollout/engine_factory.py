"""Opens the engine that the settings name. The engine itself loads the model or vLLM."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from video_r1.availability import imported
from video_r1.chat_client import Endpoint, ServerFailure, ServerRefusal, endpoint_urls, open_endpoint
from video_r1.data.decoding.frame_cache import open_frame_cache
from video_r1.data.prompts import PromptBuilder, TextPrompts
from video_r1.data.tools import Toolbox
from video_r1.errors import ConfigError
from video_r1.models.families import family_names, find_family
from video_r1.models.group_forward import in_one_row, vision_language_model
from video_r1.models.loading import (
    PIXELS_OF_ANY_MODEL,
    load_config,
    load_model,
    load_processor,
    size_multiple,
)
from video_r1.processes import process_count
from video_r1.rollout.endpoint_engine import EndpointEngine
from video_r1.rollout.engine import MAX_SEQUENCES, RolloutEngine
from video_r1.rollout.episodes import ToolEngine, largest_frames, tool_tokens
from video_r1.rollout.general import GeneralEngine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm.engine import VLLMEngine, generation_config
from video_r1.rollout.vllm.server import ServerEngine, describe
from video_r1.settings.decoding import (
    SCHEMES,
    AskSettings,
    DecodingSettings,
    EvalSettings,
    addresses,
    has_path,
)
from video_r1.settings.frames import FrameBudget
from video_r1.settings.training_record import RECORD, read_record
from video_r1.settings.vllm import EngineSettings, VLLMSettings

logger = logging.getLogger(__name__)


def open_prompts(settings: DecodingSettings) -> tuple[TextPrompts, FrameBudget]:
    """Return a model's prompts, which offer the settings' tools, and its frame budget."""
    template, subtitles = settings.prompt_template, settings.subtitles
    if is_endpoint(settings.engine):
        budget = settings.frame_budget(PIXELS_OF_ANY_MODEL)
        return TextPrompts(template, subtitles, toolbox_of(settings, budget)), budget
    assert settings.model is not None  # settings without it are refused
    processor = load_processor(settings.model, settings.trust_remote_code)
    budget = settings.frame_budget(size_multiple(processor))
    toolbox = toolbox_of(settings, budget)
    return PromptBuilder(processor, template, settings.max_prompt_length, subtitles, toolbox), budget


def toolbox_of(settings: DecodingSettings, budget: FrameBudget) -> Toolbox | None:
    """Return the settings' tools, if any."""
    if not settings.tools:
        return None
    return Toolbox(settings, budget, (), open_frame_cache(settings.frame_cache, settings.frame_cache_gb))


def open_engine(settings: DecodingSettings, prompts: TextPrompts) -> RolloutEngine:
    """Open the engine of a command, which answers calls of the tools that the prompts offer; the caller
    closes it.

    `settings.engine` is transformers, vllm, addresses of vLLM servers of the checkpoint
    (http://a:8000,http://b:8000), addresses with a path (http://host:8000/v1) of OpenAI-compatible endpoints
    that serve `model` by that name, or `module:function` or `file.py:function`, called with settings and
    processor, for an engine of the user's. Raises ConfigError for an unusable checkpoint, or a server that
    does not answer or serves another model.
    """
    engine = _engine(settings, prompts.processor)
    return engine if prompts.toolbox is None else ToolEngine(engine, prompts)


def _engine(settings: DecodingSettings, processor: Any) -> RolloutEngine:
    if is_endpoint(settings.engine):
        key = os.environ.get(settings.key_variable)
        wait = 5.0 if isinstance(settings, AskSettings) else 240.0  # somebody waits for an answer
        endpoint = Endpoint(endpoint_urls(settings.engine), key, settings.timeout, wait)
        model, frames_as = open_endpoint(endpoint, settings.model or None, "auto")
        warn_of_positions(model, endpoint)
        return EndpointEngine(endpoint, model, frames_as, settings.concurrency)
    assert settings.model is not None  # settings without it are refused
    if settings.engine == "vllm" or settings.engine.startswith(SCHEMES):
        check_vllm_supports(load_config(settings.model, settings.trust_remote_code))
    if settings.engine.startswith(SCHEMES):
        urls, generation = addresses(settings.engine), generation_config(settings.model)
        engine = ServerEngine(urls, processor, generation, model=settings.model, timeout=settings.timeout)
        engine.require_weights_of(settings.model)
        return engine
    if settings.engine == "vllm":
        return _vllm_engine(settings, processor)
    if ":" in settings.engine:
        return imported(settings.engine, "engine")(settings, processor)
    dtype, remote = inference_dtype(settings, settings.model), settings.trust_remote_code
    model: Any = load_model(settings.model, dtype, settings.attn_implementation, remote)
    return in_process_engine(model.to(settings.device or own_device()), processor)


def _vllm_engine(settings: DecodingSettings, processor: Any) -> RolloutEngine:
    assert settings.model is not None
    if settings.trust_remote_code:
        raise ConfigError("engine: vllm runs no code that comes with a checkpoint; use transformers")
    counts = getattr(settings, "frame_counts", [settings.max_frames])
    if isinstance(settings, EvalSettings) and "no-look" in settings.order:
        counts = [settings.frames_without_looks(count) for count in counts]
    budget = settings.frame_budget(size_multiple(processor))
    return VLLMEngine(
        settings.model,
        processor,
        dtype=settings.dtype,
        max_model_len=settings.max_prompt_length + settings.max_new_tokens + tool_tokens(settings),
        settings=VLLMSettings(gpu_memory_utilization=0.9),
        frames=largest_frames(replace(budget, max_frames=max(counts)), settings),
    )


def inference_dtype(settings: DecodingSettings, model: str) -> str:
    """Return the number format in which a model is loaded; "auto" is that of its files.

    On a GPU float32 files are loaded as bfloat16: half the memory and several times the speed. `dtype
    float32` keeps float32.
    """
    if settings.dtype == "auto" and settings.engine == "transformers":
        device = torch.device(settings.device or own_device())
        if device.type == "cuda" and torch.cuda.is_bf16_supported():
            written = load_config(model, settings.trust_remote_code).dtype
            return "bfloat16" if written in (None, torch.float32) else "auto"
    return settings.dtype


def in_process_engine(model: Any, processor: Any) -> RolloutEngine:
    """Return the engine for a model in this process, which may be within PEFT or DistributedDataParallel."""
    if in_one_row(vision_language_model(model)):
        engine = TransformersEngine(model, processor)
        if engine.works():
            return engine
    return GeneralEngine(model, processor)


def check_vllm_supports(model: Any) -> None:
    """Raise ConfigError for a model (or its config) whose prompts have not been compared with vLLM's."""
    if find_family(model) is None:
        raise ConfigError(
            f"vLLM samples for {family_names()} only: whether it has the trainer's prompts is not known for "
            f"{getattr(model, 'config', model).model_type}; set engine transformers"
        )


def warn_of_positions(checkpoint: str, endpoint: Endpoint) -> None:
    """Warn of addresses that serve our checkpoint, but not with its rule of positions (vllm/mrope.py)."""
    record = Path(checkpoint) / RECORD
    if not record.is_file() or (trained := read_record(record).get("positions")) is None:
        return
    for one in endpoint.each():
        try:
            rule = describe(one.url.removesuffix("/v1"), one.key, one.timeout).get("positions")
        except (ServerRefusal, ServerFailure):
            rule = None  # plain `vllm serve` does not say
        if rule != trained:
            logger.warning(
                "%s was trained with the positions of %s after a video; %s %s, and may answer as another "
                "policy: serve it with video-r1 serve (see docs/vllm.md)",
                checkpoint, trained, one.url,
                f"has those of {rule}" if rule else "does not say which it has",
            )  # fmt: skip


def own_device() -> str:
    """Return this process's device: the CPU or its own GPU. Raises ConfigError if there are too few."""
    if not torch.cuda.is_available():
        return "cpu"
    if process_count() == 1:
        return "cuda"
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(f"process {rank + 1} of this machine has no GPU: there are {count}; start as many")
    torch.cuda.set_device(rank)
    return f"cuda:{rank}"


def is_endpoint(engine: str) -> bool:
    """Return whether `engine` names OpenAI-compatible endpoints rather than `video-r1 serve` servers."""
    return engine.startswith(SCHEMES) and has_path(addresses(engine)[0])


def training_engine(
    model: Any,
    processor: Any,
    settings: EngineSettings,
    *,
    longest: int,
    sequences: int,
    frames: FrameBudget,
    dtype: str = "auto",
    folder: str | None = None,
) -> RolloutEngine:
    """Open the engine that samples for the trainer of `model`.

    longest: most tokens of prompt and completion together; sequences: completions that this process samples
    in a step; dtype: of vLLM's weights in this process; folder: where a server finds weights. Raises
    ConfigError when vLLM or the server is missing.
    """
    if not settings.use_vllm:
        return in_process_engine(model, processor)
    check_vllm_supports(vision_language_model(model))
    if settings.server is not None:
        wait, timeout = settings.vllm.server_timeout, max(600.0, longest / 10)  # ten tokens a second
        return ServerEngine(
            settings.server, processor, model.generation_config, folder=folder, wait=wait, timeout=timeout
        )
    return VLLMEngine(
        model,
        processor,
        dtype=dtype,
        max_model_len=longest,
        max_sequences=min(MAX_SEQUENCES, sequences * settings.vllm.tensor_parallel_size),
        settings=settings.vllm,
        frames=frames,
    )
