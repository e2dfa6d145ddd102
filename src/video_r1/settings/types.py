"""Types of settings: checking values, and parsing the text of options and recipes.

pydantic would be no shorter: it has no `none`, no lists and mappings as text, no `off` that YAML took for
false, and it accepts `true` as a number.
"""

import os
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NewType, Union, get_args, get_origin

import yaml

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NONE_WORDS = ("none", "null")

# An item of a list that is not split at its commas, such as a question; any text to a type checker.
if TYPE_CHECKING:
    Sentence = str
else:
    Sentence = NewType("Sentence", str)


def alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def takes_list(hint: Any) -> bool:
    return any((get_origin(option) or option) is list for option in alternatives(hint))


def takes_sentences(hint: Any) -> bool:
    """Return whether the option may be repeated, with a sentence each time."""
    return any(get_args(option) == (Sentence,) for option in alternatives(hint))


def matches(value: Any, hint: Any) -> bool:
    """Return whether `value` has the type `hint`. An int is a float, a bool is neither; a tuple is a list."""
    hint = getattr(hint, "__supertype__", hint)
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return True
    if len(alternatives(hint)) > 1:
        return any(matches(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list | tuple) and all(matches(v, *arguments or (Any,)) for v in value)
    if origin is dict:
        key, item = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(
            matches(k, key) and matches(v, item) for k, v in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def describe_type(hint: Any) -> str:
    """Return the type in words, for messages and help: `int`, `float or none`, `margin | off`."""
    options, arguments = alternatives(hint), get_args(hint)
    if len(options) > 1:
        return " or ".join(describe_type(o) for o in sorted(options, key=lambda o: o is type(None)))
    if _choices(hint):
        return " | ".join(map(str, _choices(hint)))
    if get_origin(hint) is list:
        return f"list of {describe_type(arguments[0])}"
    if get_origin(hint) is dict:
        return f"mapping of {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    words = {str: "text", Sentence: "text", bool: "true | false", type(None): "none"}
    if hasattr(hint, "__dataclass_fields__"):  # a group
        return "mapping"
    return words.get(hint) or getattr(hint, "__name__", str(hint))


def default_text(value: Any) -> str:
    """Return a default as written in a recipe; empty for none, which the help text explains."""
    if value is None or value == [] or hasattr(value, "__dataclass_fields__"):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{name}={item:g}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(value: Any, hint: Any) -> Any:
    """Turn a recipe's or an option's value into the type `hint`.

    Text is read by the type: numbers (also `1e-6`, which YAML leaves as text), `true`/`false`, `none`, lists
    (`a,b` or `[a, b]`), mappings (`{accuracy: 1, format: 0.5}` or `accuracy=1,format=0.5`). Raises
    ValueError, whose text is the type in words.
    """
    options = alternatives(hint)
    if type(None) in options and (value is None or str(value).strip().lower() in NONE_WORDS):
        chosen = [option for option in options if value in _choices(option)]  # sharding: none
        return value if chosen else None
    if len(options) == 1:
        return _parse_one(value, hint)
    # Numbers and choices before text, which takes anything, and text before a list, unless the value looks
    # like several.
    several = isinstance(value, str) and ("," in value or value.startswith("["))
    ranks = {bool: 0, int: 1, float: 2, list: 4 if several else 6, str: 5}
    for option in sorted(options, key=lambda option: ranks.get(get_origin(option) or option, 3)):
        try:
            return _parse_one(value, option)
        except ValueError:
            continue
    raise ValueError(describe_type(hint))


def _parse_one(value: Any, hint: Any) -> Any:
    hint = getattr(hint, "__supertype__", hint)
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    wrong = ValueError(describe_type(hint))
    text = value.strip() if isinstance(value, str) else None
    if takes_sentences(hint) and text and not text.startswith("["):
        return [text]
    if origin is list:
        return [parse(item, *arguments or (Any,)) for item in _items(value)]
    if origin is dict:
        key_type, value_type = arguments or (Any, Any)
        if (pairs := pairs_of(value)) is None:
            raise wrong
        return {parse(k, key_type): parse(v, value_type) for k, v in pairs.items()}
    for choice in _choices(hint):
        # YAML reads a bare `off` or `no` as false.
        if value == choice or text == str(choice) or (value is False and choice in ("off", "no")):
            return choice
    if hint is bool and text is not None and text.lower() in TRUE_WORDS + FALSE_WORDS:
        return text.lower() in TRUE_WORDS
    if hint in (int, float):
        if isinstance(value, bool) or value is None:
            raise wrong
        try:
            number = hint(value)
        except (ValueError, TypeError, OverflowError):
            raise wrong from None
        if hint is int and text is None and number != value:
            raise wrong  # 1.5 is not an int
        return number
    if hint is str and isinstance(value, bool):
        return "yes" if value else "no"  # eval_strategy: no
    if hint is str and isinstance(value, int | float | os.PathLike):
        return str(value)
    if matches(value, hint):
        return value
    raise wrong


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        if not value.strip().startswith("["):
            return [item.strip() for item in value.split(",") if item.strip()]
        value = _flow(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def pairs_of(value: Any) -> Mapping[Any, Any] | None:
    """Return the mapping that a value or its text (`a=1,b=2` or `{a: 1}`) is; None for others."""
    if isinstance(value, str) and not value.strip().startswith("{"):
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        whole = pairs and all(name.strip() and equals for name, equals, _ in pairs)
        return {name.strip(): text.strip() for name, _, text in pairs} if whole else None
    value = _flow(value) if isinstance(value, str) else value
    return value if isinstance(value, Mapping) else None


def _flow(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return None
