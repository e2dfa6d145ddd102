"""Every setting of the commands, as plain dataclasses. Importing this module does not import torch.

A field carries its own help text; the command line reads it from here. Building a settings object checks it:
types first, then values and contradictions, and one ConfigError names all problems.

The trainers' configs mix these classes with `transformers.TrainingArguments`:

    class TGRPOConfig(TGRPOSettings, VLLMSettings, PromptSettings, TrainingArguments)

so every field of `TrainingArguments` is a setting too, with this project's default where one is named here.
Settings that TRL's `GRPOConfig` has keep its names. Defaults are those of the paper (arXiv 2503.21776).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from video_r1.errors import ConfigError
from video_r1.setting_types import describe_type, field_types, matches

if TYPE_CHECKING:
    from video_r1.data.media import FrameBudget

Problem = tuple[str, str]
"""The name of a setting, and what is wrong with its value and what to do."""

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy",
]  # fmt: skip
"""Those of `transformers.SchedulerType`."""

SELF_REFLECTION_PHRASES = (
    "wait", "hold on", "let me check", "let me re-check", "let me think again", "let me look again",
    "on second thought", "re-examine", "reconsider", "double-check", "verify", "actually,",
)  # fmt: skip


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text. Lists and dictionaries are copied for each object."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class Settings:
    """Base of all settings: checks itself when it is built. Raises ConfigError with every problem found."""

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)  # TrainingArguments, when mixed with it
        if parent is not None:
            try:
                parent()
            except ValueError as error:
                raise ConfigError(f"transformers refuses these settings: {error}") from error
        check_settings(self)

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the values, given that their types are right. Overrides call super() first."""
        yield from ()


@dataclass(kw_only=True)
class PromptSettings(Settings):
    """Frames and prompts"""

    fps: float = setting(2.0, "frames per second of clip to aim for")
    min_frames: int = setting(4, "fewest frames of a video (a shorter clip gives what it has)")
    max_frames: int = setting(16, "most frames of a video")
    frame_pixels: int = setting(128 * 28 * 28, "area of one video frame after resizing, in pixels")
    image_pixels: int = setting(512 * 28 * 28, "area of an image after resizing, in pixels")
    max_prompt_length: int = setting(16384, "longest prompt in tokens; longer ones are skipped")
    prompt_template: str | None = setting(None, "file with the text template (default: the built-in one)")
    media_seconds: float = setting(
        120.0, "time in which a file must be decoded, else it is unusable; 0: no limits, no worker processes")
    media_memory_mb: int = setting(4096, "memory that decoding one file may take, in MB, else it is unusable")
    frame_cache: str | None = setting(None, "folder for resized frames, shared by all stages and later runs")
    frame_cache_gb: float = setting(100.0, "size limit of that folder; the least recently used frames go")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from positive(self, "fps", "min_frames", "max_frames", "frame_pixels", "image_pixels")
        yield from positive(self, "max_prompt_length", "frame_cache_gb")
        yield from at_least(self, 0, "media_seconds")
        yield from at_least(self, 64, "media_memory_mb")
        if self.max_frames < self.min_frames:
            yield "max_frames", f"is {self.max_frames}, below min_frames ({self.min_frames}); raise it"

    def frame_budget(self, size_multiple: int) -> FrameBudget:
        """The frame budget of a model whose frame sides are multiples of `size_multiple` (patch × merge)."""
        from video_r1.data.media import FrameBudget  # imports torch

        return FrameBudget(
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            frame_pixels=self.frame_pixels,
            image_pixels=self.image_pixels,
            size_multiple=size_multiple,
            seconds=self.media_seconds,
            memory=self.media_memory_mb << 20,
        )


@dataclass(kw_only=True)
class LoadingSettings(Settings):
    """Loading"""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "number format of the weights")
    attn_implementation: str | None = setting(None, "attention kernel: sdpa, flash_attention_2, ...")
    trust_remote_code: bool = setting(False, "run Python code that comes with the checkpoint")


