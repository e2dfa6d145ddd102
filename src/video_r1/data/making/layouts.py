"""Questions in chats, and reasons to reject a row. Other tables: columns.py.

A draft holds what the row says under a manifest's field names; drafts.py turns it into a manifest row.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
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

REMEDIES: dict[str, str] = {
    reason: remedy.replace("{problem_types}", ", ".join(PROBLEM_TYPES))
    for reason, remedy in tomllib.loads(Path(__file__).with_name("remedies.toml").read_text("utf-8")).items()
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


LAYOUTS = {
    "llava-video": ("conversations",),  # also LLaMA-Factory's sharegpt
    "swift": ("messages",),
    "trl": ("prompt", "completion"),
}
"""Columns of the messages by layout; a row has the first. The columns of other tables, and those beside a
chat, are guessed (columns.py)."""


def layout_of(row: Row) -> str:
    """Return the name of a row's layout; "table" where it has no chat."""
    return next((name for name, columns in LAYOUTS.items() if isinstance(row.get(columns[0]), list)), "table")


def conversation(row: Row, columns: tuple[str, ...]) -> Iterator[Draft]:
    """Yield the questions of a chat, whose files may be in a content's parts. Each pair of `conversations` is
    a question; other columns ask one. System messages are kept as `system`: the prompt template has its own
    instruction. Raises Rejected, and AttributeError or TypeError for other messages."""
    turns = [turn for name in columns for turn in messages(row.get(name) or ())]
    for turn in turns:
        if turn.role not in ("system", "user", "assistant") or (turn.media and turn.role != "user"):
            raise Rejected(
                "message", f"a message of the role {turn.role!r}{' with a file' * bool(turn.media)}"
            )
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken:
        raise Rejected("no question", "it has no messages")
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
    paths = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        path = item.get("path") or item.get("url") if isinstance(item, Mapping) else item
        if isinstance(path, str) and path.startswith("data:"):
            raise Rejected("media inside the table", f"a file in the text ({path[:30]}…)")
        if isinstance(path, (list, tuple)):
            raise Rejected("frames", f"a clip as a list of {len(path)} files")
        if isinstance(path, (str, int, float)) and not isinstance(path, bool):
            paths.append(plain_text(path))
        elif isinstance(path, InTable):
            paths += files_of(path)
        elif path is not None or isinstance(item, Mapping):
            raise Rejected("media inside the table", f"a file inside the table ({type(item).__name__})")
    return paths


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
