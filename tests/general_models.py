"""Tiny models of the general path: true classes and processors, random weights, no file of their own in
`models/families/`. Processors are built from their classes, tokenizers as those of `tiny_models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GenerationConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    Qwen2Tokenizer,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

GENERAL = ("smolvlm", "internvl", "llava_onevision", "gemma4", "glm4v", "glm46v")
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
    "glm4v": ("<|begin_of_video|><|video|><|end_of_video|>", "<|begin_of_image|><|image|><|end_of_image|>",
              "<|im_start|>", ""),
    "glm46v": ("<|begin_of_video|><|video|><|end_of_video|>", "<|begin_of_image|><|image|><|end_of_image|>",
               "<|im_start|>", ""),
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
    square = {"height": SIDE, "width": SIDE}
    if family == "smolvlm":  # 4 tokens a frame
        pictures = SmolVLMImageProcessor(
            size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
        )
        clips = SmolVLMVideoProcessor(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
        return SmolVLMProcessor(pictures, tokenizer, clips, image_seq_len=4, chat_template=template)
    if family == "internvl":  # 4 tokens a frame
        pictures = GotOcr2ImageProcessor(size=square, crop_to_patches=True, max_patches=2)
        clips = InternVLVideoProcessor(size=square)
        return InternVLProcessor(pictures, tokenizer, clips, image_seq_length=4, chat_template=template)
    if family == "llava_onevision":  # 16 patches a frame, 4 tokens in a clip
        pinpoints = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
        pictures = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints)
        clips = LlavaOnevisionVideoProcessor(size=square)
        return LlavaOnevisionProcessor(
            pictures, tokenizer, clips, 16, "full", chat_template=template, image_token="<image>"
        )
    if family == "gemma4":  # up to 70 tokens a frame, of 2 × 2 patches
        patches: Any = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
        return Gemma4Processor(
            Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(**patches), tokenizer,
            Gemma4VideoProcessor(**patches), chat_template=template, image_seq_length=70,
        )  # fmt: skip
    pixels: Any = {"shortest_edge": 28 * 28, "longest_edge": 64 * 56 * 56}
    if family == "glm4v":
        return Glm4vProcessor(Glm4vImageProcessor(size=pixels), tokenizer, Glm4vVideoProcessor(size=pixels),
                              chat_template=template)  # fmt: skip
    return Glm46VProcessor(Glm46VImageProcessor(size=pixels), tokenizer, Glm46VVideoProcessor(size=pixels),
                           chat_template=template)  # fmt: skip


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
    torch.manual_seed(seed)
    if family == "smolvlm":
        text["model_type"] = "llama"
        model = SmolVLMForConditionalGeneration(
            SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, **ids)
        )
    elif family == "internvl":
        text["model_type"] = "qwen2"
        model = InternVLForConditionalGeneration(
            InternVLConfig(text_config=text, vision_config=vision, image_seq_length=4, **ids)
        )
    elif family == "llava_onevision":
        pinpoints = processor.image_processor.image_grid_pinpoints
        vision |= {"vision_use_head": False, "model_type": "siglip_vision_model"}
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                text_config=text | {"model_type": "qwen2"}, vision_config=vision,
                image_token_index=ids["image_token_id"], video_token_index=ids["video_token_id"],
                image_grid_pinpoints=pinpoints,
            )
        )  # fmt: skip
    elif family == "gemma4":  # a sliding window, and frames whose tokens see one another
        text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 96,
                 "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 448, "global_head_dim": 12,
                 "use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0}  # fmt: skip
        vision |= {"patch_size": 4, "pooling_kernel_size": 2, "head_dim": 16, "num_key_value_heads": 2,
                   "position_embedding_size": 128}  # fmt: skip
        vision.pop("image_size")
        ids |= {"audio_token_id": processor.audio_token_id}
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, **ids))
    else:
        marks = {"image_start": "begin_of_image", "image_end": "end_of_image",
                 "video_start": "begin_of_video", "video_end": "end_of_video"}  # fmt: skip
        for name, mark in marks.items():
            ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 48, "patch_size": 14, "image_size": 56}
        for name in ("num_hidden_layers", "num_attention_heads"):
            vision.pop(name)
        if family == "glm4v":
            model = Glm4vForConditionalGeneration(Glm4vConfig(text_config=text, vision_config=vision, **ids))
        else:
            parts = {
                "text_config": text | {"model_type": "glm4v_text"},
                "vision_config": vision | {"model_type": "glm4v_vision"},
            }
            model = Glm46VForConditionalGeneration(Glm46VConfig(**parts, **ids))
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
