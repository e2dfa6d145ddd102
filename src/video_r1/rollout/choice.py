"""Which engine samples, by the settings. vLLM and the model are loaded by the engine that needs them."""

from __future__ import annotations

from typing import Any

import torch

from video_r1.config import DecodingSettings
from video_r1.errors import ConfigError
from video_r1.models.loading import load_model
from video_r1.rollout.engine import RolloutEngine
from video_r1.rollout.server import ServerEngine
from video_r1.rollout.transformers import TransformersEngine
from video_r1.rollout.vllm import VLLMEngine, described
from video_r1.vllm_settings import VLLMSettings


def open_engine(settings: DecodingSettings, processor: Any) -> RolloutEngine:
    """The engine that generates for a command: `engine` is transformers, vllm or a vLLM server's address.

    The caller closes it. Raises ConfigError for an unusable checkpoint, or a server that does not answer or
    serves another one.
    """
    assert settings.model is not None  # settings without it are refused
    if settings.engine.startswith("http"):
        return ServerEngine(settings.engine, processor, described(settings.model), model=settings.model)
    if settings.engine == "vllm":
        if settings.trust_remote_code:
            raise ConfigError("engine: vllm runs no code that comes with a checkpoint; use transformers")
        longest = settings.max_prompt_length + settings.max_new_tokens
        return VLLMEngine(settings.model, processor, dtype=settings.dtype, max_model_len=longest, memory=0.9)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(
        settings.model, settings.dtype, settings.attn_implementation, settings.trust_remote_code, device
    )
    return TransformersEngine(model, processor)


def training_engine(
    model: Any,
    processor: Any,
    settings: VLLMSettings,
    *,
    longest: int,
    dtype: str = "auto",
    folder: str | None = None,
) -> RolloutEngine:
    """The engine that samples for the trainer of `model`.

    longest: most tokens of prompt and completion together; dtype: that of vLLM's weights in this process;
    folder: where weights for a server are handed over. Raises ConfigError when vLLM or the server is not
    there.
    """
    if not settings.use_vllm:
        return TransformersEngine(model, processor)
    if settings.vllm_mode == "server":
        assert settings.vllm_server_base_url is not None  # settings without it are refused
        wait = settings.vllm_server_timeout
        return ServerEngine(settings.vllm_server_base_url, processor, model, folder=folder, wait=wait)
    return VLLMEngine(
        model,
        processor,
        dtype=dtype,
        max_model_len=longest,
        memory=settings.vllm_gpu_memory_utilization,
        sleep=settings.vllm_enable_sleep_mode and torch.cuda.is_available(),
        tensor_parallel=settings.vllm_tensor_parallel_size,
    )
