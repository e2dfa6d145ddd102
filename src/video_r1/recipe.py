"""Recipes: a YAML file of flat `setting: value` lines plus overrides, resolved into checked settings.

A recipe is a path, or the name of one that comes with the package (`lab-tgrpo`). `base: RECIPE` takes over
another recipe's settings, which the file's own lines override; a base that is a path starts at the file's
folder, all other paths at the folder that the command runs in.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from video_r1.commands import COMMANDS
from video_r1.errors import ConfigError, RequestError
from video_r1.files import replace_text
from video_r1.settings.base import Problem, Settings, own_field_types, raise_problems
from video_r1.settings.carried import adopted
from video_r1.settings.training_arguments import training_argument_types
from video_r1.settings.types import parse

PACKAGE = Path(str(resources.files("video_r1")))
RECIPES = PACKAGE / "recipes"
PACKAGED_MODEL = "lab-base"
"""The name by which the small pretrained base that comes with the package may be called."""

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Recipe:
    """Resolved settings of one command. `training`: `TrainingArguments` fields that no section has."""

    command: str
    sections: tuple[Settings, ...]
    training: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    def section(self, kind: type[S]) -> S:
        """The section of the class `kind` (or of a class made from it). KeyError when there is none."""
        for section in self.sections:
            if isinstance(section, kind):
                return section
        raise KeyError(f"the command {self.command} has no {kind.__name__}")

    def values(self) -> dict[str, Any]:
        """All settings in one flat mapping, as they are written in a recipe."""
        values: dict[str, Any] = {}
        for section in self.sections:
            values |= dataclasses.asdict(section)
        return values | self.training

    def arguments_for(self, config_class: type) -> dict[str, Any]:
        """Keyword arguments for a dataclass such as TGRPOConfig: the settings that are among its fields."""
        names = {f.name for f in dataclasses.fields(config_class)}
        return {name: value for name, value in self.values().items() if name in names}


def load_recipe(
    command: str, source: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe, apply the overrides and check everything.

    Args:
        command: one of COMMANDS.
        source: path or name of a recipe; None starts from the defaults.
        overrides: setting name to value, as text from an option or already of the right type.

    A checkpoint's own frames, template and number format are the defaults of the settings that neither gives
    (see settings/carried.py). Raises ConfigError with every problem and where each setting came from, and
    RequestError when the recipe cannot be read.
    """
    values, origins = read_recipe(source) if source is not None else ({}, {})
    for name, value in (overrides or {}).items():
        values[name.replace("-", "_")] = value
        origins[name.replace("-", "_")] = f"option --{name}"
    types = COMMANDS[command].types()
    trains = COMMANDS[command].plans_training
    imported = training_argument_types() if trains and values.keys() - types.keys() else {}
    settings, found = parse_values(command, values, {**imported, **types})
    for name in ("model_name_or_path", "model", "model_config", "teacher"):
        if settings.get(name) == PACKAGED_MODEL and not Path(PACKAGED_MODEL).exists():
            settings[name] = str(PACKAGE / "lab" / "base")
    checkpoint = settings.get("model_name_or_path") or settings.get("model") or settings.get("teacher")
    carried = types.keys() - ({"dtype"} if trains else set())  # updates need the file's own number format
    settings |= adopted(checkpoint, settings, carried)
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
    return Recipe(command, tuple(sections), extra, None if source is None else str(source))


def parse_values(
    command: str, values: Mapping[str, Any], types: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Turn each value into its setting's type. Returns the parsed settings and the problems."""
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


def unknown_setting(command: str, name: str, known: Mapping[str, Any]) -> str:
    """The message for a setting that the command does not have."""
    others = [other for other, each in COMMANDS.items() if name in each.types()]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    belongs = f"it is a setting of {', '.join(others)}; " if others else ""
    return f"is not a setting of {command}; {hint}{belongs}see video-r1 {command} --help"


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(source: str | Path) -> Path | None:
    """The file that a path or a packaged recipe's name (`lab-tgrpo`, `recipes/lab-tgrpo.yaml`) stands for."""
    path = Path(source)
    if path.is_file():
        return path
    packaged = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    return packaged if path.parent in (Path("."), Path("recipes")) and packaged.is_file() else None


def read_recipe(source: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a recipe and of its bases, and where each stands (`recipe a.yaml, line 3`)."""
    path = find_recipe(source)
    if path is None:
        close = difflib.get_close_matches(Path(source).name.removesuffix(".yaml"), packaged_recipes(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        names = ", ".join(packaged_recipes())
        raise RequestError(f"{source}: no such recipe; {hint}give a YAML file or one of these names: {names}")
    values, origins = read_one_recipe(path)
    seen = [path.resolve()]
    while (base := values.pop("base", None)) is not None:
        origin = origins.pop("base")
        if not isinstance(base, str):
            raise RequestError(f"{origin}: base is {base!r}; it must be the name of a recipe or a YAML file")
        beside = path.parent / base
        path = beside if beside.is_file() else find_recipe(base)
        if path is None:
            raise RequestError(f"{origin}: base is {base}; no file {beside} nor a packaged recipe")
        if path.resolve() in seen:
            raise RequestError(f"{origin}: base leads back to {path.name}; remove one of the lines")
        seen.append(path.resolve())
        below, below_origins = read_one_recipe(path)
        values, origins = below | values, below_origins | origins
    return values, origins


def read_one_recipe(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """As `read_recipe`, of a file without what it is based on."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path}: cannot be read as a recipe: {reason}") from error
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(name, str) for name in values):
        raise RequestError(f"{path}: a recipe is a YAML mapping with lines such as 'learning_rate: 1e-6'")
    origins: dict[str, str] = {}
    for key, _ in node.value:
        name, line = key.value.replace("-", "_"), key.start_mark.line + 1
        if name in origins:
            raise RequestError(f"{path}, line {line}: {name} stands there a second time; keep one")
        origins[name] = f"recipe {path.name}, line {line}"
    return {name.replace("-", "_"): value for name, value in values.items()}, origins


def save_resolved(settings: Recipe | Settings, folder: str | Path) -> Path:
    """Write `config.yaml`, the resolved settings as a recipe that can be run again. Returns its path.

    Takes a Recipe or one settings object (a TGRPOConfig, for example). The file is replaced in one step.
    Raises RequestError when the folder cannot be written.
    """
    if isinstance(settings, Recipe):
        title = f"video-r1 {settings.command}" + (f", from {settings.source}" if settings.source else "")
    else:
        title = type(settings).__name__
    path = Path(folder) / "config.yaml"
    text = yaml.safe_dump(resolved(settings), sort_keys=False, allow_unicode=True, default_flow_style=None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, f"# {title}; video-r1 {metadata.version('video-r1')}\n{text}")
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"{path}: cannot be written: {reason}; choose another output_dir") from error
    return path


def resolved(settings: Recipe | Settings) -> dict[str, Any]:
    """All settings by name, in YAML's own types, without tokens."""
    if isinstance(settings, Recipe):
        values = settings.values()
    else:
        as_dictionary = getattr(settings, "to_dict", None)  # TrainingArguments hides its tokens there
        values = as_dictionary() if as_dictionary is not None else dataclasses.asdict(settings)
    return plain({name: value for name, value in values.items() if not name.endswith("_token")})


def plain(value: Any) -> Any:
    """The value in the types of JSON and YAML: mappings, lists, numbers, text."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))
