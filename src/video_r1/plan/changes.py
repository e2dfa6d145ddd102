"""What makes a recipe fit that does not: settings, more GPUs, other recipes.

Each change is planned itself. Those that cannot be enough are not: an update has the weights, their gradients
and the optimizer's states, whatever its sizes are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from video_r1.plan.memory import MemoryPlan, memory_plan
from video_r1.plan.sharding import sharding_of
from video_r1.recipe import Recipe
from video_r1.recipe_files import Entry, catalogue
from video_r1.settings.base import own_field_types
from video_r1.settings.commands import parse_bytes
from video_r1.settings.shared import PromptSettings
from video_r1.settings.training import TGRPOSettings

LORA = {"use_peft": True, "dtype": "bfloat16"}
MORE_GPUS = (2, 4, 8)
FOUR_BITS = 0.6  # bytes a weight, with its scales


@dataclass(frozen=True, slots=True)
class Change:
    """Settings, on so many GPUs. least: bytes of a GPU that it needs at any rate."""

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
    """Options for `plan` and for the recipe's command with which it fits, and the plan with them. Single
    changes; where none is enough, some together.
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
    """In the order of docs/recipes.md: first those that leave what is learnt as it is."""
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
    """Half as many frames; half as long completions or responses."""
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
    """What leaves least: adapters of 4-bit weights (of plain ones on the general path), activations computed
    again, short rows.
    """
    settings = {**LORA, "load_in_4bit": not plan.row.repeated, "gradient_checkpointing": True}
    for part in smaller(plan.recipe):
        settings |= part
    if plan.vllm is not None:
        settings["use_vllm"] = False
    return Change(settings, (2.0 if plan.row.repeated else FOUR_BITS) * plan.traced.parameters)


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other settings. Raises ConfigError."""
    sections = []
    for section in recipe.sections:
        own = {name: value for name, value in settings.items() if name in own_field_types(type(section))}
        sections.append(replace(section, **own))
    known = {name for section in recipe.sections for name in own_field_types(type(section))}
    other = {name: value for name, value in settings.items() if name not in known}
    return replace(recipe, sections=tuple(sections), training={**recipe.training, **other})


def fitting_recipes(plan: MemoryPlan, checkpoint: str) -> list[Entry]:
    """Packaged recipes of the same command for as many GPUs of as much memory at most; tests plan each on its
    machine. Those for the same model first, then the largest machine.
    """
    found = []
    for entry in catalogue():
        facts = entry.made_for
        memory = parse_bytes(facts.gpu_memory or "") or 0
        fits = 0 < (facts.gpus or 0) <= plan.sharding.processes and memory <= (plan.gpu_memory or 0)
        if fits and facts.command == plan.recipe.command:
            found.append((entry.checkpoint != checkpoint, -(facts.gpus or 0) * memory, entry.name, entry))
    return [entry for *_, entry in sorted(found, key=lambda row: row[:3])]
