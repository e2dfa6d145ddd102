"""Qwen3-VL-MoE: Qwen3-VL with experts in place of most feed-forward layers."""

from dataclasses import replace

from video_r1.models.families.qwen3_vl import FAMILY as DENSE

FAMILY = replace(DENSE, name="Qwen3-VL-MoE", transposed_experts=True)
