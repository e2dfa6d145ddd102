"""The training record of a checkpoint, `video_r1.json` beside its processor's files.

    {"fps": 2.0, "min_frames": 4, "max_frames": 8, "frame_pixels": 3136, "image_pixels": 3136,
     "prompt_template": "{question}…", "dtype": "float32", "positions": "transformers"}

A model answers badly, without an error, when it gets other frames or another prompt than in training: the
defaults of every command that loads the checkpoint are these values.

dtype: number format of the model's computation. positions: rule for positions after a video, for models where
vLLM has another one (rollout/vllm/mrope.py).
"""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from video_r1.errors import ConfigError

logger = logging.getLogger(__name__)

RECORD = "video_r1.json"
BUDGET = ("fps", "min_frames", "max_frames", "frame_pixels", "image_pixels")


def adopted(
    checkpoint: str | Path | None, given: Mapping[str, Any], names: Collection[str]
) -> dict[str, Any]:
    """Return the settings among `names` that the checkpoint's record has and that are not `given`.

    A given setting that differs is warned of. A template is returned as the path of the record, which
    `load_template` reads. Raises ConfigError when the file is damaged.
    """
    path = Path(checkpoint or "") / RECORD
    if checkpoint is None or not path.is_file():
        return {}
    record = read_record(path)
    learnt = {name: record[name] for name in (*BUDGET, "dtype", "prompt_template") if name in record}
    learnt = {name: value for name, value in learnt.items() if name in names}
    for name in [name for name in learnt if name in given]:
        value, other = given[name], learnt.pop(name)
        same = value == other
        if name == "prompt_template":
            same, other = value is None or is_same_template(Path(value), other), "another one"
        if not same:
            said = "%s is %s, while %s was trained with %s: it may answer worse"
            logger.warning(said, name, value, checkpoint, other)
    return learnt | ({"prompt_template": str(path)} if "prompt_template" in learnt else {})


def read_record(path: Path) -> dict[str, Any]:
    """Read a training record. Raises ConfigError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove it, or copy it once more") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: it holds no settings by name; remove it, or copy it once more")
    return record


def template_text(path: Path) -> str:
    """Return the text of a template file, or of the template in a training record (empty if it has none)."""
    return read_record(path).get("prompt_template", "") if path.name == RECORD else path.read_text("utf-8")


def is_same_template(path: Path, template: str) -> bool:
    """Return whether a template file has the text of `template` and no other hint."""
    try:
        lines, known = template_text(path).strip().splitlines(), template.splitlines()
    except (OSError, UnicodeDecodeError):  # opening the template later raises it
        return True
    text, known_text = ([line for line in part if not line.startswith("#hint ")] for part in (lines, known))
    return text == known_text and {line for line in lines if line.startswith("#hint ")} <= set(known)
