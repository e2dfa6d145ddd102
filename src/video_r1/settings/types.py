"""Types of settings: what a value must be, and how text from an option or a recipe becomes one."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NONE_WORDS = ("none", "null")


def field_types(kind: type) -> dict[str, Any]:
    """Name and resolved type of the dataclass fields that `kind` itself declares (not its bases)."""
    own = vars(kind).get("__annotations__", {})
    if not own:
        return {}
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: hints[name] for name in own if name in names}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_enum(hint: Any) -> bool:
    """Whether the type is an enum class."""
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`. An int is a float, a bool is neither; a tuple is a list."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if len(alternatives(hint)) > 1:
        return any(matches(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if origin is list or hint is list:
        item = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(matches(v, item) for v in value)
    if origin is dict or hint is dict:
        key, item = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(
            matches(k, key) and matches(v, item) for k, v in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def takes_list(hint: Any) -> bool:
    """Whether several words may follow the option."""
    return any(get_origin(option) is list or option is list for option in alternatives(hint))


def describe_type(hint: Any) -> str:
    """The type in words, for messages and the help: `int`, `float or none`, `margin | off`."""
    options = alternatives(hint)
    if len(options) > 1:
        return " or ".join(describe_type(o) for o in sorted(options, key=lambda o: o is type(None)))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if hint is None or hint is type(None):
        return "none"
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    if is_enum(hint):
        return " | ".join(str(choice.value) for choice in hint)
    return {str: "text", bool: "true | false"}.get(hint) or getattr(hint, "__name__", str(hint))


def parse(value: Any, hint: Any) -> Any:
    """Turn a recipe's or an option's value into the type `hint`.

    Text is read by the type: numbers (also `1e-6`, which YAML leaves as text), `true`/`false`, `none`, lists
    (`a,b` or `[a, b]`), mappings (`{accuracy: 1, format: 0.5}` or `accuracy=1,format=0.5`). Raises
    ValueError, whose text is the type in words.
    """
    options = alternatives(hint)
    none_said = value is None or (isinstance(value, str) and value.strip().lower() in NONE_WORDS)
    if none_said and type(None) in options:
        return None
    if len(options) == 1:
        return _parse_one(value, hint)
    several = isinstance(value, str) and ("," in value or value.startswith("["))
    for option in sorted(options, key=lambda option: _rank(option, several)):
        try:
            return _parse_one(value, option)
        except ValueError:
            continue
    raise ValueError(describe_type(hint))


def _rank(hint: Any, several: bool) -> int:
    """The order in which a union's members are tried: numbers and choices before text, which takes anything,
    and text before a list, unless the value looks like several."""
    if hint is type(None):
        return 9
    if hint in (bool, int, float):
        return (bool, int, float).index(hint)
    if get_origin(hint) is list or hint is list:
        return 4 if several else 6
    return 5 if hint is str else 3


def _parse_one(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    wrong = ValueError(describe_type(hint))
    text = value.strip() if isinstance(value, str) else None
    if hint is Any:
        return value
    if hint is type(None):
        raise wrong
    if origin is Literal:
        for choice in arguments:
            if value == choice or text == str(choice):
                return choice
        if isinstance(value, bool) and not value and "off" in arguments:
            return "off"  # YAML reads a bare `off` as false
        if isinstance(value, bool) and not value and "no" in arguments:
            return "no"
        raise wrong
    if origin is list or hint is list:
        return [parse(item, arguments[0] if arguments else Any) for item in _items(value, wrong)]
    if origin is dict or hint is dict:
        key_type, value_type = arguments or (Any, Any)
        return {parse(k, key_type): parse(v, value_type) for k, v in _pairs(value, wrong).items()}
    if hint is bool:
        if text is not None and text.lower() in TRUE_WORDS + FALSE_WORDS:
            return text.lower() in TRUE_WORDS
        if isinstance(value, bool):
            return value
        raise wrong
    if hint in (int, float):
        if isinstance(value, bool) or value is None:
            raise wrong
        try:
            number = hint(text if text is not None else value)
        except (ValueError, TypeError, OverflowError):
            raise wrong from None
        if hint is int and text is None and number != value:
            raise wrong  # 1.5 is not an int
        return number
    if is_enum(hint):
        for choice in hint:
            if text == str(choice.value) or (value is False and choice.value == "no"):  # YAML: no is false
                return choice.value
        raise wrong
    if hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, bool):
            return "no" if value is False else "yes"  # YAML reads a bare `no` as false: eval_strategy: no
        if isinstance(value, int | float):
            return str(value)
    if matches(value, hint):
        return value
    raise wrong


def _items(value: Any, wrong: ValueError) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str):
        return [value]
    if not value.strip().startswith("["):
        return [item.strip() for item in value.split(",") if item.strip()]
    loaded = _flow(value, wrong)
    return loaded if isinstance(loaded, list) else [loaded]


def _pairs(value: Any, wrong: ValueError) -> Mapping[Any, Any]:
    if isinstance(value, str) and value.strip().startswith("{"):
        value = _flow(value, wrong)
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        if not pairs or not all(name.strip() and equals for name, equals, _ in pairs):
            raise wrong
        return {name.strip(): text.strip() for name, _, text in pairs}
    if not isinstance(value, Mapping):
        raise wrong
    return value


def _flow(text: str, wrong: ValueError) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise wrong from None
