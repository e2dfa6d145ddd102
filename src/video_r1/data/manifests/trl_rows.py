"""Tables as TRL's trainers take them: `prompt` and `image`, pictures inside the table, rewards by functions.

    prompt                                image, images    any other column
    a text, or messages (conversational)  pictures         given to reward functions as it stands there

A row becomes a Sample with its own messages. Its pictures are written into a folder, since media are read
from files. `solution`, `answer` or `ground_truth`, where the table has one, is compared with by built-in
rewards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from video_r1.data.manifests.records import Problem, Sample
from video_r1.errors import ManifestError

PROMPT = "prompt"
ANSWERS = ("solution", "answer", "ground_truth")
PICTURES = ("image", "images")
NO_ANSWER = "<answer></answer>"


def is_trl_table(questions: Any) -> bool:
    """Whether a data set or a list of rows has prompts in place of problems."""
    names = getattr(questions, "column_names", None)
    if names is None:
        rows = questions if isinstance(questions, (list, tuple)) else ()
        names = rows[0].keys() if rows and isinstance(rows[0], Mapping) else ()
    return PROMPT in names and "problem_type" not in names


def trl_samples(questions: Iterable[Mapping[str, Any]], folder: Path) -> list[Sample]:
    """The samples of a table, their pictures in `folder`. Raises ManifestError with every problem."""
    samples, problems = [], []
    for number, row in enumerate(_undecoded(questions), start=1):
        try:
            samples.append(_sample(number, row, folder))
        except ValueError as error:
            problems.append(Problem(number, row.get("problem_id"), str(error)))
    if problems or not samples:
        shown = "; ".join(map(str, problems[:20])) or "it has no rows"
        raise ManifestError(f"a table with prompts: {len(problems)} problems: {shown}", tuple(problems))
    return samples


def _undecoded(questions: Any) -> Iterable[Mapping[str, Any]]:
    """A data set whose pictures are files' bytes; rows of a list as they are."""
    for name, feature in (getattr(questions, "features", None) or {}).items():
        if type(feature).__name__ == "Image":
            questions = questions.cast_column(name, type(feature)(decode=False))
    return questions


def _sample(number: int, row: Mapping[str, Any], folder: Path) -> Sample:
    """Raises ValueError with what is wrong with the row."""
    pictures = [_file_of(picture, folder) for picture in _pictures(row)]
    turns = _turns(row[PROMPT], len(pictures))
    answer = next((row[name] for name in ANSWERS if isinstance(row.get(name), str) and row[name]), None)
    tagged = answer is not None and answer.strip().startswith("<answer>")
    return Sample(
        problem_id=row.get("problem_id", row.get("id", number)),
        problem=turns[-1]["content"],
        data_type="image",
        problem_type="free-form",
        solution=NO_ANSWER if answer is None else answer if tagged else f"<answer>{answer}</answer>",
        path=str(pictures[0]),
        more_paths=tuple(map(str, pictures[1:])),
        messages=turns,
        extra={name: value for name, value in row.items() if name not in PICTURES and value is not None},
    )


def _turns(prompt: Any, pictures: int) -> tuple[Mapping[str, str], ...]:
    """Messages with their texts alone: where a picture stands is the trainer's choice, as in TRL. Several
    stand where the user's content has a part for each."""
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(said, Sequence) or not all(isinstance(turn, Mapping) for turn in said):
        raise ValueError(f"its prompt is a {type(prompt).__name__}, no text and no list of messages")
    contents = [turn.get("content") for turn in said]
    parts = [[{"text": one}] if isinstance(one, str) else one or [] for one in contents]
    roles = [
        turn.get("role")
        for turn, content in zip(said, parts, strict=True)
        for part in content
        if part.get("type") == "image"
    ]
    mark = "<image>" if roles == ["user"] * pictures and pictures > 1 else ""
    turns = []
    for turn, content in zip(said, parts, strict=True):
        texts = [part.get("text") or mark * (part.get("type") == "image") for part in content]
        turns.append({"role": str(turn.get("role")), "content": "\n".join(filter(None, texts))})
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("its prompt does not end with a message of the user")
    return tuple(turns)


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    found = [row[name] for name in PICTURES if row.get(name) is not None]
    pictures = [one for value in found for one in (value if isinstance(value, (list, tuple)) else [value])]
    if not pictures:
        raise ValueError(f"it has no picture in {' and '.join(PICTURES)}; one or more are needed")
    return pictures


def _file_of(picture: Any, folder: Path) -> Path:
    """The file of a picture, written where it is not there yet."""
    if isinstance(picture, (str, Path)):
        return Path(picture).resolve()
    if isinstance(picture, Image.Image):
        file = BytesIO()
        picture.save(file, "PNG")
        content = file.getvalue()
    elif isinstance(picture, Mapping) and picture.get("bytes"):
        content = picture["bytes"]
    elif isinstance(picture, Mapping) and picture.get("path"):
        return Path(picture["path"]).resolve()
    else:
        raise ValueError(f"its picture is a {type(picture).__name__}, none of a file, a PIL image or bytes")
    path = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{id(content)}.partial")
        draft.write_bytes(content)
        draft.replace(path)
    return path.resolve()
