"""Configs of the published checkpoints that the recipes name, as their config.json says the shapes."""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig


def qwen2_5_vl(
    hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int, tied: bool
) -> PreTrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151936 if tied else 152064, "hidden_size": hidden,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "max_position_embeddings": 128000, "tie_word_embeddings": tied, "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "tokens_per_second": 2,
        },
        tie_word_embeddings=tied,
    )  # fmt: skip


def qwen3_vl(
    hidden: int,
    layers: int,
    feed_forward: int,
    tied: bool,
    depth: int,
    vision_hidden: int,
    deepstack: list[int],
) -> PreTrainedConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": feed_forward,
            "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 262144, "tie_word_embeddings": tied, "bos_token_id": None,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": depth, "hidden_size": vision_hidden, "num_heads": 16, "out_hidden_size": hidden,
            "intermediate_size": 4096 if depth == 24 else 4304, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 2304, "deepstack_visual_indexes": deepstack,
        },
        tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES = {
    # billions of weights, config
    "Qwen/Qwen2.5-VL-7B-Instruct": (8.29, qwen2_5_vl(3584, 28, 28, 4, 18944, tied=False)),
    "Qwen/Qwen2.5-VL-3B-Instruct": (3.75, qwen2_5_vl(2048, 36, 16, 2, 11008, tied=True)),
    "Qwen/Qwen3-VL-8B-Instruct": (8.77, qwen3_vl(4096, 36, 12288, False, 27, 1152, [8, 16, 24])),
    "Qwen/Qwen3-VL-4B-Instruct": (4.44, qwen3_vl(2560, 36, 9728, True, 24, 1024, [5, 11, 17])),
}
