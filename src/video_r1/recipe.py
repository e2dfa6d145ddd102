"""Recipes: a YAML file of flat `setting: value` lines plus overrides, resolved into checked settings.

`base: RECIPE` inherits another recipe's settings. A base's path is relative to the file's folder, all other
paths to the working directory.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

from video_r1.availability import may_have_gpu
from video_r1.commands import COMMANDS, TRAINS
from video_r1.errors import ConfigError, RequestError, without_secrets
from video_r1.files import replace_text
from video_r1.recipe_files import MadeFor, counterpart, model_folder, read_recipe, take_facts
from video_r1.settings.base import (
    Problem,
    Settings,
    flat,
    flat_types,
    grouped,
    own_field_types,
    raise_problems,
)
from video_r1.settings.decoding import PROTOCOLS
from video_r1.settings.training_record import adopted
from video_r1.settings.trl import overridden, translated
from video_r1.settings.types import alternatives, parse

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Recipe:
    """Resolved settings of a command. training: `TrainingArguments` fields that no section has. overrides:
    options of the command line, as written.
    """

    command: str
    sections: tuple[Settings, ...]
    training: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    made_for: MadeFor = field(default_factory=MadeFor)
    overrides: dict[str, Any] = field(default_factory=dict)

    def section(self, kind: type[S]) -> S:
        """Return the section of the class `kind` or a subclass. Raises KeyError."""
        for section in self.sections:
            if isinstance(section, kind):
                return section
        raise KeyError(f"the command {self.command} has no {kind.__name__}")

    def values(self) -> dict[str, Any]:
        """Return all settings in one flat mapping, as written in a recipe."""
        values: dict[str, Any] = {}
        for section in self.sections:
            values |= dataclasses.asdict(section)
        return values | self.training

    def arguments_for(self, config_class: type) -> dict[str, Any]:
        """Return the settings that are fields of a dataclass such as TGRPOConfig, as keyword arguments."""
        names = {f.name for f in dataclasses.fields(config_class)}
        return {name: value for name, value in self.values().items() if name in names}


def load_recipe(
    command: str, source: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe, apply the overrides (text or values of the right type) and check everything.

    source: path or name of a recipe; None starts from the defaults. Settings that are not given have the
    defaults of the protocol, then the frames, template and number format that the checkpoint was trained with
    (settings/training_record.py). Raises ConfigError with every problem and the origin of each setting, and
    RequestError when the recipe cannot be read.
    """
    types, trains = COMMANDS[command].types(), COMMANDS[command].plans_training
    values, origins = read_recipe(source, types) if source is not None else ({}, {})
    made_for = take_facts(values, origins)
    if source is not None:
        own = {each: COMMANDS[each].types().keys() & values.keys() for each in TRAINS}
        stages = [each for each in TRAINS if own[each] - own["rl" if each == "sft" else "sft"]]
        stage = stages[0] if len(stages) == 1 else None  # the only command that has some of these settings
        made_for = dataclasses.replace(made_for, command=made_for.command or stage)
        check_command(command, str(source), made_for, values.get("model_name_or_path"))
    overrides = {name.replace("-", "_"): value for name, value in (overrides or {}).items()}
    values = overridden(values, flat(overrides, types))
    origins |= {name: f"option --{name}" for name in flat(overrides, types)}
    values, refused = translated(values) if trains else (values, [])
    known = flat_types(types)
    imported = training_argument_types() if trains and values.keys() - known.keys() else {}
    settings, found = parse_values(command, values, {**imported, **known})
    found += refused
    for name in ("model_name_or_path", "model", "model_config", "teacher", "teacher_model_name_or_path"):
        if name in settings:
            settings[name] = model_folder(settings[name])
    settings = PROTOCOLS.get(str(settings.get("protocol")), {}) | settings
    checkpoint = settings.get("model_name_or_path") or settings.get("model") or settings.get("teacher")
    carried = types.keys() - ({"dtype"} if trains else set())  # training keeps the file's number format
    settings = grouped(settings | adopted(checkpoint, settings, carried), types)
    sections = []
    for kind in COMMANDS[command].sections:
        names = own_field_types(kind)
        try:
            sections.append(kind(**{name: value for name, value in settings.items() if name in names}))
        except ConfigError as error:
            found += error.problems
    for name in COMMANDS[command].required:
        if settings.get(name) is None and name not in dict(found):
            found.append((name, f"is missing; set it in the recipe or with --{name}"))
    raise_problems(found, origins)
    extra = {name: value for name, value in settings.items() if name not in types}
    source = None if source is None else str(source)
    return Recipe(command, tuple(sections), extra, source, made_for, overrides)


@cache
def training_argument_types() -> dict[str, Any]:
    """Return name and type of every field of TrainingArguments, an enum as the Literal of its values.

    The import takes torch and some seconds: it is for names that are no settings of this project.
    """
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    for name, hint in hints.items():
        enums = [each for each in alternatives(hint) if isinstance(each, type) and issubclass(each, Enum)]
        hints[name] = Literal[tuple(choice.value for choice in enums[0])] if enums else hint
    return {each.name: hints[each.name] for each in dataclasses.fields(TrainingArguments) if each.init}


