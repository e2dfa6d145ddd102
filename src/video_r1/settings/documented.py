"""Docstrings that list settings: what `help(TGRPOConfig)` shows."""

import dataclasses
import inspect
import textwrap
from typing import Any, TypeVar

from video_r1.settings.base import Settings, own_field_types
from video_r1.settings.types import default_text, describe_type

WIDTH = 100

T = TypeVar("T", bound=type[Settings])


def documented(kind: T) -> T:
    """The class with every setting's name, type, default and help in its docstring, by the class that
    declares it. A decorator, to stand above `@dataclass`.
    """
    types = own_field_types(kind)
    sections: dict[type, list[str]] = {}
    for field in dataclasses.fields(kind):
        owner = next(base for base in kind.__mro__ if field.name in inspect.get_annotations(base))
        hint = describe_type(types[field.name]) if field.name in types else _words(field.type)
        default = default_text(_default(field))
        head = f"{field.name}: {hint}" + (f" = {default}" if default else "")
        told = " ".join(str(field.metadata.get("help", "")).split())
        sections.setdefault(owner, []).extend(
            [f"  {head}", *textwrap.wrap(told, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        )
    lines = [
        line
        for owner in sorted(sections, key=kind.__mro__.index)
        for line in ("", f"{_title(owner)}:", *sections[owner])
    ]
    kind.__doc__ = "\n".join([textwrap.dedent(f"    {kind.__doc__}").rstrip(), *lines])
    return kind


def _title(owner: type) -> str:
    return str(owner.__doc__) if issubclass(owner, Settings) else f"{owner.__module__}.{owner.__name__}"


def _words(hint: Any) -> str:
    return hint if isinstance(hint, str) else describe_type(hint)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