@dataclass(kw_only=True)
class ModelSettings(LoadingSettings):
    """Model"""

    model_name_or_path: str | None = setting(None, "checkpoint folder or Hugging Face model id")
    freeze_vision_tower: bool = setting(False, "leave the vision tower's weights as they are")
    use_peft: bool = setting(False, "train LoRA adapters instead of all weights (needs the extra 'lora')")
    lora_r: int = setting(64, "rank of the adapters")
    lora_alpha: int = setting(128, "their output is multiplied by lora_alpha / lora_r")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_target_modules: list[str] | None = setting(
        None, "modules to adapt (default: all linear layers of the language model)")
    lora_vision_tower: bool = setting(False, "adapt the linear layers of the vision tower too")
    load_in_4bit: bool = setting(False, "QLoRA: the frozen weights in 4 bits (needs bitsandbytes)")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from positive(self, "lora_r", "lora_alpha")
        yield from within(self, "lora_dropout", 0, 1)
        if self.lora_target_modules and not self.use_peft:
            yield "lora_target_modules", "is set while use_peft is false; set use_peft to true or remove it"
        for name in ("lora_vision_tower", "load_in_4bit"):
            if getattr(self, name) and not self.use_peft:
                yield name, "is true while use_peft is false: 4-bit weights and a frozen tower need adapters"
        if self.lora_vision_tower and self.lora_target_modules:
            yield "lora_vision_tower", "is true while lora_target_modules names modules; name its own there"


@dataclass(kw_only=True)
class ManifestSettings(Settings):
    """Manifest"""

    media_root: str | None = setting(None, "folder that media paths start at (default: the manifest's)")
    allow_urls: bool = setting(False, "accept rows whose media are http(s) URLs")


@dataclass(kw_only=True)
class DataSettings(ManifestSettings):
    """Data"""

    train_manifest: str | None = setting(None, "JSON or JSON-lines file, or a Hugging Face data set id")
    eval_manifest: str | None = setting(None, "held-out manifest for validation (see eval_strategy)")


