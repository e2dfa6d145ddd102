"""Trains video-language models to reason over time: SFT, T-GRPO, evaluation and reports.

Public names are imported when they are first used, so that `import video_r1` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_r1.data.decoding.decoders import read_media
    from video_r1.data.decoding.media import Media
    from video_r1.data.manifests.records import Sample, load_manifest
    from video_r1.data.prompts import PromptBuilder
    from video_r1.errors import VideoR1Error
    from video_r1.models.loading import load_model, load_processor
    from video_r1.recipe import load_recipe
    from video_r1.settings.frames import FrameBudget
    from video_r1.training.sft import SFTConfig, SFTTrainer
    from video_r1.training.tgrpo import TGRPOConfig, TGRPOTrainer

_HOMES = {
    "FrameBudget": "settings.frames",
    "Media": "data.decoding.media",
    "read_media": "data.decoding.decoders",
    "PromptBuilder": "data.prompts",
    "Sample": "data.manifests.records",
    "load_manifest": "data.manifests.records",
    "VideoR1Error": "errors",
    "load_model": "models.loading",
    "load_processor": "models.loading",
    "load_recipe": "recipe",
    "SFTConfig": "training.sft",
    "SFTTrainer": "training.sft",
    "TGRPOConfig": "training.tgrpo",
    "TGRPOTrainer": "training.tgrpo",
}

__all__ = [
    "FrameBudget",
    "Media",
    "PromptBuilder",
    "SFTConfig",
    "SFTTrainer",
    "Sample",
    "TGRPOConfig",
    "TGRPOTrainer",
    "VideoR1Error",
    "load_manifest",
    "load_model",
    "load_processor",
    "load_recipe",
    "read_media",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'video_r1' has no attribute {name!r}")
    return getattr(importlib.import_module(f"video_r1.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
