"""Tables in TRL's format: prompts with pictures or clips, and rewards by functions.

    prompt                       image, images, video, videos      any other column
    a text, or a list of         files, addresses, PIL images,     passed to reward functions as it is
    messages                     {"bytes": …} or {"path": …}

Media may be in the parts of a message instead. A row becomes a manifest's row with messages (records.py), and
is checked like one. Pictures and clips inside the table are written to a folder, since media are read from
files. Built-in rewards compare with `solution`, `answer` or `ground_truth`, if the table has one.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from itertools import islice
from numbers import Number
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from video_r1.data.answers import extract_answer
from video_r1.data.decoding.pictures import upright
from video_r1.data.manifests.problem_types import (
    BY_ROW,
    PROBLEM_TYPES,
    YES_NO,
    renaming,
    tell_renamings,
    type_of,
)
from video_r1.data.manifests.records import (
    CHAT_FORM,
    CheckedManifest,
    Problem,
    Sample,
    check_row,
    read_chat,
)
from video_r1.data.manifests.tables import OwnPlace
from video_r1.data.scores import correctness
from video_r1.data.sources.media_paths import MediaPaths
from video_r1.data.sources.media_types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from video_r1.data.sources.remote import is_address, on_this_machine
from video_r1.files import draft_of
from video_r1.settings.shared import BadRows, ProblemType

PROMPT = "prompt"
ANSWERS = ("solution", "answer", "ground_truth")
NO_ANSWER = "<answer></answer>"
Kind = Literal["image", "video"]
MEDIA_COLUMNS: dict[str, Kind] = {"image": "image", "images": "image", "video": "video", "videos": "video"}
READ_COLUMNS = ("start", "end", "play", "fps", "process", "data_source")
"""Columns that are read as in a manifest."""
Held = tuple[Kind, Any]
"""Kind of a file, and what a row has of it: path, address, PIL image, bytes; None: only its place."""

_NO_PROMPT = f"its prompt must be a text, or a list of {CHAT_FORM} or parts, the last one the user's"


def is_trl_table(questions: Any) -> bool:
    """Tell whether a dataset or a list of rows has prompts instead of problems."""
    names = getattr(questions, "column_names", None)
    if names is None:  # a list, or a streamed dataset whose columns are not known
        rows = questions if isinstance(questions, (list, tuple)) or hasattr(questions, "features") else ()
        names = next((row.keys() for row in islice(rows, 1) if isinstance(row, Mapping)), ())
    return PROMPT in names and not ("problem_type" in names and {"problem", "messages"}.intersection(names))


def trl_samples(
    questions: Any, folder: Path, places: MediaPaths | None = None, bad_rows: BadRows = "stop"
) -> list[Sample]:
    """Return the samples of a table, and write the media inside it to `folder`. Raises ManifestError.

    places: where relative paths start, and whether addresses are taken (default: the current folder, no). Ids
    that are no ids, or come twice, are replaced by the rows' numbers.
    """
    places = places or MediaPaths(os.getcwd())
    checked, renamings = CheckedManifest([], [], []), Counter[str]()
    for name, feature in (getattr(questions, "features", None) or {}).items():
        if (stored := _undecoded(feature)) != feature:  # files' bytes, not decoded pictures and clips
            questions = questions.cast_column(name, stored)
    for number, row in enumerate(questions, start=1):
        try:
            sample, found = _sample(number, row, folder, places)
        except ValueError as error:
            sample, found = None, [str(error)]
        checked.problems.extend(Problem(number, None, text) for text in found)
        if sample is not None:
            given = row.get("problem_type") or sample.problem_type
            renamings[renaming(given, sample.problem_type)] += given != sample.problem_type
            checked.samples.append(sample)
            checked.rows.append(number)
    if not checked.samples and not checked.problems:
        checked.problems.append(Problem(0, None, "it has no rows"))
    samples = checked.without_problems("a table with prompts", bad_rows)
    tell_renamings(+renamings)
    ids = [sample.problem_id for sample in samples]
    if len(set(map(str, ids))) == len(ids) and all(type(one) in (int, str) for one in ids):
        return samples
    return [replace(sample, problem_id=row) for sample, row in zip(samples, checked.rows, strict=True)]


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # a list
        return replace(feature, feature=_undecoded(feature.feature))
    return replace(feature, decode=False) if hasattr(feature, "decode") else feature


def _sample(number: int, row: Any, folder: Path, places: MediaPaths) -> tuple[Sample | None, list[str]]:
    """Return a row's sample, or None and what is wrong with the row, as `check_row` does. Raises ValueError
    for a row that has no form.
    """
    if not isinstance(row, Mapping) or row.get(PROMPT) is None:
        raise ValueError("prompt is missing")
    columns: list[Held] = []
    for name, kind in MEDIA_COLUMNS.items():
        value = row.get(name)
        several = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        columns.extend((kind, one) for one in several)
    said, media, turns = _chat(row[PROMPT], columns)
    if not media and (name := _column_with_media(row)):
        raise ValueError(
            f"its column {name} holds a picture or clip, which would not be shown: rename the column to "
            "image or video, or remove it"
        )
    answer, problem_type = _answer(row)
    made = {
        **{name: row[name] for name in READ_COLUMNS if name in row},
        "problem_id": number,
        "problem": turns[-1]["content"],
        "data_type": media[0][0] if media else "text",
        "problem_type": problem_type if answer else "free-form",
        "solution": f"<answer>{answer or 'none'}</answer>",
        "path": [OwnPlace(_file_of(value, kind, folder, places)) for kind, value in media],
        "messages": turns,
    }
    sample, found = check_row(made, places, correctness if answer else None)
    if sample is None:
        return None, found
    extra = {name: value for name, value in row.items() if name not in MEDIA_COLUMNS and value is not None}
    known = {} if answer else {"problem_type": problem_type, "solution": NO_ANSWER}
    problem_id = row.get("problem_id", row.get("id", number))
    return replace(sample, problem_id=problem_id, extra={**extra, PROMPT: said}, **known), []


def _chat(prompt: Any, columns: list[Held]) -> tuple[Any, list[Held], tuple[Mapping[str, str], ...]]:
    """Return the prompt without the files in it, the row's media in order, and the messages as texts.

    A part for a file becomes a mark (`Sample.mark`) if all such parts are the user's; otherwise the files
    precede the first question. Raises ValueError.
    """
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(said, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in said):
        raise ValueError(_NO_PROMPT)
    contents = [turn.get("content") for turn in said]
    parts = [[*map(_part, each)] if isinstance(each, (list, tuple)) else [_part(each)] for each in contents]
    held = [part for each in parts for part in each if isinstance(part, tuple)]
    plain = [all(isinstance(part, str) for part in each) for each in parts]
    roles = {turn.get("role") for turn, is_plain in zip(said, plain, strict=True) if not is_plain}
    inside = [part for part in held if part[1] is not None]
    media = inside or columns
    kinds = {kind for kind, _ in (*media, *held)}
    mark = f"<{next(iter(kinds), None)}>"
    written = sum(part.count(mark) for each in parts for part in each if isinstance(part, str))
    refused = {
        "it has images and videos; a question is about one kind": len(kinds) > 1,
        "its prompt holds files, and so does its column image or video; remove one": inside and columns,
        f"its prompt has places for {len(held)} files, and the row has {len(media)}": (
            held and len(held) != len(media)
        ),
        f"its prompt has the mark {mark} {written} times for {len(media)} files": (
            len(media) > 1 and written not in (0, len(media))
        ),
    }
    if reason := next((reason for reason, is_so in refused.items() if is_so), None):
        raise ValueError(reason)
    place = mark if not written and roles == {"user"} else ""
    texts = ["".join(part if isinstance(part, str) else place for part in each) for each in parts]
    try:
        turns, work = read_chat([{**turn, "content": text} for turn, text in zip(said, texts, strict=True)])
    except (ValueError, TypeError):
        raise ValueError(_NO_PROMPT) from None
    if work or not turns:
        raise ValueError(_NO_PROMPT)
    kept = turns if inside else said  # for reward functions; files in it would fill the memory
    return prompt if isinstance(prompt, str) else [*kept], media, turns


def _part(part: Any) -> str | Held:
    """Return the text of a part of a message, or what it has of a file. Raises ValueError."""
    if not isinstance(part, (str, Mapping)):
        raise ValueError(_NO_PROMPT)
    named = {"text": part} if isinstance(part, str) else {k: v for k, v in part.items() if v is not None}
    kind = str(named.pop("type", "text")).removeprefix("input_").removesuffix("_url")
    if kind == "text":
        return str(named.get("text", ""))
    if kind not in ("image", "video"):
        raise ValueError(f"its prompt has a part of the type {kind}; known are text, image and video")
    found = [named.pop(name) for name in (kind, f"{kind}_url", "url", "path") if name in named]
    named.pop("index", None)  # of the file in the column
    if named:
        raise ValueError(
            f"a part of its prompt has {', '.join(named)}, which is not read: set fps, max_frames, "
            "frame_pixels and so on for the run; start and end are columns"
        )
    file = found[0] if found else None
    held = file["url"] if isinstance(file, Mapping) and "url" in file else file
    return ("image" if kind == "image" else "video"), held


def _column_with_media(row: Mapping[str, Any]) -> str | None:
    """Return the name of a column with a picture, bytes, or the path of an image or video."""
    for name, value in row.items():
        one = value[0] if isinstance(value, (list, tuple)) and value else value
        one = one.get("bytes") or one.get("path") if isinstance(one, Mapping) else one
        is_path = len(str(one).split()) == 1 and name not in (PROMPT, *ANSWERS)
        ending = os.path.splitext(str(one))[1].lower() if is_path else ""
        if isinstance(one, (Image.Image, bytes)) or ending in IMAGE_EXTENSIONS + VIDEO_EXTENSIONS:
            return name
    return None


def _answer(row: Mapping[str, Any]) -> tuple[str, ProblemType]:
    """Return answer and type: the first column of ANSWERS with a text or a number; "" without.

    A yes/no question, whose prompt stays as it is, is compared as a text. Raises ValueError for other types.
    """
    named = type_of(str(row.get("problem_type") or "auto"))
    if named is None:
        raise ValueError(f"problem_type is {row['problem_type']!r}; known are {', '.join(PROBLEM_TYPES)}")
    kind = cast("ProblemType | None", {BY_ROW: None, YES_NO: "free-form"}.get(named, named))
    for value in map(row.get, ANSWERS):
        value = value.item() if isinstance(value, np.generic) else value
        text = str(value).strip() if isinstance(value, (str, Number)) else ""
        if text.lower() not in ("", "nan", "inf", "-inf"):
            answer = extract_answer(text) or text
            return answer, kind or ("free-form" if isinstance(value, (str, bool)) else "numerical")
    return "", kind or "free-form"


def _file_of(held: Any, kind: Kind, folder: Path, places: MediaPaths) -> str:
    """Return the place of a file; write it if it is inside the row. Raises ValueError."""
    content, path = held if isinstance(held, bytes) else None, held
    if isinstance(held, Image.Image) and kind == "image":
        file = BytesIO()
        try:
            upright(held).save(file, "PNG")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"its image cannot be read ({error})") from error
        content = file.getvalue()
    elif isinstance(held, Mapping):
        content, path = held.get("bytes"), held.get("path")
    elif isinstance(held, str) and held.startswith("data:"):
        content = base64.b64decode(held.partition(",")[2])
    if not content:
        if not isinstance(path, (str, Path)) or not str(path):
            raise ValueError(
                f"its {kind} is a {type(held).__name__}; use a file, a folder of frames, an address, or bytes"
            )
        name = on_this_machine(str(path))
        return places.find(name) if is_address(name) else os.path.realpath(os.path.join(places.root, name))
    written = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.{'png' if kind == 'image' else 'mp4'}"
    if not written.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with draft_of(written) as draft:
            draft.write_bytes(content)
    return str(written.resolve())
