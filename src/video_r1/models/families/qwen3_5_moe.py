"""Qwen3.5-MoE: Qwen3.5 with experts in place of its feed-forward layers, one of them for every token."""

from dataclasses import replace

from video_r1.models.families.qwen3_5 import FAMILY as DENSE

FAMILY = replace(
    DENSE, name="Qwen3.5-MoE", state_functions="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"
)
