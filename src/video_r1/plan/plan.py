"""`video-r1 plan`: a recipe's memory on its own machine or another one, and changes with which it fits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from video_r1.models.families import find_family
from video_r1.models.loading import load_processor
from video_r1.plan.estimate import described as describe_estimate
from video_r1.plan.estimate import estimate
from video_r1.plan.memory import MemoryPlan, Sharding, memory_plan, sharding_of
from video_r1.plan.shapes import is_published, model_config, published_processor
from video_r1.recipe import Recipe
from video_r1.recipe_files import Entry, catalogue, checkpoint_behind, model_folder
from video_r1.settings.base import own_field_types
from video_r1.settings.commands import GPUS, PlanSettings, parse_bytes
from video_r1.settings.shared import ModelSettings, PromptSettings
from video_r1.settings.training import SFTSettings, TGRPOSettings


def run_plan(recipe: Recipe) -> int:
    """Print the plan and, if it does not fit, changes and recipes that do.

    Returns 1 if the recipe does not fit the GPU, else 0. Raises ConfigError if the model's shape is unknown.
    """
    settings, model = recipe.section(PlanSettings), recipe.section(ModelSettings).model_name_or_path
    source = settings.model_config or (model_folder(checkpoint_behind(model)) if model else None)
    config = model_config(source)
    memory, sharding = gpu_memory(recipe), planned_sharding(recipe)
    recipe = of_stage(recipe)
    known, published = find_family(config) is not None, is_published(str(source))
    processor = None
    if not known:
        processor = published_processor(config.model_type) if published else load_processor(str(source))
    plan = memory_plan(
        config, recipe, gpu_memory=memory, sharding=sharding, text_tokens=settings.text_tokens,
        processor=processor,
    )  # fmt: skip
    table = " (the built-in table)" if published else ""
    print(f"shape of {source}{table}; on {sharding.name}")
    if not known:
        print("the general path: the prompt is computed again for each completion")
    print(described(plan))
    if settings.gpu is not None and recipe.command == "rl":
        found = estimate(config, recipe, plan.traced, plan.row, sharding, settings.gpu)
        print("", *describe_estimate(found), sep="\n")
    if plan.fits is not False:
        return 0
    print_remedies(config, plan, str(source), settings.text_tokens)
    return 1


def gpu_memory(recipe: Recipe) -> int | None:
    """Return the bytes of one GPU: from the options, the recipe's machine or this one; None without GPU."""
    settings, made_for = recipe.section(PlanSettings), recipe.made_for
    if settings.gpu_memory is not None:
        return parse_bytes(settings.gpu_memory)
    if settings.gpu is not None:
        return int(1e9 * GPUS[settings.gpu].gigabytes)
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
    recipe = replace(recipe, command=recipe.section(PlanSettings).stage or own)
    if recipe.command == "sft":
        given = frozenset[str]().union(*(section.given for section in recipe.sections))
        values = {name: recipe.values()[name] for name in own_field_types(SFTSettings) if name in given}
        recipe = replace(recipe, sections=(*recipe.sections, SFTSettings(**values)))
    return recipe


def print_remedies(config: object, plan: MemoryPlan, checkpoint: str, text_tokens: int) -> None:
    """Print each fitting change as soon as it is found; finding one takes as long as the plan itself."""
    command, one = plan.recipe.command, plan.sharding.processes == 1
    machine = f"{plan.sharding.processes} GPU{'' if one else 's'} of {(plan.gpu_memory or 0) / 1e9:.3g} GB"
    print(f"\nit does not fit {machine}; it fits with (peak, GiB):", flush=True)
    none = True
    for words, changed in fitting_changes(config, plan, text_tokens):
        none = False
        print(f"  {words:<60}{changed.peak / 2**30:9.2f}", flush=True)
    if none:
        print("  none of the changes tried")
    entries = fitting_recipes(plan, checkpoint)
    print(
        f"{'packaged' if entries else 'no packaged'} recipes for {command} that fit it" + ":" * bool(entries)
    )
    for entry in entries:
        print(f"  video-r1 {command} {entry.name:<24} {entry.checkpoint}: {entry.about}")


def described(plan: MemoryPlan) -> str:
    """Return the plan as text."""
    unit, name_of_unit = (2**30, "GiB") if plan.peak >= 2**30 else (2**20, "MiB")
    row, stage, model = plan.row, plan.recipe.command, plan.recipe.section(ModelSettings).model_name_or_path
    answers = "completions" if stage == "rl" else "response"
    lines = [
        f"{stage} of {model}: {plan.traced.parameters / 1e9:.2f} billion weights, "
        f"{plan.traced.trainable / 1e9:.2f} trained",
        f"a question has up to {row.prompt:,} prompt tokens ({row.visual:,} visual) and "
        f"{row.completions} {answers} of up to {row.completion:,}; a pass has up to {row.tokens:,} tokens",
        "",
        f"on each GPU, {name_of_unit}",
        *(f"  {name:<15}{size / unit:9.2f}" for name, size in plan.parts.items()),
        f"peak, {name_of_unit}",
        *(f"  {name:<15}{size / unit:9.2f}" for name, size in plan.phases.items()),
    ]
    if plan.gpu_memory is not None and plan.vllm is not None:
        beside = plan.vllm
        lines.append(
            f"vLLM: weights {beside.weights / unit:.2f}, profiling run {beside.profile / unit:.2f}, keys and "
            f"values of {beside.questions} questions at once"
        )
        if not beside.questions:
            least = math.ceil(100 * beside.least / plan.gpu_memory) / 100
            lines.append(f"vLLM's share is too small: set vllm_gpu_memory_utilization to {least:.2f}")
    if plan.gpu_memory is not None:
        verdict = "fits" if plan.fits else "does not fit"
        lines += ["", f"{verdict}: {plan.peak / unit:,.2f} of {plan.gpu_memory / unit:,.2f} {name_of_unit}"]
    return "\n".join(lines)


