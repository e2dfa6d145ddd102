"""Recipe files: find them by path or name, read them with their bases, list the packaged ones.

Beside settings a file may have `about`, its purpose in one line, and `made_for`, its command and machine:

    about: T-GRPO by LoRA
    made_for: {command: rl, gpus: 1, gpu_memory: 80GB, sharding: none}
"""

import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from video_r1.console import table
from video_r1.errors import RequestError, first_line
from video_r1.settings.base import flat
from video_r1.settings.commands import GPUSharding, parse_bytes
from video_r1.settings.trl import overridden
from video_r1.settings.types import parse

PACKAGE = Path(str(resources.files("video_r1")))
RECIPES = PACKAGE / "recipes"
PACKAGED_MODEL = "lab-base"
"""Name of the small pretrained base that comes with the package."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times as fast
MERGED = "-merged"
"""Suffix that the recipes add to a LoRA run's folder for its merged checkpoint."""


@dataclass(frozen=True, slots=True)
class MadeFor:
    """Command and machine of a recipe. gpus: 0 for CPUs, None if not given. gpu_memory: of one GPU (80GB)."""

    command: str | None = None
    gpus: int | None = None
    gpu_memory: str | None = None
    sharding: GPUSharding = "none"

    @property
    def machine(self) -> str:
        """Such as "8 × 80 GB"."""
        if not self.gpus:
            return "CPU" if self.gpus == 0 else ""
        memory = "" if self.gpu_memory is None else f"{(parse_bytes(self.gpu_memory) or 0) / 1e9:g} GB"
        return f"{self.gpus} × {memory or 'GPU'}"


def launcher(made_for: MadeFor, processes: int | str) -> list[str]:
    """Return the words that start a command on several GPUs."""
    kind = "ddp" if made_for.sharding == "none" else made_for.sharding
    file = RECIPES / "accelerate" / f"{kind}.yaml"
    words = ["accelerate", "launch", "--config_file", str(file), "--num_processes", str(processes)]
    deepspeed = RECIPES / "deepspeed" / f"{made_for.sharding}.json"
    if deepspeed.is_file():
        words += ["--deepspeed_config_file", str(deepspeed)]
    return [*words, "-m", "video_r1"]


def model_folder(name: str | None) -> str | None:
    """Return the packaged base's folder for its name, and any other name unchanged."""
    is_packaged = name == PACKAGED_MODEL and not Path(PACKAGED_MODEL).exists()
    return str(PACKAGE / "lab" / "base") if is_packaged else name


def packaged_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(source: str | Path) -> Path | None:
    """Find a recipe by path or packaged name (`lab-tgrpo`, `recipes/lab-tgrpo.yaml`); or None."""
    path = Path(source)
    if not path.is_file() and path.parent in (Path("."), Path("recipes")):
        path = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    return path if path.is_file() else None


def read_recipe(
    source: str | Path, types: Mapping[str, Any] = MappingProxyType({})
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a recipe and its bases: settings with `about` and `made_for`, and the origin of each (`recipe
    a.yaml, line 3`). types: of the command's settings, whose groups become flat. Raises RequestError.
    """
    path = find_recipe(source)
    if path is None:
        close = difflib.get_close_matches(Path(source).name.removesuffix(".yaml"), packaged_recipes(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        names = ", ".join(packaged_recipes())
        raise RequestError(f"{source}: no such recipe; {hint}give a YAML file or one of these names: {names}")
    values, origins = read_one_recipe(path, types)
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
        below, below_origins = read_one_recipe(path, types)
        machines = [part["made_for"] for part in (below, values) if isinstance(part.get("made_for"), dict)]
        values, origins = overridden(below, values), below_origins | origins
        if len(machines) == 2:
            values["made_for"] = machines[0] | machines[1]
    return values, origins


def read_one_recipe(path: Path, types: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        loader = LOADER(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path}: cannot be read as a recipe: {reason}") from error
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(name, str) for name in values):
        raise RequestError(f"{path}: a recipe is a YAML mapping with lines such as 'learning_rate: 1e-6'")
    origins: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        for name, value in flat({key.value.replace("-", "_"): values[key.value]}, types).items():
            if name in origins:
                raise RequestError(f"{path}, line {line}: {name} stands there a second time; keep one")
            origins[name], settings[name] = f"recipe {path.name}, line {line}", value
    return settings, origins


def take_facts(values: dict[str, Any], origins: Mapping[str, str]) -> MadeFor:
    """Remove `made_for` and `about` from the values and return `made_for`. Raises RequestError."""
    values.pop("about", None)
    given = values.pop("made_for", None)
    if given is None:
        return MadeFor()
    types = typing.get_type_hints(MadeFor)
    try:
        facts = {name: parse(value, types[name]) for name, value in given.items()}
        if facts.get("gpu_memory") and parse_bytes(facts["gpu_memory"]) is None:
            raise ValueError("gpu_memory")
    except (AttributeError, KeyError, ValueError) as error:
        example = "{command: rl, gpus: 4, gpu_memory: 80GB, sharding: fsdp2}"
        reason = "" if isinstance(error, AttributeError) else f" ({first_line(error)})"
        raise RequestError(f"{origins['made_for']}: made_for is {given}{reason}; write {example}") from error
    return MadeFor(**facts)


@dataclass(frozen=True, slots=True)
class Entry:
    """A packaged recipe. start: the checkpoint that it names; output_dir: None if it does not train."""

    name: str
    about: str
    made_for: MadeFor
    start: str
    output_dir: str | None

    @property
    def checkpoint(self) -> str:
        return checkpoint_behind(self.start)


@cache
def catalogue() -> tuple[Entry, ...]:
    entries = []
    for name in packaged_recipes():
        values, origins = read_recipe(name)
        about = str(values.get("about", ""))
        made_for = take_facts(values, origins)
        start = values.get("model_name_or_path") or values["model"]
        entries.append(Entry(name, about, made_for, start, values.get("output_dir")))
    return tuple(entries)


def checkpoint_behind(start: str) -> str:
    """Return the published model from which packaged recipes make the folder `start`, or `start` itself."""
    for entry in catalogue():
        if entry.output_dir and start in (entry.output_dir, entry.output_dir + MERGED):
            return checkpoint_behind(entry.start)
    return start


def counterpart(command: str, start: str | None, made_for: MadeFor) -> str | None:
    """Return the packaged recipe of `command` for the same model and machine, or None."""
    model = None if start is None else model_folder(checkpoint_behind(start))
    for entry in catalogue():
        facts = entry.made_for
        same = facts.command == command and facts.machine == made_for.machine
        if same and model_folder(entry.checkpoint) == model:
            return entry.name
    return None


def run_recipes(path: bool = False) -> None:
    """Print the table of packaged recipes, recipes for a CPU first; or with `path` their folder."""
    if path:
        print(RECIPES)
        return
    entries = sorted(catalogue(), key=lambda entry: (entry.made_for.gpus != 0, entry.name))
    rows = (
        (entry.name, str(entry.made_for.command), entry.made_for.machine, entry.checkpoint, entry.about)
        for entry in entries
    )
    print(table(("recipe", "command", "machine", "model", "what"), rows, words=True))
