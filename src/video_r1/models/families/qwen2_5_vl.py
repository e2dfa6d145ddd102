"""Qwen2.5-VL (arXiv 2502.13923): time positions in seconds (`second_per_grid_ts`), windows in the tower."""

from video_r1.models.family import Family

FAMILY = Family(
    "Qwen2.5-VL",
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_proj|up_proj|down_proj))|merger\.mlp\.[02]",
    windows=True,
)
