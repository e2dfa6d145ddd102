"""Qwen2-VL (arXiv 2409.12191): a video is one block of placeholders, its time is in the rotary positions."""

from video_r1.models.family import Family

FAMILY = Family("Qwen2-VL", r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))|merger\.mlp\.[02]")
