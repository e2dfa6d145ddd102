"""Base of the settings classes: fields with help texts, checks of values, docstrings that list settings."""

import dataclasses
import inspect
import operator
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from video_r1.errors import ConfigError
from video_r1.settings.types import default_text, describe_type, matches, pairs_of

Problem = tuple[str, str]
"""Name of a setting, and a text that says what is wrong with its value and what to do."""

BOUNDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def setting(default: Any, help: str, distinct: bool = False, **bounds: float) -> Any:
    """Return a dataclass field with its help text. Lists and dictionaries are copied for each object; a class
    of settings makes a group.

    distinct: a list has one or more items, each once. bounds: limits of a value that is not None, by a word
    of BOUNDS: `setting(0.5, "…", below=1)`.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = {"help": help, "bounds": bounds, "distinct": distinct}
    if isinstance(default, type):  # a group
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Translating(type):
    """Type of classes whose keyword arguments go through `understood` first."""

    if not TYPE_CHECKING:  # which takes the arguments from the fields

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **cls.understood(kwargs))


@dataclass(kw_only=True)
class Settings(metaclass=_Translating):
    """Base of all settings, checked when they are built. Raises ConfigError with every problem."""

    @classmethod
    def understood(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return keyword arguments by the fields' names. Subclasses translate other names."""
        types = own_field_types(cls)
        return grouped(flat(values, types), types)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        vars(made)["_given"] = frozenset(kwargs)
        return made

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were given; the others have their defaults."""
        return vars(self)["_given"]

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)  # of TrainingArguments, in a trainer's config
        if parent is not None:
            try:
                parent()
            except ValueError as error:
                raise ConfigError(f"transformers refuses these settings: {error}") from error
        found: list[Problem] = []
        for name, hint in own_field_types(type(self)).items():
            value = getattr(self, name)
            if is_group(hint) and isinstance(value, Mapping):
                try:
                    setattr(self, name, hint(**value))
                except ConfigError as error:
                    found += [(f"{name}_{entry}", text) for entry, text in error.problems]
            elif not matches(value, hint):
                found.append((name, f"is {value!r}; it must be {describe_type(hint)}"))
        raise_problems(found or list(self.problems()))

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong with the values, whose types are right. Overrides call super() first."""
        for field in dataclasses.fields(self):
            value, bounds = getattr(self, field.name), field.metadata.get("bounds", {})
            if field.metadata.get("distinct") and value is not None and len({*value}) != max(1, len(value)):
                yield field.name, f"is {value}; name one or more, each once"
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
    """Return name and type of the fields that Settings classes declare, without TrainingArguments'."""
    declared: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Settings) and (own := inspect.get_annotations(base)):
            hints = typing.get_type_hints(base)
            declared |= {name: hints[name] for name in own}
    return declared


# ---- Groups: settings whose type is a class of settings, such as judge


def is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Settings)


def entries_of(types: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return group and entry by their flat name: {"judge_wait": ("judge", "wait")}."""
    groups = {name: own_field_types(hint) for name, hint in types.items() if is_group(hint)}
    return {f"{group}_{entry}": (group, entry) for group, inner in groups.items() for entry in inner}


def flat_types(types: Mapping[str, Any]) -> dict[str, Any]:
    """Return types with the entries of groups added under their flat names."""
    entries = entries_of(types).items()
    return {**types, **{name: own_field_types(types[group])[entry] for name, (group, entry) in entries}}


def flat(values: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with the entries of groups under their flat names: {"judge": {"endpoint": "http://host"}}
    gives {"judge_endpoint": "http://host"}. A value of a group that is no mapping is its first entry.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if not is_group(types.get(name)):
            found[name] = value
            continue
        known = own_field_types(types[name])
        if isinstance(value, types[name]):
            value = {entry: getattr(value, entry) for entry in known}
        elif not isinstance(value, Mapping):
            pairs = pairs_of(value) or {}
            value = pairs if pairs.keys() & known.keys() else {next(iter(known)): value}
        found |= {f"{name}_{entry}": one for entry, one in value.items()}
    return found


def grouped(values: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat values with the entries of groups in mappings: the inverse of `flat`."""
    places, found = entries_of(types), {}
    for name, value in values.items():
        group, entry = places.get(name, (name, None))
        if entry is None:
            found[name] = value
        else:
            found.setdefault(group, {})[entry] = value
    return found


T = TypeVar("T", bound=type[Settings])


def settings_docs(kind: T) -> T:
    """Add every setting's name, type, default and help to the docstring, for `help(TGRPOConfig)`."""
    types, lines = own_field_types(kind), []
    for field in dataclasses.fields(kind):
        hint = types.get(field.name, field.type)
        value = field.default_factory() if callable(field.default_factory) else field.default
        default = "" if value is dataclasses.MISSING else default_text(value)
        head = f"{field.name}: {hint if isinstance(hint, str) else describe_type(hint)}"
        told = " ".join(str(field.metadata.get("help", "")).split())
        lines.append(head + (f" = {default}" if default else ""))
        lines += textwrap.wrap(told, 100, initial_indent=" " * 4, subsequent_indent=" " * 4)
    kind.__doc__ = "\n".join([inspect.cleandoc(str(kind.__doc__)), "", *lines])
    return kind
