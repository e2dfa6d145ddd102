"""Qwen3-VL (arXiv 2511.21631): a time in words before each temporal patch, DeepStack, resampled positions."""

from video_r1.models.family import Family

TOWER_LINEAR = (
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])|(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
)
TIMESTAMP_TOKENS = 10
FAMILY = Family("Qwen3-VL", TOWER_LINEAR, timestamp_tokens=TIMESTAMP_TOKENS, resampled_positions=True)
