"""Tables in TRL's format: `prompt` and `image`, pictures inside the table, rewards by functions.

    prompt                                image, images    any other column
    a text, or messages (conversational)  pictures         passed to reward functions as it is

A row becomes a Sample with its own messages. Its pictures are written to a folder, since media are read from
files. Built-in rewards compare with `solution`, `answer` or `ground_truth`, if the table has one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from video_r1.data.manifests.records import CheckedManifest, Problem, Sample
from video_r1.files import draft_of

PROMPT = "prompt"
ANSWERS = ("solution", "answer", "ground_truth")
PICTURES = ("image", "images")
NO_ANSWER = "<answer></answer>"


def is_trl_table(questions: Any) -> bool:
    """Tell whether a dataset or a list of rows has prompts instead of problems."""
    names = getattr(questions, "column_names", None)
    if names is None:
        rows = questions if isinstance(questions, (list, tuple)) else ()
        names = rows[0].keys() if rows and isinstance(rows[0], Mapping) else ()
    return PROMPT in names and "problem_type" not in names


def trl_samples(questions: Any, folder: Path) -> list[Sample]:
    """Return the samples of a table; write its pictures to `folder`. Raises ManifestError."""
    checked = CheckedManifest([], [], [])
    for name, feature in (getattr(questions, "features", None) or {}).items():
        if type(feature).__name__ == "Image":  # the file's bytes, not a decoded picture
            questions = questions.cast_column(name, type(feature)(decode=False))
    for number, row in enumerate(questions, start=1):
        try:
            checked.samples.append(_sample(number, row, folder))
        except ValueError as error:
            checked.problems.append(Problem(number, row.get("problem_id"), str(error)))
    if not checked.samples and not checked.problems:
        checked.problems.append(Problem(0, None, "it has no rows"))
    return checked.without_problems("a table with prompts")


def _sample(number: int, row: Mapping[str, Any], folder: Path) -> Sample:
    """Return a row's sample. Raises ValueError with what is wrong with the row."""
    pictures = [_file_of(picture, folder) for picture in _pictures(row)]
    turns = _turns(row[PROMPT], len(pictures))
    answer = next((row[name] for name in ANSWERS if isinstance(row.get(name), str) and row[name]), None)
    tagged = answer is not None and answer.strip().startswith("<answer>")
    return Sample(
        problem_id=row.get("problem_id", row.get("id", number)),
        problem=turns[-1]["content"],
        data_type="image" if pictures else "text",
        problem_type="free-form",
        solution=NO_ANSWER if answer is None else answer if tagged else f"<answer>{answer}</answer>",
        path=str(pictures[0]) if pictures else "",
        more_paths=tuple(map(str, pictures[1:])),
        messages=turns,
        extra={name: value for name, value in row.items() if name not in PICTURES and value is not None},
    )


def _turns(prompt: Any, pictures: int) -> tuple[Mapping[str, str], ...]:
    """Return the messages with their texts only: the trainer decides where a picture goes, as in TRL. Several
    pictures keep their positions if the user's content has a part for each."""
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(said, Sequence) or not all(isinstance(turn, Mapping) for turn in said):
        raise ValueError(f"its prompt is a {type(prompt).__name__}; it must be a text or a list of messages")
    if not said or said[-1].get("role") != "user":
        raise ValueError("its prompt does not end with a user message")
    contents = [turn.get("content") for turn in said]
    parts = [[{"text": one}] if isinstance(one, str) else one or [] for one in contents]
    turns = list(zip((str(turn.get("role")) for turn in said), parts, strict=True))
    roles = [role for role, content in turns for part in content if part.get("type") == "image"]
    mark = "<image>" if roles == ["user"] * pictures and pictures > 1 else ""
    texts = [[part.get("text") or mark * (part.get("type") == "image") for part in each] for each in parts]
    return tuple(
        {"role": role, "content": "\n".join(filter(None, each))}
        for (role, _), each in zip(turns, texts, strict=True)
    )


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    found = [row[name] for name in PICTURES if row.get(name) is not None]
    return [one for value in found for one in (value if isinstance(value, (list, tuple)) else [value])]


def _file_of(picture: Any, folder: Path) -> Path:
    """Return the file of a picture; write it if it does not exist yet."""
    if isinstance(picture, Image.Image):
        file = BytesIO()
        picture.save(file, "PNG")
        picture = {"bytes": file.getvalue()}
    given = picture if isinstance(picture, Mapping) else {"path": picture}
    if not (content := given.get("bytes")):
        if not isinstance(given.get("path"), (str, Path)):
            raise ValueError(f"its picture is a {type(picture).__name__}; use a file, a PIL image or bytes")
        return Path(given["path"]).resolve()
    path = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with draft_of(path) as draft:
            draft.write_bytes(content)
    return path.resolve()
