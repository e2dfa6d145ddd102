"""Commands: purpose, settings, examples, and the function that does the work (commands.yaml).

Functions are named, not imported, so that help and refusals need no torch.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from video_r1.settings import commands, decoding, shared, tools, training, vllm
from video_r1.settings.base import Settings, own_field_types


@dataclass(frozen=True)
class Command:
    """A command of `video-r1`.

    work: module and function below `video_r1`. given: its arguments, all settings by name ("values"), an
    object for each section ("sections") or the whole Recipe ("recipe"). positionals: settings without `--`.
    """

    summary: str
    work: str
    given: Literal["values", "sections", "recipe"]
    sections: tuple[type[Settings], ...]
    positionals: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    @property
    def plans_training(self) -> bool:
        """Whether the command takes a training recipe, with every field of TrainingArguments as a setting."""
        return self.given == "recipe"

    def types(self) -> dict[str, Any]:
        """Return name and type of the command's own settings."""
        return {name: hint for kind in self.sections for name, hint in own_field_types(kind).items()}

    def function(self) -> Callable[..., Any]:
        """Import the function that does the work."""
        module, _, name = self.work.partition(":")
        return getattr(importlib.import_module(f"video_r1.{module}"), name)


def _read(text: str) -> dict[str, Command]:
    places = (commands, decoding, shared, tools, training, vllm)
    kinds = {name: kind for place in places for name, kind in vars(place).items()}
    found = {}
    for name, entry in yaml.safe_load(text).items():
        lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
        sections = tuple(kinds[kind] for kind in entry["sections"])
        found[name] = Command(**(entry | lists | {"sections": sections}))
    return found


COMMANDS = _read(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TRAINS = ("sft", "rl")
"""Commands that have `--smoke`."""
