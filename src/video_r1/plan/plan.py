"""`video-r1 plan`: a recipe's memory on its own machine or another one, and changes with which it fits."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from video_r1.models.families import find_family
from video_r1.models.loading import load_processor
from video_r1.plan.estimate import describe_time
from video_r1.plan.memory import MemoryPlan, Sharding, memory_plan, sharding_of
from video_r1.plan.shapes import is_published, model_config
from video_r1.recipe import Recipe
from video_r1.recipe_files import catalogue, checkpoint_behind, model_folder
from video_r1.settings.base import own_field_types
from video_r1.settings.commands import GPUS, PlanSettings, parse_bytes
from video_r1.settings.shared import ModelSettings, PromptSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings
from video_r1.settings.types import default_text


def run_plan(recipe: Recipe) -> int:
    """Print the plan of a recipe; return 1 if it does not fit the GPU, else 0. Raises ConfigError."""
    fits = True
    for line in plan_lines(recipe):
        print(line, flush=True)
        fits &= not line.startswith("\ndoes not fit: ")
    return int(not fits)


def plan_lines(recipe: Recipe) -> Iterator[str]:
    """Yield the plan and, if it does not fit, changes that do.

    Raises ConfigError if the model's shape is unknown.
    """
    settings, model = recipe.section(PlanSettings), recipe.section(ModelSettings).model_name_or_path
    source = settings.model_config or (model_folder(checkpoint_behind(model)) if model else None)
    config = model_config(source)
    memory, sharding = gpu_memory(recipe), planned_sharding(recipe)
    recipe = of_stage(recipe)
    known, published = find_family(config) is not None, is_published(str(source))
    processor = None if known or published else load_processor(str(source))
    plan = memory_plan(config, recipe, gpu_memory=memory, sharding=sharding, processor=processor)
    table = " (the built-in table)" if published else ""
    yield f"shape of {source}{table}; on {sharding.name}"
    if not known:
        yield "the general path: the prompt is computed again for each completion"
    yield from memory_lines(plan)
    kinds = {int(1e9 * card.gigabytes): name for name, card in GPUS.items()}
    kind = settings.kind or kinds.get(memory or 0)
    if kind is not None:
        yield from ("", *describe_time(config, plan, kind))
    if plan.fits is False:
        yield from remedy_lines(config, plan)


def gpu_memory(recipe: Recipe) -> int | None:
    """Return the bytes of one GPU, of the options, the recipe's machine or this one; None without GPU."""
    settings, made_for = recipe.section(PlanSettings), recipe.made_for
    if settings.gpu_memory is not None:
        return parse_bytes(settings.gpu_memory)
    if settings.kind is not None:
        return int(1e9 * GPUS[settings.kind].gigabytes)
    if made_for.gpu_memory is not None:
        return parse_bytes(made_for.gpu_memory)
    if made_for.gpus is None and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None


def planned_sharding(recipe: Recipe) -> Sharding:
    """Return the GPUs and their sharding: from the options, else the settings, else the recipe's machine."""
    settings, made_for = recipe.section(PlanSettings), recipe.made_for
    gpus = settings.gpus or made_for.gpus or 1
    kind = settings.sharding
    if kind is None and not (recipe.training.get("deepspeed") or recipe.training.get("fsdp")):
        kind = made_for.sharding if gpus > 1 else "none"
    return sharding_of(recipe.training, gpus, kind)


def of_stage(recipe: Recipe) -> Recipe:
    """Return the recipe as one of the command that it is for (`rl` or `sft`), with its defaults."""
    own = recipe.made_for.command or ("rl" if recipe.source is None else "sft")
    recipe = replace(recipe, command=own)
    if recipe.command == "sft":
        given = frozenset[str]().union(*(section.given for section in recipe.sections))
        values = {name: recipe.values()[name] for name in own_field_types(SFTSettings) if name in given}
        recipe = replace(recipe, sections=(*recipe.sections, SFTSettings(**values)))
    return recipe


def memory_lines(plan: MemoryPlan) -> Iterator[str]:
    unit, name_of_unit = (2**30, "GiB") if plan.peak >= 2**30 else (2**20, "MiB")
    row, stage, model = plan.row, plan.recipe.command, plan.recipe.section(ModelSettings).model_name_or_path
    answers = "completions" if stage == "rl" else "response"
    yield (
        f"{stage} of {model}: {plan.traced.parameters / 1e9:.2f} billion weights, "
        f"{plan.traced.trainable / 1e9:.2f} trained"
    )
    yield (
        f"a question has up to {row.prompt:,} prompt tokens ({row.visual:,} visual) and "
        f"{row.completions} {answers} of up to {row.completion:,}; a pass has up to {row.tokens:,} tokens"
    )
    if row.returned:
        yield f"tools return up to {row.returned:,} tokens to each completion, {row.looks} looks"
    if plan.teacher is not None:
        yield f"the teacher reads {plan.teacher.row.visual:,} visual tokens of a question"
    for title, sizes in (("\non each GPU", plan.parts), ("peak", plan.phases)):
        yield f"{title}, {name_of_unit}"
        yield from (f"  {name:<15}{size / unit:9.2f}" for name, size in sizes.items())
    if plan.gpu_memory is None:
        return
    if (beside := plan.vllm) is not None:
        yield (
            f"vLLM: weights {beside.weights / unit:.2f}, profiling run {beside.profile / unit:.2f}, keys and "
            f"values of {beside.questions} questions at once"
        )
        if not beside.questions:
            least = math.ceil(100 * beside.least / plan.gpu_memory) / 100
            yield f"vLLM's share is too small: set vllm_gpu_memory_utilization to {least:.2f}"
    verdict = "fits" if plan.fits else "does not fit"
    yield f"\n{verdict}: {plan.peak / unit:,.2f} of {plan.gpu_memory / unit:,.2f} {name_of_unit}"


