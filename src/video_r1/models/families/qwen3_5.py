"""Qwen3.5: prompts, positions and tower of Qwen3-VL without DeepStack; three of four text layers are Gated
DeltaNet, which has a state in place of keys and values."""

from video_r1.models.families.qwen3_vl import TIMESTAMP_TOKENS, TOWER_LINEAR
from video_r1.models.family import ATTENTION, FEED_FORWARD, Family

TEXT_LINEAR = (*ATTENTION, *FEED_FORWARD, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
FAMILY = Family(
    "Qwen3.5",
    TOWER_LINEAR,
    text_linear=TEXT_LINEAR,
    timestamp_tokens=TIMESTAMP_TOKENS,
    resampled_positions=True,
    state_functions="transformers.models.qwen3_5.modeling_qwen3_5",
)
