"""Checkpoints through transformers' Auto classes; frozen weights; adding and merging LoRA adapters."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from video_r1.availability import ask_the_hub, check_adapters, check_checkpoint
from video_r1.data.prompts import frame_multiple
from video_r1.errors import ConfigError, first_line
from video_r1.files import claimed, follow_umask, replace_json
from video_r1.models.families import (
    check_kind,
    family_names,
    find_family,
    text_linear_layers,
    vision_parameters,
)
from video_r1.models.group_forward import vision_language_model
from video_r1.models.lora import (
    add_adapters,
    beyond_lora,
    four_bits,
    import_peft,
    keep_codes_as_they_are,
    load_adapters,
    recorded_four_bits,
)
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training_record import RECORD, read_record

logger = logging.getLogger(__name__)

PIXELS_OF_ANY_MODEL = 28  # multiple of frame sides for models whose processor resizes to any size
_PLAIN_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
"""LoRA targets for the weights of routed experts; adapted only on request."""


def load_model(
    path: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    load_in_4bit: bool = False,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """Load a video-language model from a checkpoint folder or a hub id, in evaluation mode.

    dtype: "auto" (that of the file) or a name such as "bfloat16". attn_implementation: None leaves the choice
    to transformers. load_in_4bit: see `four_bits`; quantization_config: another way to quantise. Raises
    ConfigError if the folder is missing or incomplete, if it holds no video-language model, and if weights
    are missing, not finite or not in safetensors files.
    """
    source = checked_source(path)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype {dtype!r} is unknown; use auto, float32, bfloat16 or float16")
    quantization = four_bits() if load_in_4bit else quantization_config
    config = load_config(path, trust_remote_code)
    try:
        if quantization is not None and find_family(config) is None:
            raise ConfigError(
                f"{path}: 4-bit weights are for {family_names()}, not for {config.model_type}; remove "
                "load_in_4bit"
            )
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            quantization_config=quantization,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path}: the model cannot be loaded: {first_line(error)}") from error
    model, report = loaded
    check_kind(model)
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_" in name for name in unknown):
        raise ConfigError(
            f"{path}: these are adapters beside a model; download them and make a checkpoint: "
            "video-r1 merge FOLDER OUT"
        )
    if missing:
        raise ConfigError(f"{path}: incomplete: {len(missing)} weights are missing, e.g. {missing[0]}")
    if unknown:
        logger.warning("%s: %d weights are not part of the model, e.g. %s", path, len(unknown), unknown[0])
    for name, weight in model.named_parameters():
        if not _finite(weight):
            raise ConfigError(
                f"{path}: the weights {name} hold NaN or infinity ({weight.dtype}): the run that wrote them "
                "diverged, or this format is too small; use another checkpoint, or dtype bfloat16 or float32"
            )
    if quantization is not None:
        keep_codes_as_they_are(model)
    if is_deepspeed_zero3_enabled():
        keep_angles_exact(model)
        keep_names_of_file(model)
    if (family := find_family(config)) and family.transposed_experts:
        keep_published_layout(model)
    return model if device is None else model.to(device)


def _finite(weight: Tensor) -> bool:
    packed = hasattr(weight, "quant_state") or weight.dtype not in _PLAIN_FORMATS  # 4 bits, in any format
    if packed or weight.is_meta or not weight.numel():  # empty: of ZeRO-3
        return True
    return bool(torch.stack(weight.detach().aminmax()).isfinite().all())


def load_config(path: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a checkpoint's config. Raises ConfigError if it is unreadable or no video-language model."""
    source = checked_source(path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the model cannot be loaded: {first_line(error)}") from error
    known = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if not known and not (trust_remote_code and hasattr(config, "auto_map")):
        raise ConfigError(f"{path}: {config.model_type!r} is not a video-language model, e.g. Qwen2.5-VL")
    return config


def keep_angles_exact(model: Any) -> None:
    """Restore rotary frequencies to float32: under ZeRO-3 every new tensor gets the weights' format."""
    for module in model.modules():
        rounded = [name for name in module._non_persistent_buffers_set if "inv_freq" in name]
        for name in rounded:
            module._buffers[name] = module._buffers[name].float()
        if rounded:
            model._init_weights(module)  # transformers computes them again


def keep_names_of_file(model: Any) -> None:
    """Let a model loaded under ZeRO-3 save its weights under the names that they were loaded from.

    On this path transformers keeps every renaming of the model's type for saving, not only those that the
    file needed: since 5.24 a checkpoint with present names would be saved with those of old releases.
    """
    used = [change for change in getattr(model, "_weight_conversions", ()) if change.was_used()]
    model._weight_conversions = used


def keep_published_layout(model: Any) -> None:
    """Let a model save its experts' tensors in the layout of published checkpoints, which vLLM reads.

    transformers transposes them when it loads such a file, and does not transpose them back.
    """
    for conversion in model._weight_conversions:
        for operation in getattr(conversion, "operations", ()):
            if type(operation).__name__ == "Transpose":
                operation.check_dims = False


def load_processor(path: str | Path, trust_remote_code: bool = False) -> ProcessorMixin:
    """Tokenizer, image processor, video processor and chat template. Raises ConfigError if one is missing."""
    source = checked_source(path, with_weights=False)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:  # SmolVLM's needs num2words
        raise ConfigError(f"{path}: the processor cannot be loaded: {first_line(error)}") from error
    own = type(processor).get_attributes()
    for part in ("tokenizer", "image_processor", *(name for name in own if name == "video_processor")):
        if getattr(processor, part, None) is None:
            raise ConfigError(f"{path}: no {part} in the processor; copy the original processor files")
    if not processor.chat_template:
        raise ConfigError(f"{path}: no chat template; copy the original model's chat_template.jinja")
    return processor


def size_multiple(processor: ProcessorMixin) -> int:
    """Return the pixels that divide both sides of a frame, also for a processor that resizes it itself."""
    return frame_multiple(processor) or PIXELS_OF_ANY_MODEL


def freeze_vision(model: nn.Module) -> int:
    """Freeze the vision tower (merger included) and return its number of weights."""
    weights = vision_parameters(vision_language_model(model))
    for weight in weights:
        weight.requires_grad_(False)
    return sum(weight.numel() for weight in weights)


def merge_adapter(
    adapter: str | Path, out: str | Path, dtype: str = "auto", base_model: str | None = None
) -> Path:
    """Add a LoRA run's adapters to the weights that they were trained on and write a plain checkpoint.

    4-bit weights are dequantised first, which needs bitsandbytes. adapter: a run folder or one of its
    checkpoints. dtype: "auto" for that of the weights. base_model: in place of the one in the adapters'
    config. Returns `out`. Raises ConfigError if the folder has no adapters, if they do not fit the base
    model, or if that is no longer where it was.
    """
    source = Path(adapter)
    check_adapters(source)
    peft = import_peft()

    name = base_model or str(peft.PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    try:
        check_checkpoint(name)
    except ConfigError as error:
        raise ConfigError(
            f"{error} (the base model in {source / 'adapter_config.json'}); name it with --base_model"
        ) from error
    quantised = recorded_four_bits(source)
    if quantised is None:
        base = load_model(name, dtype)
    else:
        base = load_model(name, quantised[0], quantization_config=quantised[1])
        base = base.dequantize(None if dtype == "auto" else getattr(torch, dtype))
    model: Any = peft.PeftModel(base, peft.PeftConfig.from_pretrained(str(source)))
    load_adapters(model, source, name)
    if plain := beyond_lora(model) is None:
        add_adapters(model)
    with claimed(Path(out)):
        (model.unload() if plain else model.merge_and_unload(safe_merge=True)).save_pretrained(out)
        load_processor(source).save_pretrained(out)
        if (source / RECORD).is_file():
            record = read_record(source / RECORD)
            replace_json(Path(out, RECORD), record if dtype == "auto" else record | {"dtype": dtype})
        follow_umask(Path(out))
    return Path(out)


def add_lora(
    model: PreTrainedModel,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    vision_tower: bool = False,
    config: Any = None,
) -> Any:
    """Return the model with LoRA adapters; all other weights are frozen.

    targets: names of the modules to adapt, and EXPERTS; None for every linear layer of the text model, and of
    the tower with vision_tower. config: a peft config instead of these. Raises ConfigError if peft is not
    installed, for vision_tower on the general path, and for adapters other than plain LoRA.
    """
    peft = import_peft()
    if config is None:
        family = find_family(model)
        if family is None and vision_tower and not targets:
            raise ConfigError(
                f"lora_vision_tower: the layers to adapt in the tower of {type(model).__name__} are not "
                "known; name them, and those of the text model, in lora_target_modules"
            )
        if family is None:
            layers: str | list[str] = text_linear_layers(model)
        else:
            layers = family.text_layers
            if vision_tower:
                layers += rf"|.*\bvisual\.({family.tower_linear})"
        experts = [name for name in targets or () if name in EXPERTS]
        if experts and dropout:
            raise ConfigError(f"lora_dropout is {dropout}; adapters of {experts[0]} need lora_dropout 0")
        modules = [name for name in targets if name not in EXPERTS] if targets else layers
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules or None,
            target_parameters=experts or None, task_type="CAUSAL_LM",
        )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    if beyond := beyond_lora(adapted):
        raise ConfigError(
            f"{beyond}: rollouts support only LoRA of linear layers and experts (W + s·B·A), so the sampled "
            "policy would differ from the trained one; remove it"
        )
    return adapted


def with_trained_parts(model: PreTrainedModel, settings: ModelSettings) -> Any:
    """Return the model with frozen weights and adapters as the settings say."""
    if settings.freeze_vision_tower:
        freeze_vision(model)
    if not settings.use_peft:
        return model
    lora = settings.lora
    return add_lora(model, lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.vision_tower)


def checked_source(path: str | Path, with_weights: bool = True) -> str:
    """Return a checkpoint folder or hub id in the form that from_pretrained takes. Raises ConfigError."""
    check_checkpoint(path, with_weights)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        ask_the_hub()
    return str(folder if folder.is_dir() else path)
