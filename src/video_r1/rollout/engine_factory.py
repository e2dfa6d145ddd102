"""Which engine samples, by the settings. vLLM and the model are loaded by the engine that needs them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from video_r1.chat_client import Endpoint, ServerFailure, ServerRefusal, endpoint_urls, open_endpoint
from video_r1.data.prompts import PromptBuilder, TextPrompts
from video_r1.errors import ConfigError
from video_r1.models.families import family_names, find_family
from video_r1.models.group_forward import vision_language_model
from video_r1.models.loading import (
    PIXELS_OF_ANY_MODEL,
    load_config,
    load_model,
    load_processor,
    size_multiple,
)
from video_r1.processes import process_count
from video_r1.rollout.endpoint_engine import EndpointEngine
from video_r1.rollout.engine import RolloutEngine
from video_r1.rollout.general import GeneralEngine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm.engine import VLLMEngine, generation_config
from video_r1.rollout.vllm.mrope import recorded_rule, warn_of_positions
from video_r1.rollout.vllm.server import ServerEngine, describe
from video_r1.settings.decoding import SCHEMES, DecodingSettings, addresses, has_path
from video_r1.settings.frames import FrameBudget
from video_r1.settings.vllm import VLLMSettings


def open_prompts(settings: DecodingSettings) -> tuple[Any, TextPrompts, FrameBudget]:
    """The model's processor (None at an endpoint), its prompts and its frame budget. Raises ConfigError."""
    if is_endpoint(settings.engine):
        return (
            None,
            TextPrompts(settings.prompt_template, settings.subtitles),
            settings.frame_budget(PIXELS_OF_ANY_MODEL),
        )
    assert settings.model is not None  # settings without it are refused
    processor = load_processor(settings.model, settings.trust_remote_code)
    builder = PromptBuilder(
        processor, settings.prompt_template, settings.max_prompt_length, settings.subtitles
    )
    return processor, builder, settings.frame_budget(size_multiple(processor))


def open_engine(settings: DecodingSettings, processor: Any) -> RolloutEngine:
    """The engine that generates for a command: `engine` is transformers, vllm, addresses of vLLM servers that
    serve the same checkpoint (http://a:8000,http://b:8000), or those of OpenAI-compatible endpoints, which
    have a path (http://host:8000/v1) and have `model` by that name.

    The caller closes it. Raises ConfigError for an unusable checkpoint, or a server that does not answer or
    serves another one.
    """
    assert settings.model is not None  # settings without it are refused
    if is_endpoint(settings.engine):
        key = os.environ.get(settings.key_variable)
        endpoint = Endpoint(endpoint_urls(settings.engine), key, settings.timeout)
        model, frames_as = open_endpoint(endpoint, settings.model or None, "auto")
        # A checkpoint of ours, which vLLM serves
        if settings.model and recorded_rule(settings.model):
            for one in endpoint.each():
                warn_of_positions(settings.model, positions_of(one), one.url)
        return EndpointEngine(endpoint, model, frames_as, settings.concurrency)
    warn_of_positions(settings.model, "transformers", "this engine")
    if settings.engine != "transformers":
        check_vllm_takes(load_config(settings.model, settings.trust_remote_code))
    if settings.engine.startswith("http"):
        ends = generation_config(settings.model)
        urls, timeout = addresses(settings.engine), settings.timeout
        return ServerEngine(urls, processor, ends, model=settings.model, timeout=timeout)
    if settings.engine == "vllm":
        if settings.trust_remote_code:
            raise ConfigError("engine: vllm runs no code that comes with a checkpoint; use transformers")
        longest = settings.max_prompt_length + settings.max_new_tokens
        alone = VLLMSettings(vllm_gpu_memory_utilization=0.9)
        dtype = settings.dtype
        counts = getattr(settings, "frame_counts", [settings.max_frames])
        frames = replace(settings.frame_budget(size_multiple(processor)), max_frames=max(counts))
        return VLLMEngine(
            settings.model, processor, dtype=dtype, max_model_len=longest, settings=alone, frames=frames
        )
    device = settings.device or own_device()
    remote, dtype = settings.trust_remote_code, settings.dtype
    if dtype == "auto" and computes_in_bf16(device):
        # Float32 files: half the memory and several times the speed; `dtype float32` keeps it
        written = load_config(settings.model, remote).dtype
        dtype = "bfloat16" if written in (None, torch.float32) else "auto"
    model: Any = load_model(settings.model, dtype, settings.attn_implementation, remote)
    return in_process_engine(model.to(device), processor)


def in_process_engine(model: Any, processor: Any) -> RolloutEngine:
    """What samples in this process with a model, which may be within PEFT or DistributedDataParallel."""
    known = find_family(vision_language_model(model)) is not None
    return (TransformersEngine if known else GeneralEngine)(model, processor)


def check_vllm_takes(model: Any) -> None:
    """Raises ConfigError for a model, or its config, whose prompts nobody has compared with vLLM's."""
    if find_family(model) is None:
        raise ConfigError(
            f"vLLM samples for {family_names()} alone: whether it has the trainer's prompts is not known for "
            f"{getattr(model, 'config', model).model_type}; leave use_vllm out (engine: transformers)"
        )


def positions_of(endpoint: Endpoint) -> str | None:
    """Whose rule of positions the endpoint has; None where it does not say, as plain `vllm serve`."""
    try:
        return describe(endpoint.url.removesuffix("/v1"), endpoint.key, endpoint.timeout)["positions"]
    except (ServerRefusal, ServerFailure):
        return None


def own_device() -> str:
    """The device of this process: the CPU, the GPU, or with several processes on a machine one GPU each.

    Raises ConfigError when there are more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return "cpu"
    if process_count() == 1:
        return "cuda"
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise ConfigError(f"process {place + 1} of this machine has no GPU: there are {count}; start as many")
    torch.cuda.set_device(place)
    return f"cuda:{place}"


def computes_in_bf16(device: str) -> bool:
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()


def is_endpoint(engine: str) -> bool:
    """Whether it is the addresses of OpenAI-compatible endpoints rather than those of servers of ours."""
    return engine.startswith(SCHEMES) and has_path(addresses(engine)[0])


def training_engine(
    model: Any,
    processor: Any,
    settings: VLLMSettings,
    *,
    longest: int,
    frames: FrameBudget,
    dtype: str = "auto",
    folder: str | None = None,
) -> RolloutEngine:
    """The engine that samples for the trainer of `model`.

    longest: most tokens of prompt and completion together; dtype: that of vLLM's weights in this process;
    folder: where a server finds weights. Raises ConfigError when vLLM or the server is not there.
    """
    if not settings.use_vllm:
        return in_process_engine(model, processor)
    check_vllm_takes(vision_language_model(model))
    if settings.vllm_mode == "server":
        assert settings.vllm_server_base_url is not None  # settings without it are refused
        wait = settings.vllm_server_timeout
        timeout = max(600.0, longest / 10)  # ten tokens a second
        url, ends = settings.vllm_server_base_url, model.generation_config
        return ServerEngine(url, processor, ends, folder=folder, wait=wait, timeout=timeout)
    return VLLMEngine(model, processor, dtype=dtype, max_model_len=longest, settings=settings, frames=frames)
