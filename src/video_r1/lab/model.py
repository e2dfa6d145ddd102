"""The small model: a real Qwen2.5-VL of 1.7 million weights, with tokenizer, processor and chat template.

It is an ordinary checkpoint folder. `lab_pretraining` makes the base that ships with the package from it.
"""

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SIDE = 56  # pixels of a frame as the model sees it: 2 × 2 visual tokens
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def base_folder() -> Path:
    """The pretrained base that ships with the package."""
    return Path(str(resources.files("video_r1.lab") / "base"))


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


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's processor with frames of `SIDE` × `SIDE` pixels."""
    pixels = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels),
        tokenizer,
        Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random float32 weights. The short rotary period suits sequences of some hundred tokens.

    Two settings differ in kind from the large models: the rotary base is 20 and the temporal section is
    small, so that neighbouring columns and rows of a 2 × 2 grid differ enough to be told apart.
    """
    vocabulary = tokenizer.get_vocab()
    ends, pad = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]], vocabulary["<|endoftext|>"]
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ends[0],
        "pad_token_id": pad,
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "num_heads": 4,
        "intermediate_size": 256,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1],
        "tokens_per_second": 2,
    }
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, do_sample=False)
    return model
