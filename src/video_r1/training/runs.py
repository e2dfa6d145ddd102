"""Run folders: a run starts, or resumes from the last complete checkpoint, and saves its model at the end."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from video_r1.availability import check_optimizer
from video_r1.commands import COMMANDS
from video_r1.data.decoding.frame_cache import media_state
from video_r1.data.manifests.records import Sample, kept_samples, load_manifest, samples_digest
from video_r1.data.manifests.trl_rows import is_trl_table, trl_samples
from video_r1.data.prompts import PromptBuilder
from video_r1.data.sources.media_paths import MediaPaths, media_root_of
from video_r1.errors import ConfigError
from video_r1.files import is_finished, replace_json, warn_once
from video_r1.fingerprint import contents, digest, refuse_changed
from video_r1.models.loading import add_lora, load_model, load_processor, with_trained_parts
from video_r1.processes import claimed_by_first, decided_by_first, process_count
from video_r1.recipe import Recipe, plain, resolved, unknown_setting
from video_r1.rollout.vllm.mrope import rule_of_training
from video_r1.settings.base import flat, raise_problems
from video_r1.settings.shared import (
    DataSettings,
    LoadingSettings,
    ManifestSettings,
    ModelSettings,
    PromptSettings,
)
from video_r1.settings.training_record import BUDGET, RECORD, adopted, read_record
from video_r1.settings.trl import translated
from video_r1.training.checkpoints import check_writable, last_whole_checkpoint

logger = logging.getLogger(__name__)

MEDIA_COMPARED = 1000  # files of the training questions, evenly spread: a network disk is slow to say more
LENGTHS = ("max_steps", "num_train_epochs")
MAY_CHANGE = frozenset(
    f"""
    {" ".join(LENGTHS)} per_device_train_batch_size gradient_accumulation_steps
    output_dir ddp_backend ddp_timeout report_to run_name disable_tqdm log_rollouts
    logging_steps save_steps save_strategy save_total_limit eval_steps eval_strategy
    media_threads media_cache_mb media_seconds media_memory_mb remote_cache remote_cache_gb
    judge_endpoint judge_key_variable judge_down judge_wait judge_timeout judge_concurrency
    engine vllm_server_timeout vllm_gpu_memory_utilization vllm_enable_sleep_mode
    """.split()
)
"""Settings that may differ when a run is resumed. (`check_processes` keeps the questions of a step.)"""


@dataclass
class RunArguments(PromptSettings, ManifestSettings, LoadingSettings, TrainingArguments):
    """Fields of `TrainingArguments`, and the settings of frames, prompts, media and loading."""

    command = ""  # of the settings, in messages

    @classmethod
    def understood(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Translate TRL's names. Raises ConfigError for those that are refused, and for unknown names."""
        settings, found = translated(values)
        settings = super().understood(settings)
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = settings.keys() - known
        raise_problems([*found, *((name, unknown_setting(cls.command, name, known)) for name in unknown)])
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Add the recipe's other settings to those that trackers show. (Its own entries hide tokens.)"""
        return plain({**getattr(self, "recipe_values", {}), **super().to_dict()})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.torch_compile:
            raise ConfigError(
                "torch_compile is not supported: attention is compiled and decoding uses CUDA graphs without "
                "it. Remove it"
            )
        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        deepspeed = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        if several and not devices and not deepspeed:
            self.use_cpu = True  # without a GPU, accelerate joins ranks on CPUs only with use_cpu
        elif here > devices > 0 and not self.use_cpu:
            raise ConfigError(
                f"{here} processes were started on this machine, which has {devices} GPU(s): start one for "
                "each GPU (--num_processes), or set use_cpu"
            )
        self.remove_unused_columns = False  # rows are read whole
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # of a launcher's file: `bf16` and `fp16` decide
        super().__post_init__()
        found = super().n_gpu
        if found > 1:
            logger.warning(
                "this machine has %d GPUs and this run uses one of them; to use all: accelerate launch "
                "--num_processes %d -m video_r1 … (docs/recipes.md)", found, found,
            )  # fmt: skip

    @property
    def n_gpu(self) -> int:
        """At most one GPU per rank: with more, the Trainer would use `nn.DataParallel`."""
        return min(1, super().n_gpu)


