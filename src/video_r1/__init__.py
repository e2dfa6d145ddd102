"""Trains video-language models to reason over time: SFT, T-GRPO, evaluation and reports.

Public names are imported on first use, so that `import video_r1` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_r1.data.decoding.decoders import read_media as read_media
    from video_r1.data.decoding.media import Media as Media
    from video_r1.data.manifests.records import Sample as Sample
    from video_r1.data.manifests.records import load_manifest as load_manifest
    from video_r1.data.prompts import PromptBuilder as PromptBuilder
    from video_r1.errors import VideoR1Error as VideoR1Error
    from video_r1.models.loading import load_model as load_model
    from video_r1.models.loading import load_processor as load_processor
    from video_r1.recipe import load_recipe as load_recipe
    from video_r1.settings.frames import FrameBudget as FrameBudget
    from video_r1.training.sft import SFTConfig as SFTConfig
    from video_r1.training.sft import SFTTrainer as SFTTrainer
    from video_r1.training.tgrpo import TGRPOConfig as TGRPOConfig
    from video_r1.training.tgrpo import TGRPOTrainer as TGRPOTrainer

_HOMES = {
    "FrameBudget": "settings.frames",
    "Media": "data.decoding.media",
    "PromptBuilder": "data.prompts",
    "SFTConfig": "training.sft",
    "SFTTrainer": "training.sft",
    "Sample": "data.manifests.records",
    "TGRPOConfig": "training.tgrpo",
    "TGRPOTrainer": "training.tgrpo",
    "VideoR1Error": "errors",
    "load_manifest": "data.manifests.records",
    "load_model": "models.loading",
    "load_processor": "models.loading",
    "load_recipe": "recipe",
    "read_media": "data.decoding.decoders",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'video_r1' has no attribute {name!r}")
    return getattr(importlib.import_module(f"video_r1.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
