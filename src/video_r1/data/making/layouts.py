"""How a row of a table states a question: published layouts, reasons to reject it (columns.py: other tables).

A draft holds what the row says under the names of a manifest's fields; drafts.py turns it into a manifest
row. To add a layout: write a function from a row to its drafts, and add an entry to LAYOUTS.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from video_r1.data.answers import parse_number, parse_options
from video_r1.data.manifests.problem_types import PROBLEM_TYPES
from video_r1.data.manifests.tables import InTable

Row = Mapping[str, Any]
Draft = dict[str, Any]
"""`answer` instead of `solution`; the question may contain its options; the path may lack folders and
extension. `KIND`: what the path's column says that it is."""
Numbers = Literal["text", "from_0", "from_1"]
"""How a whole number given as an answer is read: as an option's text, or as an option's position."""

KEY = "key"
"""Field for the name under which a JSON object holds a row."""
KIND = " kind"
TAGS = re.compile(r"<(?:image|video|audio)>(\s*)")
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

REMEDIES = {
    "unreadable row": "correct the row in the file; in CSV, quote cells that contain the delimiter",
    "no question": "name the column of the questions (--columns problem=COLUMN), or fill in the cell",
    "no answer": "name the column of the answers (--columns answer=COLUMN), fill in the cell, or add the "
    "column from the file that has it",
    "no clip named": "name the column of the files (--columns path=COLUMN, or path=videos+images) or fill in "
    "the cell; a question without a file has the data_type text",
    "no such clip": "put the file below --media_root, or correct its name in the table",
    "several clips": "several files have this name; write its folder too, e.g. clips/move_1.mp4",
    "clip elsewhere": "name its folder with --allowed_roots, or move it; URLs of files need --allow_urls "
    "(pages are no files)",
    "doubtful number": "write it with a point and without separators (3.5), or give --problem_type free-form",
    "options": "give two to 26 different options: a list, red|green|blue in one cell, or a column for each "
    "(--columns options=a0+a1+a2)",
    "letter without options": "write the options into the question, each on a line (A. red), or a column; "
    "if the letter itself is the answer, write free-form into a column problem_type",
    "answer is no option": "give the answer as an option's letter, text or position (--answers from_0 or "
    "from_1)",
    "problem type": f"set --problem_type, or write one of {', '.join(PROBLEM_TYPES)}",
    "no place or time": "write JSON as docs/data-format.md shows it for the problem type",
    "times": "write start and end in seconds or as h:mm:ss",
    "several media": "a question shows images or videos, not both: remove one kind",
    "marks": "write <video> or <image> once for each file, in order, or not at all: files then come first",
    "frames": "put the frames of each clip into a folder of their own, and name the folder",
    "message": "leave messages of system, user and assistant, with files in the user's (calls: docs/look.md)",
    "several questions": "write one row for each question",
    "several answers": "leave the one answer that is to be paid",
    "media inside the table": "name the column that holds one file per cell (--columns path=COLUMN) of a "
    "Parquet file or a hub dataset, whose cells are read in place; or write the files to disk (datasets: "
    "cast_column(NAME, Video(decode=False)), then row[NAME]['bytes']) and name them in a column: "
    "--columns path=COLUMN",
    "subtitles": "convert them to .srt or .vtt in UTF-8",
    "media": "fetch the file again or re-encode it (ffmpeg -i OLD NEW.mp4), or remove the row",
    "no manifest row": "correct the table; docs/data-format.md describes each field",
}
"""Remedy for each reason to reject a row."""


class Rejected(Exception):
    """A row that makes no question. reason: a key of REMEDIES; found: what the row contains."""

    def __init__(self, reason: str, found: str) -> None:
        assert reason in REMEDIES, reason
        super().__init__(f"{reason}: {found}")
        self.reason, self.found = reason, found

    def line(self, row: int, problem_id: Any = None) -> dict[str, Any]:
        """Return the line for OUT.refused.jsonl. row: its number in the table."""
        name = {} if problem_id is None else {"problem_id": problem_id}
        remedy = REMEDIES[self.reason]
        return {"row": row, **name, "reason": self.reason, "found": self.found, "remedy": remedy}


class Turn(NamedTuple):
    """Message of a chat: its text with a tag per file, its files, their kind and window."""

    role: str
    text: str
    media: list[Any]
    fields: Draft


