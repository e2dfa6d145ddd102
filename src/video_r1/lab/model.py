"""The small models: a real Qwen2.5-VL and a real Qwen3.5, with tokenizer, processor and chat template.

Each is an ordinary checkpoint folder. `lab/pretraining.py` makes the bases that ship with the package.
"""

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def base_folder(family: str = "qwen2_5_vl") -> Path:
    """The pretrained base that ships with the package, Qwen2.5-VL's or that of another family."""
    name = "base" if family == "qwen2_5_vl" else f"base-{family}"
    return Path(str(resources.files("video_r1.lab") / name))


def frame_side(processor: Any) -> int:
    """Pixels of a frame as the lab's models see it: 2 × 2 visual tokens of 2 × 2 patches."""
    return 4 * processor.image_processor.patch_size


# Qwen's chat format without a default system message.
CHAT_TEMPLATE = (base_folder() / "chat_template.jinja").read_text("utf-8")


def build_tokenizer(texts: Iterable[str], vocab_size: int = 640) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer trained on `texts`, with Qwen's special tokens; it encodes any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        # Pairs, as `tokenizers` takes them; the annotation in transformers names the older form.
        merges=[tuple(merge) for merge in trained["merges"]],  # pyright: ignore[reportArgumentType]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def build_processor(tokenizer: Qwen2Tokenizer, family: str = "qwen2_5_vl") -> Any:
    """The family's own processor, with frames of 56 × 56 (Qwen2.5-VL) or 64 × 64 pixels."""
    if family == "qwen3_5":
        half = [0.5] * 3
        return Qwen3VLProcessor(
            Qwen2VLImageProcessor(size=_pixels(64), patch_size=16, image_mean=half, image_std=half),
            tokenizer,
            Qwen3VLVideoProcessor(size=_pixels(64, frames=8)),
            chat_template=CHAT_TEMPLATE,
        )
    images, videos = Qwen2VLImageProcessor(size=_pixels(56)), Qwen2VLVideoProcessor(size=_pixels(56))
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def _pixels(side: int, frames: int = 1) -> dict[str, int]:
    return {"shortest_edge": side * side, "longest_edge": frames * side * side}


def build_model(tokenizer: Qwen2Tokenizer, seed: int, family: str = "qwen2_5_vl") -> PreTrainedModel:
    """Random float32 weights. The short rotary period suits sequences of some hundred tokens.

    Two settings differ in kind from the large models: the rotary base is 20 and the temporal section is
    small, so that neighbouring columns and rows of a 2 × 2 grid differ enough to be told apart. Of Qwen3.5's
    four layers the first three have a state, as in the large models.
    """
    vocabulary = tokenizer.get_vocab()
    ends, pad = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]], vocabulary["<|endoftext|>"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]}
    text: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ends[0],
        "pad_token_id": pad,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 128,
        "num_heads": 4,
        "intermediate_size": 256,
        "out_hidden_size": 128,
    }
    settings: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
    }
    torch.manual_seed(seed)
    if family == "qwen3_5":
        vision |= {"num_position_embeddings": 16}  # of a grid of 4 × 4 patches
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
        text |= {
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        }
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**settings))
        for name, weight in model.named_parameters():
            if name.endswith(
                "A_log"
            ):  # states that last for tens of tokens; at first they would fade at once
                weight.data.copy_(torch.linspace(0.02, 0.3, len(weight)).log())
    else:
        vision |= {"window_size": 112, "fullatt_block_indexes": [0, 1], "tokens_per_second": 2}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, do_sample=False)
    return model
