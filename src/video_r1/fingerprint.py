"""Fingerprints: settings that must be equal for a run, an evaluation, an annotation or a cache to continue.

Long values (all questions of a manifest) are recorded as their `digest`.
"""

import hashlib
import json
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from video_r1.errors import RequestError, VideoR1Error
from video_r1.files import replace_json

Changes = dict[str, tuple[Any, Any]]  # setting: (recorded value, value now)


def digest(value: Any, size: int = 8) -> str:
    """Return `size` bytes of a JSON value's hash as hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=size).hexdigest()


def changed(recorded: Any, now: Mapping[str, Any], may_change: Container[str] = ()) -> Changes:
    """Return the settings whose JSON values differ: {name: (recorded value, value now)}, sorted by name.

    recorded: a JSON object that was read from a file; anything else counts as empty. A setting that only one
    side has differs too (None on the other side). may_change: names that are not compared.
    """
    old, new = recorded if isinstance(recorded, dict) else {}, json.loads(json.dumps(now))
    names = [name for name in sorted(old.keys() | new.keys()) if name not in may_change]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def refuse_changed(
    holder: str, changes: Mapping[str, tuple[Any, Any]], remedy: str, error: type[VideoR1Error] = RequestError
) -> None:
    """Raise `error`, which names every change; do nothing when there is none.

    holder: what was made with other settings, e.g. "runs/eval holds an evaluation".
    """
    if changes:
        said = ", ".join(part for name, (old, new) in changes.items() for part in _told(name, old, new))
        raise error(f"{holder} with other settings: {said}. {remedy}")


def _told(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key, values in changed(old, new).items():
            yield from _told(f"{name}.{key}", *values)
    else:
        yield f"{name} ({old!r} → {new!r})"


def continue_or_refuse(path: Path, made_with: Mapping[str, Any], what: str) -> None:
    """Write `made_with` to the JSON file `path`, or raise RequestError if it has other settings.

    what: the work in the file's folder, e.g. "an evaluation".
    """
    if path.is_file():
        changes = changed(json.loads(path.read_text(encoding="utf-8")), made_with)
        remedy = "Choose another output folder, or delete this one"
        refuse_changed(f"{path.parent} holds {what}", changes, remedy)
    replace_json(path, made_with)
