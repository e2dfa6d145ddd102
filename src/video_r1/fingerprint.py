"""Fingerprints: what must be equal for a run, an evaluation, an annotation or a cache to continue.

Contents decide, not paths: a model is its files' bytes (`contents`), a manifest its rows (`samples_digest`),
a media file its size and time of change (`media_state`). A folder that was moved or copied is the same; one
whose files were replaced is not.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from video_r1.availability import is_hub_id
from video_r1.errors import RequestError, VideoR1Error
from video_r1.files import replace_json

Changes = dict[str, tuple[Any, Any]]  # setting: (recorded value, value now)

ADAPTERS = "adapter_config.json"
MODEL_FILES = (
    *("*.safetensors", "*config.json", "tokenizer*", "vocab*", "merges.txt", "added_tokens.json"),
    *("*.model", "*.jinja", "chat_template.json", "*.py"),
)
"""Files that a model's answers depend on."""
BY_CONTENTS = {"model": "model_files", "teacher": "model_files"}
"""Settings that are names: they may differ where the setting that holds their contents does not."""
REMEDY = "Choose another output folder, or delete this one"
_PARTS = (1 << 24, 1 << 24)  # bytes from one part of a file to the next, and bytes that are hashed of it
_PARTS_OF_LARGE = (1 << 20, 1 << 12)  # of a file of more than 256 MB


def digest(value: Any, size: int = 8) -> str:
    """Return `size` bytes of a JSON value's hash as hexadecimal digits. Values that JSON lacks count as text,
    without their place in memory.
    """
    text = json.dumps(value, default=lambda other: re.sub(" at 0x[0-9a-f]+", "", str(other)))
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def contents(name: str | Path) -> str | None:
    """Return a digest of a file's bytes, or of a model's: a folder's MODEL_FILES, with adapters those of
    their base too, or the commit of a model from the hub. None if there is no such file, or no model yet.
    """
    path = Path(name).expanduser()
    if os.path.isfile(path):
        return _bytes_digest(str(path), *_stamp(path))
    files = model_stamps(path)
    if not files:
        if not is_hub_id(str(name)):
            return None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(name), "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else None
    found: list[Any] = [(name, _bytes_digest(str(path / name), *stamp)) for name, *stamp in files]
    if (path / ADAPTERS).is_file():
        base = json.loads((path / ADAPTERS).read_text(encoding="utf-8")).get("base_model_name_or_path")
        found.append(contents(str(base)))
    return digest(found)


def model_stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, bytes and time of change of a model's files; none for a folder that holds no model."""
    if not any(os.path.isfile(folder / name) for name in ("config.json", ADAPTERS)):
        return []
    names = {path.name for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return [(name, *_stamp(folder / name)) for name in sorted(names)]


def _stamp(path: Path) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


@lru_cache(1000)
def _bytes_digest(path: str, size: int, changed_at: int) -> str:
    """Return a digest of a file of this size and time of change; threads hash its parts (2 GB/s a core).

    Of a large file 4 kB of each MB count: training changes whole tensors, and 140 GB on a shared disk would
    take minutes.
    """
    stride, length = _PARTS_OF_LARGE if size > 1 << 28 else _PARTS
    with open(path, "rb") as file, ThreadPoolExecutor() as pool:

        def part(at: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), length, at)).digest()

        parts = b"".join(pool.map(part, range(0, size, stride)))
        return hashlib.sha256(f"{size} ".encode() + parts).hexdigest()[:16]


def changed(recorded: Any, now: Mapping[str, Any]) -> Changes:
    """Return the settings whose JSON values differ: {name: (recorded value, value now)}, sorted by name.

    recorded: a JSON object that was read from a file; anything else counts as empty. A setting that only one
    side has differs too (None on the other side). Names of equal contents are equal (BY_CONTENTS).
    """
    old, new = recorded if isinstance(recorded, dict) else {}, json.loads(json.dumps(now))
    same = {name for name, kept in BY_CONTENTS.items() if old.get(kept) and old[kept] == new.get(kept)}
    names = sorted((old.keys() | new.keys()) - same)
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
        refuse_changed(f"{path.parent} holds {what}", changes, REMEDY)
    replace_json(path, made_with)