class Layout(NamedTuple):
    """A published layout. fits: tells whether a row has it. numbers: how whole numbers as answers are read,
    where that is known. chat: the columns that `drafts` reads, if the others are read as a table's."""

    drafts: Callable[[Row], Iterator[Draft]]
    fits: Callable[[Row], bool]
    source: str
    numbers: Numbers | None = None
    chat: tuple[str, ...] = ()


def video_r1(row: Row) -> Iterator[Draft]:
    """Read Video-R1's files, and OneThinker's: the file in `images` or `videos`, the answer in `solution` or
    `answer`, and a tag in the question for the file. Segmentation questions are rejected."""
    given = row.get("solution")
    yield {
        **{name: value for name, value in row.items() if name not in ("solution", "videos", "images")},
        "answer": row.get("answer") if given is None else given,
        "path": [path for name in ("videos", "images") for path in files_of(row.get(name))]
        or row.get("path"),
    }


def nextqa(row: Row) -> Iterator[Draft]:
    """Read mc.csv, whose `answer` is the position of the right option among a0 to a4, from 0. NExT-GQA gives
    the option's text instead, and the open-ended file has no a0."""
    options = [row[name] for name in ("a0", "a1", "a2", "a3", "a4") if row.get(name) is not None]
    yield {
        "problem_id": f"{row.get('video')}_{row.get('qid')}",
        "problem": row.get("question"),
        "options": options or None,
        "answer": row.get("answer"),
        "path": row.get("video"),
        "data_source": "NExT-QA",
        "question_type": row.get("type"),
    }


def perception_test(row: Row) -> Iterator[Draft]:
    """Read all_train.json: a video's `mc_question` lists its questions, each with `answer_id` from 0. On the
    hub a row is one question."""
    clip = row.get("video_name") or row.get("video_id") or row.get(KEY)
    for question in row.get("mc_question", [row]):
        number = question.get("id", question.get("question_id"))
        yield {
            "problem_id": f"{clip}-{number}",
            "problem": question.get("question"),
            "options": question.get("options"),
            "answer": question.get("answer_id"),
            "path": clip,
            "data_source": "Perception Test",
            **{name: question.get(name) for name in ("area", "reasoning", "tag")},
        }


def conversation(row: Row, *columns: str) -> Iterator[Draft]:
    """Read a chat: each pair of `conversations` (LLaVA, LLaMA-Factory) is a question; `messages` (ms-swift),
    or `prompt` and `completion` (TRL), ask one. Files may be in a content's parts. System messages are kept
    as `system`: the prompt template has its own instruction."""
    turns = [turn for name in columns for turn in messages(row.get(name) or ())]
    for turn in turns:
        if turn.role not in ("system", "user", "assistant") or (turn.media and turn.role != "user"):
            raise Rejected(
                "message", f"a message of the role {turn.role!r}{' with a file' * bool(turn.media)}"
            )
    spoken = [turn for turn in turns if turn.role != "system"]
    roles = [turn.role for turn in spoken]
    most = len(spoken) if columns == ("conversations",) else 2
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2) or len(roles) > most:
        raise Rejected("several questions", f"the messages are those of {', '.join(roles)}")
    for question, reply in zip_longest(spoken[::2], spoken[1::2]):
        yield {
            "problem": question.text,
            "answer": reply and reply.text,
            "path": [path for turn in turns for path in turn.media] or None,
            "system": "\n".join(turn.text for turn in turns if turn.role == "system") or None,
            **question.fields,
        }


_NEXTQA = {
    "video", "frame_count", "width", "height", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3",
    "a4", "additional_ref_answer",
}  # fmt: skip
LAYOUTS = {
    "onethinker": Layout(
        video_r1,
        lambda row: {"problem", "problem_type"} <= row.keys() and bool({"videos", "images"} & row.keys())
        and "messages" not in row,
        "https://huggingface.co/datasets/OneThink/OneThinker-train-data"),
    "video-r1": Layout(
        video_r1, lambda row: {"problem", "problem_type", "solution", "path"} <= row.keys(),
        "https://huggingface.co/datasets/Video-R1/Video-R1-data"),
    "llava-video": Layout(
        lambda row: conversation(row, "conversations"),
        lambda row: isinstance(row.get("conversations"), list),
        "https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K, also LLaMA-Factory's sharegpt",
        chat=("conversations",)),
    "nextqa": Layout(
        nextqa, lambda row: {"video", "question", "answer", "qid", "type"} <= row.keys() <= _NEXTQA,
        "https://github.com/doc-doc/NExT-QA", "from_0"),
    "perception-test": Layout(
        perception_test,
        lambda row: "mc_question" in row or {"video_name", "answer_id", "options"} <= row.keys(),
        "https://github.com/google-deepmind/perception_test", "from_0"),
    "swift": Layout(
        lambda row: conversation(row, "messages"), lambda row: isinstance(row.get("messages"), list),
        "https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html", chat=("messages",)),
    "trl": Layout(
        lambda row: conversation(row, "prompt", "completion"),
        lambda row: isinstance(row.get("prompt"), list),
        "https://huggingface.co/docs/trl/dataset_formats", chat=("prompt", "completion")),
}  # fmt: skip
"""Layouts by name, in the order in which they are tried. A row that fits none is a table row, whose columns
are guessed."""


