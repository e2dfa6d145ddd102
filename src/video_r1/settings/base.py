"""What a settings class is made of, and how its values are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from video_r1.errors import ConfigError
from video_r1.settings.types import describe_type, field_types, matches

Problem = tuple[str, str]
"""The name of a setting, and what is wrong with its value and what to do."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text. Lists and dictionaries are copied for each object."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class Settings:
    """Base of all settings: checks itself when it is built. Raises ConfigError with every problem found."""

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)  # TrainingArguments, when mixed with it
        if parent is not None:
            try:
                parent()
            except ValueError as error:
                raise ConfigError(f"transformers refuses these settings: {error}") from error
        check_settings(self)

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the values, given that their types are right. Overrides call super() first."""
        yield from ()


def positive(settings: Settings, *names: str) -> Iterator[Problem]:
    """A problem for each named setting that is neither None nor above 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            yield name, f"is {value}; it must be above 0"


def at_least(settings: Settings, least: float, *names: str) -> Iterator[Problem]:
    """A problem for each named setting that is below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            yield name, f"is {getattr(settings, name)}; it must be at least {least}"


def within(settings: Settings, name: str, low: float, high: float) -> Iterator[Problem]:
    """A problem when the setting is not in [low, high)."""
    if not low <= getattr(settings, name) < high:
        yield name, f"is {getattr(settings, name)}; it must be at least {low} and below {high}"


def check_settings(settings: Settings) -> None:
    """Check types, then values. Raises ConfigError with all problems."""
    types = own_field_types(type(settings))
    found = [
        (name, f"is {getattr(settings, name)!r}; it must be {describe_type(hint)}")
        for name, hint in types.items()
        if not matches(getattr(settings, name), hint)
    ]
    raise_problems(found or list(settings.problems()))


def raise_problems(found: list[Problem], origins: Mapping[str, str] | None = None) -> None:
    """Raise one ConfigError that lists the problems, if any, each with where its setting came from."""
    if found:
        origins = origins or {}
        lines = (f"{name} ({origins[name]})" if name in origins else name for name, _ in found)
        text = "; ".join(f"{line} {problem}" for line, (_, problem) in zip(lines, found, strict=True))
        raise ConfigError(text, tuple(found))


def own_field_types(kind: type) -> Mapping[str, Any]:
    """Name and type of the fields that Settings classes declare, without those of classes mixed in."""
    types: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Settings):
            types.update(field_types(base))
    return types
