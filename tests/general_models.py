"""Tiny models of the general path: true classes and processors, random weights, no file of their own in
`models/families/`. Processors are built from their classes, tokenizers as those of `tiny_models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_tokenizer
from transformers import GenerationConfig, PreTrainedModel, Qwen2Tokenizer

CLASSES = {
    "smolvlm": "SmolVLM", "internvl": "InternVL", "llava_onevision": "LlavaOnevision", "gemma4": "Gemma4",
    "glm4v": "Glm4v", "glm46v": "Glm46V",
}  # fmt: skip
GENERAL = tuple(CLASSES)
GENERAL_ROWS = ["smolvlm", *(pytest.param(family, marks=pytest.mark.slow) for family in GENERAL[1:])]
SIDE = 32  # pixels to which most of them resize a frame
NAMES: dict[str, dict[str, str]] = {  # the special tokens of each family, by the names that processors use
    "smolvlm": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    },
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "gemma4": {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    },
    "glm4v": {"image_token": "<|image|>", "video_token": "<|video|>"},
    "glm46v": {"image_token": "<|image|>", "video_token": "<|video|>"},
}
MARKS = ("image", "video")
GLM_MARKS = [f"<|{side}_of_{kind}|>" for side in ("begin", "end") for kind in MARKS]
OTHERS: dict[str, list[str]] = {
    "glm4v": GLM_MARKS,
    "glm46v": GLM_MARKS,
    "gemma4": ["<|video|>", "<|turn>", "<turn|>"],
}
# user's turn with its visuals, assistant's turn; how a video or an image is written, and how a turn ends
TURNS: dict[str, tuple[str, str, str, str]] = {
    "smolvlm": ("<video>", "<image>", "", "<end_of_utterance>"),
    "internvl": ("<video>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"),
    "llava_onevision": ("<video>", "<image>", "<|im_start|>", "<|im_end|>"),
    "gemma4": ("<|video|>", "<|image|>", "<|turn>", "<turn|>"),
    **dict.fromkeys(("glm4v", "glm46v"), ("<|begin_of_video|><|video|><|end_of_video|>",
                    "<|begin_of_image|><|image|><|end_of_image|>", "<|im_start|>", "")),
}  # fmt: skip


def chat_template(family: str) -> str:
    """In the manner of the family's: SmolVLM ends a turn by a token of its own, GLM by none."""
    video, image, start, end = TURNS[family]
    return (
        "{%- for message in messages -%}"
        f"{start}{{{{ message['role'] }}}}{{{{ '\\n' }}}}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'video' -%}}{video}{{%- elif part['type'] == 'image' -%}}{image}"
        "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
        f"{end}{{{{ '\\n' }}}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{start}assistant{{{{ '\\n' }}}}{{%- endif -%}}"
    )


def general_tokenizer(family: str) -> Qwen2Tokenizer:
    """The byte-level tokenizer of `tiny_models`, with the family's special tokens by their names."""
    plain = tiny_tokenizer()
    names = NAMES[family]
    plain.add_special_tokens(
        {"extra_special_tokens": [*names.values(), *OTHERS.get(family, [])]},
        replace_extra_special_tokens=False,
    )
    for name, token in names.items():
        plain._set_model_specific_special_tokens({name: token})
    return plain


def general_processor(family: str) -> Any:
    """The family's own processor, for frames of few tokens."""
    tokenizer, template = general_tokenizer(family), chat_template(family)
    square, longest = {"height": SIDE, "width": SIDE}, {"longest_edge": SIDE}
    given: tuple[Any, ...] = ()
    more: dict[str, Any] = {}
    images: dict[str, Any] = {"size": square}
    videos: dict[str, Any] = {"size": square}
    if family == "smolvlm":  # 4 tokens a frame
        videos = {"size": longest, "max_image_size": longest}
        images, more = {**videos, "do_image_splitting": False}, {"image_seq_len": 4}
    elif family == "internvl":  # 4 tokens a frame
        images |= {"crop_to_patches": True, "max_patches": 2}
        more = {"image_seq_length": 4}
    elif family == "llava_onevision":  # 16 patches a frame, 4 tokens in a clip
        images |= {"image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}
        more = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "image_token": "<image>"}
    elif family == "gemma4":  # up to 70 tokens a frame, of 2 × 2 patches
        images = videos = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
        given, more = (transformers.Gemma4AudioFeatureExtractor(),), {"image_seq_length": 70}
    else:
        images = videos = {"size": {"shortest_edge": 28 * 28, "longest_edge": 64 * 56 * 56}}
    part = "GotOcr2ImageProcessor" if family == "internvl" else f"{CLASSES[family]}ImageProcessor"
    pictures = getattr(transformers, part)(**images)
    clips = getattr(transformers, f"{CLASSES[family]}VideoProcessor")(**videos)
    kind = getattr(transformers, f"{CLASSES[family]}Processor")
    return kind(*given, pictures, tokenizer, clips, chat_template=template, **more)


def general_model(family: str, processor: Any, seed: int = 0) -> PreTrainedModel:
    """Random float32 weights, two layers each in text model and tower, log-probabilities of about -6."""
    tokenizer = processor.tokenizer
    ids = {"image_token_id": processor.image_token_id}
    if family not in ("smolvlm", "internvl"):
        ids["video_token_id"] = processor.video_token_id
    text: dict[str, Any] = {
        "vocab_size": 448, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 4096,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 8, "initializer_range": 0.2,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if family == "smolvlm":
        text["model_type"] = "llama"
        more = {"scale_factor": 2}
    elif family == "internvl":
        text["model_type"] = "qwen2"
        more = {"image_seq_length": 4}
    elif family == "llava_onevision":
        text["model_type"] = "qwen2"
        vision |= {"vision_use_head": False, "model_type": "siglip_vision_model"}
        ids = {name.replace("_id", "_index"): token for name, token in ids.items()}
        more = {"image_grid_pinpoints": processor.image_processor.image_grid_pinpoints}
    elif family == "gemma4":  # a sliding window, and frames whose tokens see one another
        text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 96,
                 "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 448, "global_head_dim": 12,
                 "use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0}  # fmt: skip
        vision |= {"patch_size": 4, "pooling_kernel_size": 2, "head_dim": 16, "num_key_value_heads": 2,
                   "position_embedding_size": 128}  # fmt: skip
        vision.pop("image_size")
        ids |= {"audio_token_id": processor.audio_token_id}
    else:
        for side, mark in (("start", "begin"), ("end", "end")):
            for kind in MARKS:
                ids[f"{kind}_{side}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{mark}_of_{kind}|>")
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 48, "patch_size": 14, "image_size": 56}
        for name in ("num_hidden_layers", "num_attention_heads"):
            vision.pop(name)
        if family == "glm46v":
            text["model_type"], vision["model_type"] = "glm4v_text", "glm4v_vision"
    config = getattr(transformers, f"{CLASSES[family]}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")(
        config(text_config=text, vision_config=vision, **ids, **more)
    )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model.eval()


def general_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """Writes model, processor and chat template of a family (see GENERAL) into `folder`; returns it."""
    processor = general_processor(family)
    general_model(family, processor, seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
