"""Real but tiny Qwen checkpoints and clips for the tests: true architectures, processors and file formats.

`tiny_checkpoint` writes a folder that every Auto class loads; `write_clip` writes an H.264 MP4.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from video_r1.lab import model as lab

CLASSES = {
    "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe",
}  # fmt: skip
FAMILIES = tuple(CLASSES)
DENSE = tuple(family for family in FAMILIES if not family.endswith("_moe"))  # without experts
FAST = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")  # one for each mechanism of the fast paths
FAMILY_ROWS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
HYBRID = ("qwen3_5", "qwen3_5_moe")  # with Gated DeltaNet layers
CORPUS = (
    "You are a helpful assistant. Think within <think></think>, then answer within <answer></answer>.",
    "Which way does the red square move? Options: A. left B. right C. up D. down. Give the letter only.",
    "<think>First the square is left, then it is right, so it moves right.</think> <answer>B</answer>",
    "How many circles appear in the video? Give a number. system user assistant seconds",
)
# The chat format of the Qwen vision models: the lab's, with the default system message.
SPECIAL_TOKENS = (
    "endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"
)  # fmt: skip
CHAT_TEMPLATE = (
    """{%- if messages[0]['role'] != 'system' and default_system -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
"""
    + lab.CHAT_TEMPLATE
)


def chat_template(family: str) -> str:
    """Qwen2-VL and Qwen2.5-VL add a default system message, later ones do not."""
    return f"{{%- set default_system = {str(not has_timestamps(family)).lower()} -%}}\n" + CHAT_TEMPLATE


def has_timestamps(family: str) -> bool:
    """Whether a text with its time stands before each temporal patch; such models' patches are 16 wide."""
    return family not in ("qwen2_vl", "qwen2_5_vl")


def tiny_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of about 400 tokens with Qwen's special tokens; any text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    trained = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        # `tokenizers` takes pairs; the annotation in transformers is of the older form.
        merges=[tuple(merge) for merge in trained["merges"]],  # pyright: ignore[reportArgumentType]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[f"<|{name}|>" for name in SPECIAL_TOKENS],
    )


def tiny_processor(family: str) -> Any:
    """The family's own processor; one merged patch is 28 (Qwen2-VL, Qwen2.5-VL) or 32 pixels wide."""
    tokenizer, template = tiny_tokenizer(), chat_template(family)
    if has_timestamps(family):
        pixels = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
        return Qwen3VLProcessor(
            Qwen2VLImageProcessor(size=pixels, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
            tokenizer,
            Qwen3VLVideoProcessor(size={"shortest_edge": 4 * 32 * 32, "longest_edge": 32 * 64 * 64}),
            chat_template=template,
        )
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    kind = Qwen2VLProcessor if family == "qwen2_vl" else Qwen2_5_VLProcessor
    images, videos = Qwen2VLImageProcessor(size=pixels), Qwen2VLVideoProcessor(size=pixels)
    return kind(images, tokenizer, videos, chat_template=template)


def tiny_model(
    family: str, tokenizer: Qwen2Tokenizer, seed: int = 0, *, for_vllm: bool = False
) -> PreTrainedModel:
    """About 0.1 M random float32 weights: 2 text layers (3 from Qwen3-VL on), grouped-query attention.

    The weights are larger than transformers' initial ones, so that greedy tokens differ from step to step.
    for_vllm: heads of 32 in place of 16, and states of 64 x 64: the smallest that its CPU kernels take.
    """
    times = 2 if for_vllm else 1
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}  # fmt: skip
    parts: dict[str, Any] = {
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
    }
    text: dict[str, Any] = {
        "vocab_size": 448,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3 if has_timestamps(family) else 2,
        "num_attention_heads": 4 // times,
        "num_key_value_heads": 2 // times,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2 * times, 3 * times, 3 * times],
        },
        "bos_token_id": None,
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
    }
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "initializer_range": 0.2}
    parts |= {"text_config": text, "vision_config": vision}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 56,
                   "fullatt_block_indexes": [1], "tokens_per_second": 2}  # fmt: skip
    else:
        text["head_dim"] = 16 * times
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48,
                   "num_position_embeddings": 16}  # fmt: skip
        if family in HYBRID:  # half of each head is rotated; two of three layers have a state
            text["rope_parameters"] |= {
                "partial_rotary_factor": 0.5,
                "mrope_section": [2 * times, times, times],
            }
            text |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"],
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "linear_key_head_dim": 64 if for_vllm else 12,
                     "linear_value_head_dim": 64 if for_vllm else 8, "initializer_range": 0.1}  # fmt: skip
        else:
            text.pop("bos_token_id")
            vision["deepstack_visual_indexes"] = [0, 1]
        if family.endswith("_moe"):
            text |= {"num_experts": 4, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 96 if for_vllm else 32}  # fmt: skip
            # Each has its own: vLLM makes layers of what it finds in a config.
            text |= {"shared_expert_intermediate_size": 32} if family in HYBRID else {"norm_topk_prob": True}
    config = getattr(transformers, f"{CLASSES[family]}Config")(**parts)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")(config)
    # States that fade slowly. With transformers' first values its chunked rule, which adds up logarithms over
    # 64 tokens in float32, is itself wrong by 3e-4 of a gradient.
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data.uniform_(0.01, 2).log_()
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["im_end"], ids["endoftext"]], pad_token_id=ids["endoftext"], do_sample=False
    )
    return model.eval()


def tiny_checkpoint(family: str, folder: Path, seed: int = 0, *, for_vllm: bool = False) -> Path:
    """Writes model, processor and chat template of a family (see FAMILIES) into `folder`; returns it."""
    processor = tiny_processor(family)
    tiny_model(family, processor.tokenizer, seed, for_vllm=for_vllm).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def moving_square(frames: int = 8, height: int = 56, width: int = 56) -> np.ndarray:
    """[T, H, W, 3] uint8: a red square crosses a grey field from left to right."""
    clip = np.full((frames, height, width, 3), 96, np.uint8)
    side = height // 4
    for index in range(frames):
        left = round(index * (width - side) / max(frames - 1, 1))
        clip[index, side : 2 * side, left : left + side] = (220, 30, 30)
    return clip


def write_clip(path: Path, frames: np.ndarray, fps: float = 8.0) -> Path:
    """Writes `frames` [T, H, W, 3] uint8 (even H and W) as an H.264 MP4 at `fps`; returns the path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]  # pyright: ignore[reportAttributeAccessIssue]
        stream.pix_fmt = "yuv420p"  # pyright: ignore[reportAttributeAccessIssue]
        for array in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):  # pyright: ignore[reportAttributeAccessIssue]
                container.mux(packet)
        for packet in stream.encode(None):  # pyright: ignore[reportAttributeAccessIssue]
            container.mux(packet)
    return Path(path)