def check_command(command: str, source: str, made_for: MadeFor, start: Any) -> None:
    theirs = made_for.command
    if theirs in (None, command) or (command == "plan" and theirs in TRAINS):
        return
    if command == "plan":
        raise RequestError(f"{source} is a recipe for {theirs}; a plan is of one for {' or '.join(TRAINS)}")
    other = counterpart(command, start, made_for)
    instead = f"{other} is the one for {command}" if other else "see video-r1 recipes"
    raise RequestError(f"{source} is a recipe for {theirs}, not for {command}; {instead}")


def check_machine(recipe: Recipe) -> None:
    """Raise RequestError, before torch is imported, for a training in bf16 on a machine without a GPU, and
    for processes that cannot be divided among vLLMs.
    """
    values, needed = recipe.values(), recipe.made_for
    in_process = recipe.command == "rl" and values["engine"] == "vllm"
    size, processes = in_process and values["vllm"]["tensor_parallel_size"], os.environ.get("WORLD_SIZE", 1)
    if size and int(processes) % size:
        raise RequestError(
            f"vllm_tensor_parallel_size is {size}, which must divide the number of processes ({processes}): "
            "set it to 1, or start a process on each GPU"
        )
    if recipe.command in TRAINS and values["bf16"] and not values.get("use_cpu") and not may_have_gpu():
        machine = f" (it is made for {needed.machine})" if needed.gpus else ""
        raise RequestError(
            f"{recipe.source or 'bf16'} needs a GPU{machine}, and this machine has none: try it here with "
            "--smoke, or run it on the CPU with --use_cpu --bf16 false"
        )


def parse_values(
    command: str, values: Mapping[str, Any], types: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    settings: dict[str, Any] = {}
    found: list[Problem] = []
    for name, value in values.items():
        if name not in types:
            found.append((name, unknown_setting(command, name, types)))
            continue
        try:
            settings[name] = parse(value, types[name])
        except ValueError as error:
            found.append((name, f"is {value!r}; it must be {error}"))
    return settings, found


USUAL_NAMES = {
    "lr": ["learning_rate"],
    "epochs": ["num_train_epochs"],
    "batch_size": ["per_device_train_batch_size"],
    "model": ["model_name_or_path", "teacher", "adapter"],
    "endpoint": ["engine", "teacher"],
    "url": ["engine", "teacher"],
    "address": ["engine", "teacher"],
}
"""Settings that a common name can mean, by that name."""


REMOVED = {
    "num_shuffled_generations": "its name is num_contrast_generations",
    "self_reflection_phrases": "the phrases that are counted are fixed: remove it",
}
"""Settings of earlier versions, and what to do instead."""


def unknown_setting(command: str, name: str, known: Collection[str]) -> str:
    if name in REMOVED:
        return f"is no setting any more; {REMOVED[name]}"
    others = [other for other, each in COMMANDS.items() if name in flat_types(each.types())]
    usual = [meant for meant in USUAL_NAMES.get(name, ()) if meant in known]
    close = usual or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    belongs = f"it is a setting of {', '.join(others)}; " if others and not usual else ""
    return f"is not a setting of {command}; {hint}{belongs}see video-r1 {command} --help"


def save_resolved(settings: Recipe | Settings, folder: str | Path) -> Path:
    """Write `config.yaml`, all settings as a recipe that can be run again, in one step. Returns its path.

    settings: a Recipe, or one object such as a TGRPOConfig. Raises RequestError.
    """
    path = Path(folder) / "config.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, resolved_text(settings))
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"{path}: cannot be written: {reason}; choose another output_dir") from error
    return path


def resolved_text(settings: Recipe | Settings) -> str:
    """Return all settings as a recipe that can be run again."""
    if isinstance(settings, Recipe):
        title = f"video-r1 {settings.command}" + (f", from {settings.source}" if settings.source else "")
    else:
        title = type(settings).__name__
    text = yaml.safe_dump(resolved(settings), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"# {title}; video-r1 {metadata.version('video-r1')}\n{text}"


def resolved(settings: Recipe | Settings) -> dict[str, Any]:
    """Return all settings by name, in YAML's types, without tokens and other secrets."""
    if isinstance(settings, Recipe):
        values = settings.values()
    else:
        as_dictionary = getattr(settings, "to_dict", None)  # TrainingArguments hides its tokens there
        values = as_dictionary() if as_dictionary is not None else dataclasses.asdict(settings)
    return plain({name: value for name, value in values.items() if not name.endswith("_token")})


def plain(value: Any) -> Any:
    """Convert the value to JSON's types: mappings, lists, numbers, text without secrets."""

    def converted(other: Any) -> Any:
        return (
            dataclasses.asdict(other) if isinstance(other, Settings) else getattr(other, "value", str(other))
        )

    text = json.dumps(value, default=converted)
    return json.loads(without_secrets(text))
