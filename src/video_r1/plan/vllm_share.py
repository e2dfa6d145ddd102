"""What vLLM needs of its share of a GPU in colocate mode: weights, keys and values, and its profiling run."""

import math
from dataclasses import dataclass
from typing import Any

from video_r1.plan.without_storage import Row
from video_r1.settings.training import TGRPOSettings
from video_r1.settings.vllm import VLLMSettings

BYTES = 2  # bf16
PROFILED_TOKENS = 8192  # vLLM's max_num_batched_tokens
LIVE_COPIES = 2  # of a layer's largest activations


@dataclass(frozen=True, slots=True)
class VLLMShare:
    """Bytes on one GPU: of `weights`, of the `profile` run, of keys and values of one question (`question`:
    its prompts once and all their completions), and the `share` that the settings give.
    """

    share: int
    weights: int
    profile: int
    question: int

    @property
    def questions(self) -> int:
        """Whose keys and values there is room for at once. Less than 1: it does not fit."""
        return max(0, self.share - self.weights - self.profile) // self.question

    @property
    def least(self) -> int:
        """Bytes with which one question at a time can be sampled."""
        return self.weights + self.profile + self.question


def vllm_share(
    config: Any, parameters: int, row: Row, training: TGRPOSettings, settings: VLLMSettings, gpu_memory: int
) -> VLLMShare:
    """parameters: of the model. row: its longest prompt, and the completions of a question."""
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