LORA = {"use_peft": True, "dtype": "bfloat16"}
MORE_GPUS = (2, 4, 8)
FOUR_BITS = 0.6  # bytes a weight, with its scales


@dataclass(frozen=True, slots=True)
class Change:
    """Changed settings and number of GPUs. least: lower bound of the bytes that they need on a GPU."""

    settings: dict[str, Any]
    least: float
    gpus: int = 1

    @property
    def words(self) -> str:
        options = [f"--{name} {text(value)}" for name, value in self.settings.items()]
        return " ".join(options + [f"--gpus {self.gpus} --sharding fsdp2"] * (self.gpus > 1))


def text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def fitting_changes(config: Any, plan: MemoryPlan, text_tokens: int) -> Iterator[tuple[str, MemoryPlan]]:
    """Yield options for `plan` and the recipe's command with which it fits, and the plan with them.

    Changes are tried one by one, and several together if no single change is enough. Changes whose lower
    bound does not fit are not planned.
    """
    found = False
    for change in [*single_changes(plan), None]:
        if change is None:
            if found:
                return
            change = together(plan)
        if change.least > (plan.gpu_memory or 0):
            continue
        sharding = sharding_of({}, change.gpus, "fsdp2") if change.gpus > 1 else plan.sharding
        after = memory_plan(
            config,
            changed(plan.recipe, change.settings),
            gpu_memory=plan.gpu_memory,
            sharding=sharding,
            text_tokens=text_tokens,
            processor=plan.processor,
        )
        if after.fits:
            found = True
            yield change.words, after


def single_changes(plan: MemoryPlan) -> Iterator[Change]:
    """Yield changes in the order of docs/recipes.md: first those that do not change the training result."""
    values, parts = plan.recipe.values(), plan.parts
    always = parts["weights"] + parts["gradients"] + parts["optimizer"] + parts["reference"]
    if not values["gradient_checkpointing"]:
        yield Change({"gradient_checkpointing": True}, always)
    batch, passes = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    if batch > 1:
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch * passes}
        yield Change(split, always)
    alone = not (plan.sharding.optimizer or plan.sharding.master)
    if alone and not values["use_peft"] and "8bit" not in str(values.get("optim")):
        yield Change({"optim": "adamw_8bit"}, always - parts["optimizer"] + plan.traced.states_8bit)
    if plan.vllm is not None:
        yield Change({"use_vllm": False}, always)
    elif batch * passes > 1 and "rollout" in plan.phases:
        yield Change({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, always)
    for gpus in () if plan.row.repeated else MORE_GPUS:
        if gpus > plan.sharding.processes:
            yield Change({}, always * plan.sharding.processes / gpus, gpus)
    no_vllm = {"use_vllm": False} if plan.vllm is not None and not plan.vllm.questions else {}
    if not values["use_peft"]:
        yield Change(LORA | no_vllm, 2.0 * plan.traced.parameters)
    if not values["load_in_4bit"] and not plan.row.repeated:
        yield Change({**LORA, "load_in_4bit": True, **no_vllm}, FOUR_BITS * plan.traced.parameters)
    for setting in smaller(plan.recipe):
        yield Change(setting, always)


def smaller(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield settings with half the frames, and with half the length of completions or responses."""
    frames = recipe.section(PromptSettings)
    yield {"max_frames": max(frames.min_frames, frames.max_frames // 2)}
    if recipe.command == "sft":
        yield {"max_response_length": recipe.values()["max_response_length"] // 2}
        return
    training = recipe.section(TGRPOSettings)
    half = training.max_completion_length // 2
    lengths = [length * half // training.max_completion_length for length in training.length_range]
    yield {"max_completion_length": half} | ({"length_range": lengths} if training.length_reward else {})


def together(plan: MemoryPlan) -> Change:
    """Return the smallest plan: QLoRA (LoRA on the general path), gradient checkpointing and short rows."""
    settings = {**LORA, "load_in_4bit": not plan.row.repeated, "gradient_checkpointing": True}
    for part in smaller(plan.recipe):
        settings |= part
    if plan.vllm is not None:
        settings["use_vllm"] = False
    return Change(settings, (2.0 if plan.row.repeated else FOUR_BITS) * plan.traced.parameters)


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """Return the recipe with other settings. Raises ConfigError."""
    sections = []
    for section in recipe.sections:
        own = {name: value for name, value in settings.items() if name in own_field_types(type(section))}
        sections.append(replace(section, **own))
    known = {name for section in recipe.sections for name in own_field_types(type(section))}
    other = {name: value for name, value in settings.items() if name not in known}
    return replace(recipe, sections=tuple(sections), training={**recipe.training, **other})


def fitting_recipes(plan: MemoryPlan, checkpoint: str) -> list[Entry]:
    """Return packaged recipes of the same command for this machine or a smaller one.

    Recipes for the same model come first, then those for the largest machine. Tests plan each on its machine.
    """
    found = []
    for entry in catalogue():
        facts = entry.made_for
        memory = parse_bytes(facts.gpu_memory or "") or 0
        fits = 0 < (facts.gpus or 0) <= plan.sharding.processes and memory <= (plan.gpu_memory or 0)
        if fits and facts.command == plan.recipe.command:
            found.append((entry.checkpoint != checkpoint, -(facts.gpus or 0) * memory, entry.name, entry))
    return [entry for *_, entry in sorted(found, key=lambda row: row[:3])]
