"""What a checkpoint carries of how it was trained: `video_r1.json` beside its processor's files.

    {"fps": 2.0, "min_frames": 4, "max_frames": 8, "frame_pixels": 3136, "image_pixels": 3136,
     "prompt_template": "{question}…", "dtype": "float32", "positions": "transformers"}

A model that is asked with other frames or words than it has learnt from answers badly, and nothing would say
so. Hence these are the defaults of every command that loads the checkpoint. Other programs ignore the file.

dtype: the number format that the model computed in. positions: whose rule places what follows a video, for
models where vLLM has another one (see rollout/vllm/mrope.py).
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
    """The settings among `names` that a checkpoint folder carries and that are not `given`.

    Where one that is given differs, a warning says so. A template comes as the path of the checkpoint's file,
    which `load_template` reads. Raises ConfigError when the file is damaged.
    """
    path = Path(checkpoint or "") / RECORD
    if checkpoint is None or not path.is_file():
        return {}
    carried = read_record(path)
    settings = {name: carried[name] for name in (*BUDGET, "dtype") if name in carried}
    if "prompt_template" in carried:
        settings["prompt_template"] = str(path)
    settings = {name: value for name, value in settings.items() if name in names}
    for name in [name for name in settings if name in given]:
        same = given[name] == settings[name]
        if name == "prompt_template":
            same = given[name] is None or says_the_same(Path(given[name]), carried[name])
        if not same:
            logger.warning(
                "%s is %s, while %s was trained with %s: it may answer worse", name, given[name], checkpoint,
                "another one" if name == "prompt_template" else settings[name],
            )  # fmt: skip
    return {name: value for name, value in settings.items() if name not in given}


def read_record(path: Path) -> dict[str, Any]:
    """What the file says. Raises ConfigError when it is no such file."""
    try:
        carried = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove it, or copy it once more") from error
    if not isinstance(carried, dict):
        raise ConfigError(f"{path}: it holds no settings by name; remove it, or copy it once more")
    return carried


def template_text(path: Path) -> str:
    """The text of a template file, or of the template that a checkpoint's file carries (none: empty)."""
    return read_record(path).get("prompt_template", "") if path.name == RECORD else path.read_text("utf-8")


def says_the_same(path: Path, template: str) -> bool:
    """Whether a template file has the text of `template`, and no hint that differs from its hints."""
    try:
        lines, known = template_text(path).strip().splitlines(), template.splitlines()
    except (OSError, UnicodeDecodeError):  # whoever opens it says so
        return True
    text, known_text = ([line for line in part if not line.startswith("#hint ")] for part in (lines, known))
    return text == known_text and {line for line in lines if line.startswith("#hint ")} <= set(known)