def layout_of(row: Row) -> str:
    """Return the name of a row's layout; "table" where none fits."""
    return next((name for name, layout in LAYOUTS.items() if layout.fits(row)), "table")


_ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
_PARTS = ("video", "image", "video_url", "image_url")
_OF_A_PART = (*_PARTS, "type", "text", "index", "video_start", "video_end")


def messages(chat: Iterable[Any]) -> list[Turn]:
    """Read messages of {"role", "content"} or {"from", "value"}; contents are texts or lists of parts."""
    turns = []
    for message in chat:
        role = str(message.get("role") or message.get("from"))
        content = message.get("content", message.get("value"))
        texts, media, fields = [], [], {}
        for part in [{"text": content}] if isinstance(content, str) else content or []:
            files = [path for name in _PARTS for path in files_of(part.get(name))]
            kind = next((name[:5] for name in _PARTS if part.get("type") == name or part.get(name)), None)
            if kind is None and not isinstance(part.get("text"), str):
                raise Rejected("message", f"a part of the type {part.get('type')!r}")
            if unread := [name for name in part if name not in _OF_A_PART and part[name] is not None]:
                raise Rejected("message", f"a part with {', '.join(unread)}, which is not read")
            texts += [part.get("text") or "", *[f"<{kind}>"] * (len(files) or kind is not None)]
            media += files
            fields |= {KIND: kind} if files else {}
            fields |= {name: part[f"video_{name}"] for name in ("start", "end") if part.get(f"video_{name}")}
        turns.append(Turn(_ROLES.get(role, role), "\n".join(filter(None, texts)).strip(), media, fields))
    return turns


def tags_in(text: str) -> list[str]:
    """Return the media tags of a text, in order."""
    return [tag[0].strip() for tag in TAGS.finditer(text)]


def files_of(value: Any) -> list[Any]:
    """Return the paths in a media column: one or several texts or {"path": …}, or an `InTable` for each file
    in a cell of the table. Raises Rejected for other files inside the table."""
    if value is None or value == "":
        return []
    if isinstance(value, InTable):
        return [replace(value, places=(place,)) for place in value.places or ()] or [value]
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = parse_options(value)
    found = []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        path = one.get("path") or one.get("url") if isinstance(one, Mapping) else one
        if isinstance(path, str) and path.startswith("data:"):
            raise Rejected("media inside the table", f"a file in the text ({path[:30]}…)")
        if isinstance(path, (list, tuple)):
            raise Rejected("frames", f"a clip as a list of {len(path)} files")
        if isinstance(path, (str, int, float)) and not isinstance(path, bool):
            found.append(plain_text(path))
        elif isinstance(path, InTable):
            found += files_of(path)
        elif path is not None or isinstance(one, Mapping):
            raise Rejected("media inside the table", f"a file inside the table ({type(one).__name__})")
    return found


def split_response(text: Any) -> tuple[str | None, Any]:
    """Split a response with think or answer tags into rationale and answer; without tags it is an answer."""
    if not isinstance(text, str):
        return None, text
    think, answer = _THINK.match(text), _ANSWER.search(text)
    before = think[1] if think else text[: answer.start()] if answer else ""
    rest = answer[1] if answer else text[think.end() :] if think else text
    return f"<think>{before.strip()}</think>" if before.strip() else None, rest.strip()


def plain_text(value: Any) -> str:
    """Return a cell as text; whole numbers lose the ".0" that a column of floats gives them."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def seconds_of(text: str) -> float | None:
    """Return a time in seconds, from a number or h:mm:ss; None for other texts."""
    if (clock := _CLOCK.fullmatch(text)) is not None:
        return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
    number = parse_number(text)
    return number if number is None or number >= 0 else None
