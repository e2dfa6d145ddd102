"""Values from files that somebody else wrote, each in its expected type: a page never trusts a file."""

import json
import math
from collections.abc import Iterator
from typing import Any, TypeGuard

import yaml

SECRET_ENDINGS = ("token", "api_key", "password", "secret")
MAX_DEPTH = 50  # of nested settings
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(line: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or a thousand nested brackets
        return None
    return record if isinstance(record, dict) else None


def parse_object(written: str, is_yaml: bool) -> dict[str, Any]:
    """Return the object in a JSON or YAML text, {} for another value. Raises ValueError.

    YAML aliases are refused: a few lines of them can stand for more than a machine's memory.
    """
    if (record := parse(written)) is not None:
        return record
    if not is_yaml:
        raise ValueError("it is no JSON object")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(written, _LOADER)):
            raise ValueError("it has YAML aliases")
        return as_table(yaml.load(written, _LOADER))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error) or "it is nested too deep") from error


def as_json(value: Any) -> str:
    """Return JSON in ASCII: half of a surrogate pair has no UTF-8 form. Numbers that are not finite, such as
    sums of large ones, become null.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite_parts(value), allow_nan=False, separators=(",", ":"))


def _finite_parts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_parts(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_parts(each) for each in value]
    return finite(value) if isinstance(value, float) else value


def flat(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings, nested names joined by dots. Values that look like credentials are not shown."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name.count(".") < MAX_DEPTH:
            yield from flat(value, f"{name}.")
        elif name.lower().endswith(SECRET_ENDINGS) and value:
            yield name, "(not shown)"
        else:
            shown = text(value)[:500]
            yield name, f"…/{short_path(shown)}" if shown.startswith("/") else shown


def text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    except RecursionError:
        return "(nested too deep)"


def short_path(path: str) -> str:
    """Return a file's name and folder: a page that is passed on need not show the writer's disk."""
    return "/".join(path.replace("\\", "/").split("/")[-2:])


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number that a float can hold, NaN and infinity included."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1e300)


def finite(value: Any, otherwise: float | None = None) -> float | None:
    return float(value) if is_number(value) and math.isfinite(value) else otherwise


def score_of(record: dict[str, Any]) -> float | None:
    """Return the score of an answer, None unless it is in [0, 1]."""
    score = finite(record.get("score"))
    return score if score is not None and 0 <= score <= 1 else None


def whole(value: Any) -> int:
    return int(finite(value) or 0)


def as_table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