def adopt(args: Any, model: Any) -> None:
    """Set settings that were not given to those recorded in the model's checkpoint. Raises ConfigError."""
    if not isinstance(model, str | Path) and args.dtype not in ("auto", str(model.dtype).split(".")[-1]):
        raise ConfigError(
            f"dtype is {args.dtype}, but the model that is passed is loaded and has {model.dtype}: pass its "
            "path, or remove dtype"
        )
    source = model if isinstance(model, str | Path) else model.config.name_or_path
    given = {name: getattr(args, name) for name in args.given}
    for name, value in adopted(source, given, (*BUDGET, "prompt_template")).items():
        setattr(args, name, value)


def record_training(
    folder: Path, args: Any, builder: PromptBuilder, model: Any, known: Mapping[str, str]
) -> None:
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(model.dtype).removeprefix("torch.")
    facts = {"prompt_template": str(builder.template), "dtype": dtype}
    if rule := rule_of_training(model.config):
        facts["positions"] = rule
    facts |= {"processes": args.world_size, "questions_per_step": questions_per_step(vars(args))}
    facts |= {"contents": known} if known else {}
    replace_json(folder / RECORD, {name: getattr(args, name) for name in BUDGET} | facts)


def contents_of(settings: Mapping[str, Any], training: Any, validation: Any, args: Any) -> dict[str, str]:
    """Return digests of what a run is made from, by setting: models, files, the questions as they are read,
    and as `media_root` sizes and times of MEDIA_COMPARED training media.
    """
    sets = validation if isinstance(validation, dict) else {"eval_manifest": validation}
    sets = {name: samples for name, samples in {**sets, "train_manifest": training}.items() if samples}
    named = {name: value for name, value in settings.items() if isinstance(value, str) and name not in sets}
    found = {
        name: contents(value)
        for name, value in named.items()
        if name.endswith("model_name_or_path") or os.path.isfile(value)
    }
    found |= {name: f"{len(samples)} questions, {samples_digest(samples)}" for name, samples in sets.items()}
    some = (training or [])[:: 1 + len(training or ()) // MEDIA_COMPARED]
    found["media_root"] = digest([media_state(sample, args.frame_budget(1)) for sample in some])
    return {name: state for name, state in found.items() if state is not None}


def earlier_run(
    folder: Path, settings: Mapping[str, Any], known: Mapping[str, str]
) -> tuple[Path | None, bool]:
    """Return the folder's last complete checkpoint, if any, and whether the run is finished.

    known: see `contents_of`; where it is equal, a path may differ. Raises ConfigError for other settings or
    contents, or a number of ranks that cannot resume it.
    """
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None:
        return None, False
    check_processes(checkpoint, settings)
    changed = changed_settings(settings, folder)
    before = read_record(checkpoint / RECORD).get("contents", {})
    other = {name: (before[name], state) for name, state in known.items() if before.get(name, state) != state}
    if "media_root" not in changed and other.pop("media_root", None) and "train_manifest" not in other:
        warn_once(f"{folder}: some training media have changed since the run began; it resumes")
    same = {name for name, state in known.items() if before.get(name) == state}
    refused = {name: values for name, values in changed.items() if name not in MAY_CHANGE | same}
    refused |= {f"contents of {name}": states for name, states in other.items()}
    remedy = "Choose another output_dir, or remove the folder to start again"
    refuse_changed(f"output_dir {folder} holds a run", refused, remedy, ConfigError)
    finished = is_finished(folder) and not any(name in changed for name in LENGTHS)
    if finished:
        logger.warning("%s: this run is finished; remove the folder to run it again", folder)
    return checkpoint, finished


def questions_per_step(settings: Mapping[str, Any]) -> int:
    """Count the questions of an optimizer step, over all ranks."""
    own = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return int(own) * process_count()


def check_processes(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the number of questions per step, which decides its questions, has changed."""
    record = read_record(checkpoint / RECORD)
    now = questions_per_step(settings)
    before = record.get("questions_per_step", now)
    if before != now:
        each = before // process_count()
        remedy = (
            f"make per_device_train_batch_size × gradient_accumulation_steps {each}"
            if each * process_count() == before
            else f"use a number of processes that divides {before}"
        )
        raise ConfigError(
            f"{checkpoint} belongs to a run with {before} questions a step ({record['processes']} "
            f"processes); {process_count()} processes and these settings make it {now}, and some questions "
            f"would come twice or never: {remedy}"
        )
    if process_count() != record.get("processes") and (checkpoint / "latest").is_file():
        raise ConfigError(
            f"{checkpoint} was written by DeepSpeed, which shards the optimizer's state over "
            f"{record['processes']} processes and cannot load it in {process_count()}: resume with "
            f"{record['processes']}, or start another run from its weights (model_name_or_path {checkpoint})"
        )


def run_recipe(recipe: Recipe, trainer: Callable[..., Trainer], config: type[Any]) -> Path:
    """Train from a resolved recipe, or resume; return the run folder. config: of the trainer's settings.

    The model of a finished run is not loaded. Raises ConfigError when the folder belongs to a run with other
    settings, RequestError when another command writes it, VideoR1Error when it cannot be written,
    ManifestError, and what the trainer raises.
    """
    if recipe.values().get("resume_from_checkpoint"):
        raise ConfigError(
            "resume_from_checkpoint: a run resumes by itself from the last complete checkpoint in "
            "output_dir; to start another run from a checkpoint's weights, set model_name_or_path to it"
        )
    args = config(**recipe.arguments_for(config))
    folder, data = Path(args.output_dir), recipe.section(DataSettings)
    training, validation = (
        None if path is None else load_manifest(path, **data.manifest_options())
        for path in (data.train_manifest, data.eval_manifest)
    )
    if training is not None and data.keep is not None:
        training = kept_samples(training, data.keep)
    settings = resolved(recipe)
    _, finished = decided_by_first(
        lambda: earlier_run(folder, settings, contents_of(settings, training, validation, args))
    )
    if finished:
        return folder
    check_optimizer(args.optim.value)  # before weights are loaded
    check_writable(folder)
    with claimed_by_first(folder):
        model, processor = model_of(recipe)
        sets = {"train_dataset": training, "eval_dataset": validation}
        run: Any = trainer(model, args=args, **sets, processing_class=processor, recipe=recipe)
        run.train()
        if args.save_strategy == SaveStrategy.NO:
            run.publish_model()
    return folder


def changed_settings(here: Mapping[str, Any], folder: Path) -> dict[str, tuple[Any, Any]]:
    """Compare with the folder's config.yaml: map each setting that differs to (there, here)."""
    try:
        there = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError) as error:
        path = folder / "config.yaml"
        raise ConfigError(f"{path} cannot be read: {error}; choose another output_dir") from error
    types = COMMANDS["rl"].types() | COMMANDS["sft"].types()
    here, there = (flat(values, types) for values in (here, there))
    return {name: (there[name], here[name]) for name in here if name in there and there[name] != here[name]}


def model_of(recipe: Recipe) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a recipe's model and processor, with frozen parts and adapters. Raises ConfigError."""
    settings = recipe.section(ModelSettings)
    assert settings.model_name_or_path is not None  # recipes without it are refused
    model = load_model(
        settings.model_name_or_path,
        settings.dtype,
        settings.attn_implementation,
        settings.trust_remote_code,
        load_in_4bit=settings.load_in_4bit,
    )
    set_seed(int(recipe.values()["seed"]))  # new adapters are drawn at random
    model = with_trained_parts(model, settings)
    return model, load_processor(settings.model_name_or_path, settings.trust_remote_code)


Questions = (
    str | Path | Sequence[Sample] | Sequence[dict[str, Any]] | datasets.Dataset | datasets.IterableDataset
)


def as_samples(questions: Questions | dict[str, Questions] | None, places: RunArguments) -> Any:
    """Read samples from a manifest's path, a dataset, a list, or several by name. Pictures of TRL's tables go
    to the run folder. Raises ManifestError with every problem.
    """
    if isinstance(questions, dict):
        return {name: as_samples(part, places) for name, part in questions.items()}
    if questions is None:
        return None
    if isinstance(questions, (list, tuple)) and all(isinstance(question, Sample) for question in questions):
        return list(questions)
    if is_trl_table(questions):
        root = media_root_of("", places.media_root)
        paths = MediaPaths(root, places.allow_urls, places.allowed_roots)
        return trl_samples(questions, Path(str(places.output_dir)) / "media", paths, places.bad_rows)
    return load_manifest(questions, **places.manifest_options())


def given_model(
    model: str | Path | PreTrainedModel,
    processor: ProcessorMixin | None,
    peft_config: Any,
    loading: LoadingSettings,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return model and processor of a trainer's arguments; load a path or hub id. Raises ConfigError."""
    trusted = loading.trust_remote_code
    if processor is None:
        source = model if isinstance(model, (str, Path)) else model.config.name_or_path
        if not source:
            raise ConfigError(
                "the model was not loaded from a checkpoint: pass its processor as processing_class"
            )
        processor = load_processor(source, trusted)
    if isinstance(model, (str, Path)):
        model = load_model(model, loading.dtype, loading.attn_implementation, trusted)
    return model if peft_config is None else add_lora(model, config=peft_config), processor
