"""Settings of several commands: frames and prompts, the model, the manifests."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from video_r1.errors import ConfigError
from video_r1.settings.base import Problem, Settings, setting
from video_r1.settings.filters import parse_keep
from video_r1.settings.frames import FrameBudget

MANIFEST_EXTENSIONS = (".json", ".jsonl")
BadRows = Literal["stop", "leave_out"]
"""Treatment of manifest rows that are no question."""
ProblemType = Literal[
    "multiple choice", "numerical", "OCR", "free-form", "regression", "math",
    "temporal grounding", "spatial grounding", "spatial-temporal grounding", "tracking",
]  # fmt: skip
"""Kind of answer of a question, as written in manifests."""


@dataclass(kw_only=True)
class RemoteSettings(Settings):
    """Files behind addresses"""

    remote_cache: str | None = setting(None, "folder of copies of remote files (~/.cache/video-r1/media)")
    remote_cache_gb: float = setting(50.0, "size limit of that folder; oldest files are removed", above=0)

    def remote_files(self) -> dict[str, Any]:
        return {"remote_cache": self.remote_cache, "remote_bytes": int(self.remote_cache_gb * 1e9)}


@dataclass(kw_only=True)
class MediaSettings(Settings):
    """Limits of decoding a file"""

    seconds: float = setting(
        120.0, "seconds to decode a file before it counts as unusable; 0: no limits, no workers", at_least=0
    )
    memory_mb: int = setting(4096, "MB that decoding a file may take, else it is unusable", at_least=64)


@dataclass(kw_only=True)
class PromptSettings(RemoteSettings):
    """Frames and prompts"""

    fps: float = setting(2.0, "frames per second of clip to aim for", above=0)
    min_frames: int = setting(4, "fewest frames of a video (a shorter clip gives what it has)", above=0)
    max_frames: int = setting(16, "most frames of a video", above=0)
    frame_pixels: int = setting(128 * 28 * 28, "area of one video frame after resizing, in pixels", above=0)
    image_pixels: int = setting(256 * 28 * 28, "largest area of an image after resizing, in pixels", above=0)
    max_prompt_length: int = setting(16384, "longest prompt in tokens; longer ones are skipped", above=0)
    prompt_template: str | None = setting(None, "file with the text template (default: the built-in one)")
    subtitles: bool = setting(False, "put a row's subtitles before the question, where it has some")
    media: MediaSettings = setting(MediaSettings, "limits of decoding a file")
    frame_cache: str | None = setting(None, "folder for resized frames, shared by all stages and later runs")
    frame_cache_gb: float = setting(100.0, "size limit of that folder; oldest files are removed", above=0)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.max_frames < self.min_frames:
            yield "max_frames", f"is {self.max_frames}, below min_frames ({self.min_frames}); raise it"

    def frame_budget(self, size_multiple: int) -> FrameBudget:
        """Return the frame budget; frame sides are multiples of `size_multiple` (patch × merge)."""
        names = ("fps", "min_frames", "max_frames", "frame_pixels", "image_pixels")
        budget = {name: getattr(self, name) for name in names}
        limits = {"seconds": self.media.seconds, "memory": self.media.memory_mb << 20}
        return FrameBudget(**budget, **limits, **self.remote_files(), size_multiple=size_multiple)


@dataclass(kw_only=True)
class LoadingSettings(Settings):
    """Loading"""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "number format of the weights")
    attn_implementation: str | None = setting(
        None, "attention of prefill and vision tower, e.g. flash_attention_2 (text training has its own)"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the checkpoint")


@dataclass(kw_only=True)
class LoraSettings(Settings):
    """LoRA"""

    r: int = setting(64, "rank of the adapters", above=0)
    alpha: int = setting(128, "their output is multiplied by lora_alpha / lora_r", above=0)
    dropout: float = setting(0.0, "dropout before the adapters", at_least=0, below=1)
    target_modules: list[str] | None = setting(
        None, "modules to adapt (default: linear layers of the text model)"
    )
    vision_tower: bool = setting(False, "adapt the linear layers of the vision tower too")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.vision_tower and self.target_modules:
            yield "vision_tower", "is true while lora_target_modules names modules; name its own there"


@dataclass(kw_only=True)
class ModelSettings(LoadingSettings):
    """Model"""

    model_name_or_path: str | None = setting(None, "checkpoint folder or Hugging Face model id")
    freeze_vision_tower: bool = setting(False, "leave the vision tower's weights as they are")
    use_peft: bool = setting(False, "train LoRA adapters instead of all weights (needs the extra 'lora')")
    lora: LoraSettings = setting(LoraSettings, "size and place of the adapters")
    load_in_4bit: bool = setting(False, "QLoRA: the frozen weights in 4 bits (needs the extra 'qlora')")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.use_peft:
            return
        if self.lora.target_modules:
            yield "lora_target_modules", "is set while use_peft is false; set use_peft to true or remove it"
        for name, asked in ("lora_vision_tower", self.lora.vision_tower), ("load_in_4bit", self.load_in_4bit):
            if asked:
                yield name, "is true while use_peft is false: 4-bit weights and a frozen tower need adapters"


@dataclass(kw_only=True)
class PlacesSettings(Settings):
    """Places of media"""

    media_root: str | None = setting(None, "folder or address of the media (default: the manifest's folder)")
    allow_urls: bool = setting(False, "accept rows whose media are addresses: https://, s3://, hf://, ...")
    allowed_roots: list[str] = setting([], "further folders that absolute paths and links may lead to")


@dataclass(kw_only=True)
class ManifestSettings(PlacesSettings):
    """Manifest"""

    bad_rows: BadRows = setting("stop", "rows that are no question: stop, or leave_out (skip and list)")

    def manifest_options(self) -> dict[str, Any]:
        names = ("media_root", "allow_urls", "allowed_roots", "bad_rows")
        return {name: getattr(self, name) for name in names}


def problems_of_out(out: str | None) -> Iterator[Problem]:
    if out is not None and not out.endswith(MANIFEST_EXTENSIONS):
        yield "out", f"is {out!r}; it must end in {' or '.join(MANIFEST_EXTENSIONS)}"


@dataclass(kw_only=True)
class DataSettings(ManifestSettings):
    """Data"""

    train_manifest: str | None = setting(None, "JSON, JSON-lines or Parquet file, address or Hugging Face id")
    eval_manifest: str | None = setting(None, "held-out manifest for validation (see eval_strategy)")
    keep: str | None = setting(
        None, "train only on questions whose pass rates fit, e.g. 'ordered - shuffled > 0.1' (default: all)"
    )

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.keep is not None:
            try:
                parse_keep(self.keep)
            except ConfigError as error:
                yield "keep", str(error).removeprefix("keep ")