def remedy_lines(config: Any, plan: MemoryPlan) -> Iterator[str]:
    """Yield each fitting change as soon as it is found; finding one takes as long as the plan itself."""
    one, found = plan.sharding.processes == 1, False
    machine = f"{plan.sharding.processes} GPU{'' if one else 's'} of {(plan.gpu_memory or 0) / 1e9:.3g} GB"
    yield f"\nit does not fit {machine}; it fits with (peak, GiB):"
    for settings, gpus in changes(plan):
        made = memory_plan(
            config,
            changed(plan.recipe, settings),
            gpu_memory=plan.gpu_memory,
            sharding=sharding_of({}, gpus, "fsdp2") if gpus else plan.sharding,
            processor=plan.processor,
        )
        if made.fits:
            found = True
            texts = {name: default_text(value).replace(", ", ",") for name, value in settings.items()}
            options = [f"--{name} {value}" for name, value in texts.items()]
            options += [f"--gpus {gpus} --sharding fsdp2"] * bool(gpus)
            yield f"  {' '.join(options):<60}{made.peak / 2**30:9.2f}"
    if not found:
        yield "  none of the changes tried"
    yield nearest_recipe(plan) or "see video-r1 recipes for recipes by machine"


def nearest_recipe(plan: MemoryPlan) -> str | None:
    """Name the packaged recipe of a machine that this one includes: of the same model, else the largest."""
    gpus, values, fitting = plan.sharding.processes, plan.recipe.values(), []
    for entry in catalogue():
        made, memory = entry.made_for, parse_bytes(entry.made_for.gpu_memory or "")
        if made.command == plan.recipe.command and memory and memory <= (plan.gpu_memory or 0) and made.gpus:
            same = entry.checkpoint == checkpoint_behind(str(values["model_name_or_path"]))
            fitting += [(same, memory, made.gpus, entry.name)] * (made.gpus <= gpus)
    if not fitting:
        return None
    _, _, made_gpus, name = max(fitting)
    machine, more = f"{(plan.gpu_memory or 0) / 1e9:.4g}GB", f" --gpus {gpus}" * (made_gpus != gpus)
    return f"the nearest recipe for this machine: video-r1 plan {name} --gpu_memory {machine}{more}"


LORA = {"use_peft": True, "dtype": "bfloat16"}
MORE_GPUS = (2, 4, 8)


def changes(plan: MemoryPlan) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield settings and a number of GPUs (0: as planned) in the order of docs/recipes.md.

    The first ones do not change the training result. The last one is the smallest: several changes together.
    """
    values, sharding = plan.recipe.values(), plan.sharding
    batch, passes = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    if not values["gradient_checkpointing"]:
        yield {"gradient_checkpointing": True}, 0
    if batch > 1:
        yield {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch * passes}, 0
    alone = not (sharding.optimizer or sharding.master or values["use_peft"])
    if alone and "8bit" not in str(values.get("optim")):
        yield {"optim": "adamw_8bit"}, 0
    if plan.vllm is not None:
        yield {"engine": "transformers"}, 0
    elif batch * passes > 1 and "rollout" in plan.phases:
        yield {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, 0
    if not plan.row.repeated:
        shared = values["vllm"]["tensor_parallel_size"] if plan.vllm is not None else 1
        yield from (({}, gpus) for gpus in MORE_GPUS if gpus > sharding.processes and gpus % shared == 0)
    no_vllm = {"engine": "transformers"} if plan.vllm is not None and not plan.vllm.questions else {}
    if not values["use_peft"]:
        yield LORA | no_vllm, 0
    if not values["load_in_4bit"] and not plan.row.repeated:
        yield {**LORA, "load_in_4bit": True, **no_vllm}, 0
    several = {**LORA, "load_in_4bit": not plan.row.repeated, "gradient_checkpointing": True}
    for part in smaller(plan.recipe):
        yield part, 0
        several |= part
    yield several | ({"engine": "transformers"} if plan.vllm is not None else {}), 0


def smaller(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield settings with half the frames, and with half the length of completions or responses."""
    frames = recipe.section(PromptSettings)
    yield {"max_frames": max(frames.min_frames, frames.max_frames // 2)}
    if recipe.command == "sft":
        yield {"max_response_length": recipe.values()["max_response_length"] // 2}
        return
    training = recipe.section(TGRPOSettings)
    half = training.max_completion_length // 2
    ranges = {}
    if training.length_range and training.length_reward:
        lengths = [length * half // training.max_completion_length for length in training.length_range]
        ranges["length_range"] = lengths
    yield {"max_completion_length": half} | ranges


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Return the recipe with other settings. Raises ConfigError."""
    sections, other = [], dict(settings)
    for section in recipe.sections:
        own = {name: value for name, value in settings.items() if name in own_field_types(type(section))}
        sections.append(replace(section, **own))
        other = {name: value for name, value in other.items() if name not in own}
    return replace(recipe, sections=tuple(sections), training={**recipe.training, **other})
