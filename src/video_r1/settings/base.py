"""What a settings class is made of, and how its values are checked."""

import dataclasses
import inspect
import operator
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from video_r1.errors import ConfigError
from video_r1.settings.types import describe_type, matches

Problem = tuple[str, str]
"""The name of a setting, and what is wrong with its value and what to do."""

BOUNDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def setting(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with its help text. Lists and dictionaries are copied for each object.

    bounds: what the value has to keep, unless it is None, by a word of BOUNDS: `setting(0.5, "…", below=1)`.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = {"help": help, "bounds": bounds}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """Base of all settings: checks itself when it is built. Raises ConfigError with every problem found."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        vars(made)["_given"] = frozenset(kwargs)
        return made

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were set when this was built; the others have their defaults."""
        return vars(self)["_given"]

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)  # TrainingArguments, when mixed with it
        if parent is not None:
            try:
                parent()
            except ValueError as error:
                raise ConfigError(f"transformers refuses these settings: {error}") from error
        found = [
            (name, f"is {getattr(self, name)!r}; it must be {describe_type(hint)}")
            for name, hint in own_field_types(type(self)).items()
            if not matches(getattr(self, name), hint)
        ]
        raise_problems(found or list(self.problems()))

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the values, given that their types are right. Overrides call super() first."""
        for field in dataclasses.fields(self):
            value, bounds = getattr(self, field.name), field.metadata.get("bounds", {})
            if value is not None and not all(BOUNDS[kind](value, bound) for kind, bound in bounds.items()):
                wanted = (f"{kind.replace('_', ' ')} {bound}" for kind, bound in bounds.items())
                yield field.name, f"is {value}; it must be {' and '.join(wanted)}"


def raise_problems(found: list[Problem], origins: Mapping[str, str] | None = None) -> None:
    """Raise one ConfigError that lists the problems, if any, each with where its setting came from."""
    if found:
        origins = origins or {}
        places = (f"{name} ({origins[name]})" if name in origins else name for name, _ in found)
        text = "; ".join(f"{place} {problem}" for place, (_, problem) in zip(places, found, strict=True))
        raise ConfigError(text, tuple(found))


def own_field_types(kind: type) -> dict[str, Any]:
    """Name and type of the fields that Settings classes declare, without those of classes mixed in."""
    declared: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Settings) and (own := inspect.get_annotations(base)):
            hints = typing.get_type_hints(base)
            declared |= {name: hints[name] for name in own}
    return declared
