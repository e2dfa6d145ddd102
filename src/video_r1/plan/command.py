"""`video-r1 plan`: a recipe's memory on the machine that it is for or on another one, and what would fit."""

import math
from dataclasses import replace

import torch

from video_r1.models.families import find_family
from video_r1.models.loading import load_processor
from video_r1.plan.changes import fitting_changes, fitting_recipes
from video_r1.plan.estimate import described as describe_estimate
from video_r1.plan.estimate import estimate
from video_r1.plan.memory import MemoryPlan, memory_plan
from video_r1.plan.shapes import is_published, model_config, published_processor
from video_r1.plan.sharding import Sharding, sharding_of
from video_r1.recipe import Recipe
from video_r1.recipe_files import checkpoint_behind, model_folder
from video_r1.settings.base import own_field_types
from video_r1.settings.commands import GPUS, PlanSettings, parse_bytes
from video_r1.settings.shared import ModelSettings
from video_r1.settings.training import SFTSettings


def run_plan(recipe: Recipe) -> int:
    """Prints the plan, and where it does not fit the changes and the recipes that do.

    Returns 1 when it does not fit the GPU, else 0. Raises ConfigError without a shape.
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
        print("the general path: each completion is sampled and learnt from with a prompt of its own")
    print(described(plan))
    if settings.gpu is not None and recipe.command == "rl":
        found = estimate(config, recipe, plan.traced, plan.row, sharding, settings.gpu)
        print("", *describe_estimate(found), sep="\n")
    if plan.fits is not False:
        return 0
    print_remedies(config, plan, str(source), settings.text_tokens)
    return 1


def gpu_memory(recipe: Recipe) -> int | None:
    """Bytes of one GPU: of the options, else of the recipe's machine, else of this one; None: no GPU."""
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
    """How many GPUs and how they share: by the options, else the settings, else the recipe's machine."""
    settings, made_for = recipe.section(PlanSettings), recipe.made_for
    gpus = settings.gpus or made_for.gpus or 1
    kind = settings.sharding
    if kind is None and not (recipe.training.get("deepspeed") or recipe.training.get("fsdp")):
        kind = made_for.sharding if gpus > 1 else "none"
    return sharding_of(recipe.training, gpus, kind)


def of_stage(recipe: Recipe) -> Recipe:
    """The recipe as one of the command that it is for, with that one's defaults."""
    own = recipe.made_for.command or ("rl" if recipe.source is None else "sft")
    recipe = replace(recipe, command=recipe.section(PlanSettings).stage or own)
    if recipe.command == "sft":
        given = frozenset[str]().union(*(section.given for section in recipe.sections))
        values = {name: recipe.values()[name] for name in own_field_types(SFTSettings) if name in given}
        recipe = replace(recipe, sections=(*recipe.sections, SFTSettings(**values)))
    return recipe


def print_remedies(config: object, plan: MemoryPlan, checkpoint: str, text_tokens: int) -> None:
    """Prints each change as soon as it is found: it takes as long as the plan itself."""
    command, one = plan.recipe.command, plan.sharding.processes == 1
    machine = f"{plan.sharding.processes} GPU{'' if one else 's'} of {(plan.gpu_memory or 0) / 1e9:.3g} GB"
    print(f"\nit does not fit {machine}; it does with (most at once, GiB):", flush=True)
    none = True
    for words, changed in fitting_changes(config, plan, text_tokens):
        none = False
        print(f"  {words:<60}{changed.peak / 2**30:9.2f}", flush=True)
    if none:
        print("  nothing that was tried")
    entries = fitting_recipes(plan, checkpoint)
    what = "recipes" if entries else "no recipe that comes with the package is"
    print(f"{what} for {command} on it" + ":" * bool(entries))
    for entry in entries:
        print(f"  video-r1 {command} {entry.name:<24} {entry.checkpoint}: {entry.about}")


def described(plan: MemoryPlan) -> str:
    """The plan as text."""
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
        f"most at once, {name_of_unit}",
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
            lines.append(f"its share is too small: vllm_gpu_memory_utilization {least:.2f} would do")
    if plan.gpu_memory is not None:
        verdict = "fits" if plan.fits else "does not fit"
        lines += ["", f"{verdict}: {plan.peak / unit:,.2f} of {plan.gpu_memory / unit:,.2f} {name_of_unit}"]
    return "\n".join(lines)