@dataclass(kw_only=True)
class TrainingSettings(Settings):
    """Training"""

    output_dir: str | None = setting(None, "run folder: checkpoints, metrics, recorded rollouts")
    seed: int = setting(42, "seed of everything random")
    learning_rate: float = setting(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Schedule = setting("cosine", "learning-rate schedule")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    max_grad_norm: float = setting(5.0, "gradients are scaled down to this norm")
    per_device_train_batch_size: int = setting(1, "questions per device and forward pass")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimizer step")
    num_train_epochs: float = setting(1.0, "passes over the training manifest")
    max_steps: int = setting(-1, "optimizer steps; overrides num_train_epochs when above 0")
    bf16: bool | None = setting(None, "bfloat16 mixed precision (default: where the device has it)")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    logging_steps: float = setting(1, "optimizer steps between two lines of metrics.jsonl")
    save_steps: float = setting(100, "optimizer steps between two checkpoints")
    report_to: str | list[str] = setting("none", "trackers: tensorboard, trackio, wandb, ...")
    remove_unused_columns: bool = setting(False, "must stay false: the trainers read whole manifest rows")
    media_threads: int = setting(2, "threads that decode the next questions' media during a step")
    media_cache_mb: int = setting(512, "memory for decoded media that are kept for later epochs, in MB")
    early_stopping_patience: int | None = setting(
        None, "validations without a better metric_for_best_model before training stops (default: never)")
    max_skipped_updates: int = setting(5, "updates in a row with a loss that is not finite before it stops")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from positive(self, "per_device_train_batch_size", "gradient_accumulation_steps")
        yield from positive(self, "media_threads", "max_skipped_updates", "early_stopping_patience")
        metric = getattr(self, "metric_for_best_model", "not known yet")  # of TrainingArguments
        if self.early_stopping_patience and (not metric or getattr(self, "eval_strategy", "") == "no"):
            yield "early_stopping_patience", (
                "needs metric_for_best_model (eval_accuracy, for example) and eval_strategy steps or epoch")
        yield from at_least(self, 0, "learning_rate", "weight_decay", "max_grad_norm", "media_cache_mb")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            yield "num_train_epochs", (
                f"is {self.num_train_epochs} and max_steps is {self.max_steps}; one must be above 0")
        if self.remove_unused_columns:
            yield "remove_unused_columns", "is true, which would remove media and answers; leave it false"


@dataclass(kw_only=True)
class SFTSettings(TrainingSettings):
    """SFT"""

    gradient_accumulation_steps: int = setting(2, "forward passes per optimizer step")
    max_response_length: int = setting(2048, "longest response in tokens; longer ones are skipped")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from positive(self, "max_response_length")


@dataclass(kw_only=True)
class TGRPOSettings(TrainingSettings):
    """GRPO and T-GRPO"""

    num_generations: int = setting(8, "G: completions per question with its frames in order")
    num_shuffled_generations: int | None = setting(None, "completions with shuffled frames (default: G/2)")
    max_completion_length: int = setting(768, "longest completion in tokens")
    temperature: float = setting(1.0, "sampling temperature; the same one scales the trained log-probs")
    top_p: float = setting(1.0, "must stay 1: the sampled policy is the one that is trained")
    top_k: int = setting(0, "must stay 0: the sampled policy is the one that is trained")
    beta: float = setting(0.04, "weight of the KL term; 0 needs no reference model")
    epsilon: float = setting(0.2, "clip range of the policy ratio")
    epsilon_high: float | None = setting(None, "upper clip range when it differs from epsilon (DAPO)")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = setting("grpo", "how token losses are averaged")
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "whose standard deviation advantages are divided by")
    num_iterations: int = setting(1, "updates on each batch of rollouts")
    temporal_rule: Literal["margin", "threshold", "off"] = setting(
        "margin", "temporal reward: alpha·(p − p_shuffled) when above 0; alpha when p ≥ mu·p_shuffled; none")
    temporal_alpha: float = setting(0.3, "size of the temporal reward")
    temporal_threshold_mu: float = setting(1.0, "mu of the rule 'threshold'")
    correct_threshold: float = setting(0.5, "a response counts as correct above this accuracy reward")
    length_reward: float = setting(0.2, "added to a correct response of a length in length_range")
    length_range: list[int] = setting([320, 512], "lengths in tokens that earn the length reward")
    reward_weights: dict[str, float] = setting(
        {"accuracy": 1.0, "format": 1.0, "temporal": 1.0, "length": 1.0},
        "weight of each reward by name; one that is not named has 1")
    self_reflection_phrases: list[str] = setting(
        list(SELF_REFLECTION_PHRASES), "the share of completions with one of these phrases is logged")
    log_rollouts: int = setting(2, "groups recorded in rollouts.jsonl at each logging step")
    preflight_questions: int = setting(4, "questions tried first, to stop when no reward is in reach")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.num_generations < 2:
            yield "num_generations", f"is {self.num_generations}; a group needs at least 2 completions"
        if self.temporal_rule != "off" and self.shuffled_generations < 1:
            yield "num_shuffled_generations", (
                f"is {self.num_shuffled_generations} while temporal_rule is {self.temporal_rule}; "
                "use at least 1, or temporal_rule off")
        yield from positive(self, "max_completion_length", "temperature", "epsilon", "num_iterations")
        yield from at_least(self, 0, "top_k", "beta", "temporal_alpha", "temporal_threshold_mu")
        yield from at_least(self, 0, "length_reward", "log_rollouts", "preflight_questions")
        for name, off in (("top_p", 1), ("top_k", 0)):
            if getattr(self, name) != off:
                yield name, (
                    f"is {getattr(self, name)}; training scores the distribution that it samples, which has "
                    f"no cut-off: leave it at {off} and change temperature instead")
        every = self.save_steps
        if getattr(self, "save_strategy", "steps") == "steps" and every >= 1 and every % self.num_iterations:
            yield "save_steps", (
                f"is {every:g}, no multiple of num_iterations ({self.num_iterations}); a checkpoint between "
                "two updates on the same rollouts could not be continued exactly")
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            yield "epsilon_high", f"is {self.epsilon_high}, below epsilon ({self.epsilon}); raise it"
        yield from within(self, "correct_threshold", 0, 1)
        if len(self.length_range) != 2 or not 0 <= self.length_range[0] <= self.length_range[1]:
            yield "length_range", f"is {self.length_range}; it must be two token counts, smaller one first"
        elif self.length_reward > 0 and self.length_range[0] > self.max_completion_length:
            yield "length_range", (
                f"starts at {self.length_range[0]} tokens, above max_completion_length "
                f"({self.max_completion_length}), so nothing can earn it; lower it or set length_reward 0")

    @property
    def shuffled_generations(self) -> int:
        """Completions sampled with shuffled frames per video question: 0 when the temporal reward is off."""
        if self.temporal_rule == "off":
            return 0
        if self.num_shuffled_generations is not None:
            return self.num_shuffled_generations
        return max(1, self.num_generations // 2)


@dataclass(kw_only=True)
class DecodingSettings(PromptSettings, LoadingSettings):
    """Decoding"""

    frame_pixels: int = setting(256 * 28 * 28, "area of one video frame after resizing, in pixels")
    model: str | None = setting(
        None, "checkpoint folder, Hugging Face model id, or the model's name at an endpoint")
    engine: str = setting(
        "transformers", "what generates: transformers, vllm, a vLLM server's address (http://host:8000), or "
        "that of an OpenAI-compatible endpoint, which has a path (http://host:8000/v1)")
    concurrency: int = setting(16, "requests to an endpoint at once")
    key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    timeout: float = setting(600.0, "seconds for one request to an endpoint")
    device: str | None = setting(None, "device to run on, such as cpu or cuda:0 (default: automatic)")
    max_new_tokens: int = setting(1024, "longest output in tokens")
    temperature: float = setting(0.01, "sampling temperature; 0 is greedy")
    top_p: float = setting(0.001, "nucleus sampling; 1 is off")
    seed: int = setting(42, "seed of sampling and of the shuffled orders")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from positive(self, "max_new_tokens", "concurrency", "timeout")
        yield from at_least(self, 0, "temperature")
        if not 0 < self.top_p <= 1:
            yield "top_p", f"is {self.top_p}; it must be above 0 and at most 1"
        if self.engine not in ("transformers", "vllm") and not self.engine.startswith(("http://", "https://")):
            yield "engine", f"is {self.engine!r}; it must be transformers, vllm or an address with http://"


@dataclass(kw_only=True)
class EvalSettings(DecodingSettings, ManifestSettings):
    """Evaluation"""

    manifest: str | None = setting(None, "JSON or JSON-lines file, or a Hugging Face data set id")
    out: str | None = setting(None, "folder for predictions and scores")
    frames: list[int] | None = setting(None, "frame counts, such as 16,32,64 (default: max_frames)")
    order: list[Literal["ordered", "shuffled"]] = setting(
        ["ordered"], "frame orders to evaluate; both together give the temporal gap")
    batch_size: int = setting(8, "questions generated together")
    limit: int | None = setting(None, "evaluate the first N questions only")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from positive(self, "batch_size", "limit")
        if self.frames is not None and (not self.frames or min(self.frames) < 1):
            yield "frames", f"is {self.frames}; it must be one or more frame counts above 0"
        if not self.order or len(set(self.order)) < len(self.order):
            yield "order", f"is {self.order}; name ordered, shuffled or both, each once"

    @property
    def frame_counts(self) -> list[int]:
        return [self.max_frames] if self.frames is None else self.frames


@dataclass(kw_only=True)
class AskSettings(DecodingSettings):
    """Question"""

    path: str | None = setting(None, "video or image file")
    question: str | None = setting(None, "the question")
    options: list[str] = setting([], "options of a multiple-choice question")
    problem_type: Literal["multiple choice", "numerical", "OCR", "free-form", "regression"] | None = setting(
        None, "kind of answer wanted (default: multiple choice when there are options, else free-form)")
    start: float | None = setting(None, "start of the window of the clip, in seconds")
    end: float | None = setting(None, "end of the window of the clip, in seconds")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.start is not None and self.end is not None and self.end <= self.start:
            yield "end", f"is {self.end} s, not after start ({self.start} s)"
        if self.problem_type == "multiple choice" and len(self.options) < 2:
            yield "options", f"has {len(self.options)} entries; a multiple-choice question needs at least 2"


def positive(settings: Settings, *names: str) -> Iterator[Problem]:
    """A problem for each named setting that is neither None nor above 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            yield name, f"is {value}; it must be above 0"


def at_least(settings: Settings, least: float, *names: str) -> Iterator[Problem]:
    """A problem for each named setting that is below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            yield name, f"is {getattr(settings, name)}; it must be at least {least}"


def within(settings: Settings, name: str, low: float, high: float) -> Iterator[Problem]:
    """A problem when the setting is not in [low, high)."""
    if not low <= getattr(settings, name) < high:
        yield name, f"is {getattr(settings, name)}; it must be at least {low} and below {high}"


def check_settings(settings: Settings) -> None:
    """Check types, then values. Raises ConfigError with all problems."""
    types = own_field_types(type(settings))
    found = [
        (name, f"is {getattr(settings, name)!r}; it must be {describe_type(hint)}")
        for name, hint in types.items()
        if not matches(getattr(settings, name), hint)
    ]
    raise_problems(found or list(settings.problems()))


def raise_problems(found: list[Problem], origins: Mapping[str, str] | None = None) -> None:
    """Raise one ConfigError that lists the problems, if any, each with where its setting came from."""
    if found:
        origins = origins or {}
        lines = (f"{name} ({origins[name]})" if name in origins else name for name, _ in found)
        text = "; ".join(f"{line} {problem}" for line, (_, problem) in zip(lines, found, strict=True))
        raise ConfigError(text, tuple(found))


def own_field_types(kind: type) -> Mapping[str, Any]:
    """Name and type of the fields that Settings classes declare, without those of classes mixed in."""
    types: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Settings):
            types.update(field_types(base))
    return types
