"""Settings of the engine that samples in training, and of `video-r1 serve`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from video_r1.settings.base import Problem, Settings, setting
from video_r1.settings.decoding import SCHEMES, addresses, has_path

MAX_BATCHED_TOKENS = 8192
"""Tokens of vLLM's largest batch, which `video-r1 plan` counts too; its own default depends on the GPU."""
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(kw_only=True)
class VLLMSettings(Settings):
    """vLLM. With the prefix `vllm_` the entries have the names of TRL's `GRPOConfig`."""

    gpu_memory_utilization: float = setting(0.3, "share of GPU memory for vLLM here", above=0, at_most=1)
    enable_sleep_mode: bool = setting(False, "vLLM gives its GPU memory back while the model is updated")
    tensor_parallel_size: int = setting(1, "processes that share one vLLM in training processes", above=0)
    server_timeout: float = setting(240.0, "seconds to wait for a server that does not answer", above=0)
    importance_sampling_correction: bool = setting(True, "weight tokens by trainer / vLLM probability")
    importance_sampling_mode: ImportanceMode = setting(
        "token_truncate", "weight per token or per sequence; out of bounds: truncate or mask"
    )
    importance_sampling_clip_max: float | None = setting(2.0, "largest such weight", above=0)
    importance_sampling_clip_min: float | None = setting(None, "smallest such weight", at_least=0)

    @property
    def importance_bounds(self) -> tuple[float, float]:
        """Smallest and largest importance weight."""
        largest = self.importance_sampling_clip_max
        return self.importance_sampling_clip_min or 0.0, math.inf if largest is None else largest

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        smallest, largest = self.importance_bounds
        if smallest >= largest:
            said = f"is {smallest}, not below the largest weight ({largest})"
            yield "importance_sampling_clip_min", f"{said}; lower it"


@dataclass(kw_only=True)
class EngineSettings(Settings):
    """Engine"""

    engine: str = setting(
        "transformers",
        "samples the completions: transformers, vllm (in the training processes; needs the extra 'vllm') or "
        "the address of video-r1 serve (http://host:8000)",
    )
    vllm: VLLMSettings = setting(VLLMSettings, "memory, processes and importance weights of vLLM")
    async_rollouts: int = setting(0, "1: a server samples the next step meanwhile, with weights one step old")

    @property
    def use_vllm(self) -> bool:
        return self.engine != "transformers"

    @property
    def server(self) -> str | None:
        """Address of the vLLM server that samples."""
        return self.engine if self.engine.startswith(SCHEMES) else None

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.use_vllm and self.engine != "vllm" and self.server is None:
            yield "engine", f"is {self.engine!r}; it must be transformers, vllm or an address with http://"
        elif self.server and (has_path(self.server) or len(addresses(self.server)) > 1):
            said = "training hands its weights to one video-r1 serve: give its address, http://host:8000"
            yield "engine", f"is {self.engine!r}; {said}"
        if self.async_rollouts not in (0, 1):
            yield "async_rollouts", f"is {self.async_rollouts}; rollouts are 0 or 1 step ahead of the update"
        elif self.async_rollouts and not self.server:
            said = "is 1 without a server that could sample meanwhile"
            yield "async_rollouts", f"{said}; set engine to the address of one"
        elif self.async_rollouts and not self.vllm.importance_sampling_correction:
            said = "is 1 without vllm_importance_sampling_correction, which corrects for weights one step old"
            yield "async_rollouts", f"{said}; set it to true"


@dataclass(kw_only=True)
class ServeSettings(Settings):
    """Server"""

    model: str | None = setting(None, "checkpoint folder or Hugging Face model id")
    host: str = setting("127.0.0.1", "address to listen at; set VLLM_API_KEY where others reach it")
    port: int = setting(8000, "port to listen at", above=0)
    hand_over: Literal["folder", "nccl"] = setting(
        "folder", "weight sync: by a shared folder, or from GPU to GPU"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "number format of the weights")
    max_model_len: int | None = setting(
        None, "longest prompt + completion, tokens (default: the model's)", above=0
    )
    vllm_options: str = setting("", "more options of vllm serve: --vllm_options='--tensor-parallel-size 2'")
