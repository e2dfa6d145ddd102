"""How a row of a table states a question: published layouts, columns guessed by name, reasons to reject it.

A draft holds what the row says under the names of a manifest's fields; drafts.py turns it into a manifest
row. To add a layout: write a function from a row to its drafts, and add an entry to LAYOUTS.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

from video_r1.data.manifests.tables import InTable
from video_r1.errors import RequestError
from video_r1.settings.shared import ProblemType

Row = Mapping[str, Any]
Draft = dict[str, Any]
"""`answer` instead of `solution`; the question may contain its options; the path may lack folders and
extension."""
Numbers = Literal["text", "from_0", "from_1"]
"""How a whole number given as an answer is read: as an option's text, or as an option's position."""

KEY = "key"
"""Field for the name under which a JSON object holds a row."""
NOTHING = "none"
"""Written instead of a column's name for a field that has no column."""
_TAGS = re.compile(r"<(?:image|video)>\s*")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPTION = re.compile(r"(?:a|ans|answer|option|opt|choice|candidate)?([0-9])|(?:option|opt|choice)?([a-j])")

REMEDIES = {
    "unreadable row": "correct the row in the file; in CSV, quote cells that contain the delimiter",
    "no question": "name the column of the questions (--columns problem=COLUMN), or fill in the cell",
    "no answer": "name the column of the answers (--columns answer=COLUMN), or fill in the cell",
    "no clip named": "name the column of the files (--columns path=COLUMN), or fill in the cell",
    "no such clip": "put the file below --media_root, or correct its name in the table",
    "several clips": "several files have this name; write its folder too, e.g. clips/move_1.mp4",
    "clip elsewhere": "name its folder with --allowed_roots, or move it; URLs need --allow_urls",
    "doubtful number": "write it with a point and without separators (3.5), or give --problem_type free-form",
    "options": "give two to 26 different options: a list, or a column for each (--columns options=a0+a1+a2)",
    "answer is no option": "give the answer as an option's letter, text or position (--answers from_0 or "
    "from_1)",
    "problem type": f"set --problem_type, or write one of {', '.join(get_args(ProblemType))}",
    "no place or time": "write JSON as docs/data-format.md shows it for the problem type",
    "times": "write start and end in seconds or as h:mm:ss",
    "several media": "a question shows images or videos, not both: remove one kind",
    "several questions": "write one row for each question",
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
    """Message of a chat: its text with a tag per file, and its files."""

    role: str
    tagged: str
    media: list[str]

    @property
    def text(self) -> str:
        return without_tags(self.tagged)


class Layout(NamedTuple):
    """A published layout. fits: tells whether a row has it. numbers: how whole numbers as answers are read,
    where that is known."""

    drafts: Callable[[Row], Iterator[Draft]]
    fits: Callable[[Row], bool]
    source: str
    numbers: Numbers | None = None


def video_r1(row: Row) -> Iterator[Draft]:
    """Read Video-R1's files, and OneThinker's: the file in `images` or `videos`, the answer in `solution` or
    `answer`, and a tag in the question for the file. Segmentation questions are rejected."""
    media = media_of(row, ("videos", "images")) or files_of(row.get("path"))
    given = row.get("solution")
    process, answer = split_response(row.get("answer") if given is None else given)
    yield {
        **{name: value for name, value in row.items() if name not in ("solution", "videos", "images")},
        "problem": row["problem"] if len(media) > 1 else without_tags(str(row["problem"])),
        "answer": answer,
        "process": row.get("process") or process,
        "path": media,
    }


def llava_video(row: Row) -> Iterator[Draft]:
    """Read several questions and answers about one clip or about images. The question contains the options,
    one a line, followed by an instruction. Multiple-choice answers are "B." or "B. text"."""
    turns, media = messages(row["conversations"]), media_of(row, ("video",)) or media_of(row, ("image",))
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    for number, (question, answer) in enumerate(pairs, start=1):
        name = row.get("id")
        yield {
            "problem_id": name if name is None or len(pairs) == 1 else f"{name}-{number}",
            "problem": question.tagged if len(media) > 1 else question.text,
            "answer": answer.text,
            "path": media,
            "data_source": row.get("data_source"),
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


def conversation(row: Row, chat: Iterable[Any]) -> Iterator[Draft]:
    """Read one conversation (ms-swift's `messages`; TRL's `prompt` and `completion`), its files in lists or
    in the content's parts. A system message is dropped: the prompt template has its own instruction."""
    turns = [turn for turn in messages(chat) if turn.role != "system"]
    asked = [turn for turn in turns if turn.role == "user"]
    if len(asked) > 1:
        raise Rejected("several questions", f"a conversation with {len(asked)} questions")
    replies = [turn.text for turn in turns if turn.role == "assistant"]
    given = next(
        (row[name] for name in ("solution", "answer", "ground_truth") if row.get(name) is not None), None
    )
    process, answer = split_response(replies[-1] if replies and given is None else given)
    if replies and given is not None:
        process = split_response(replies[-1])[0]
    media = media_of(row, ("videos", "video", "images", "image"))
    media = media or [path for turn in asked for path in turn.media]
    texts = [turn.tagged if len(media) > 1 else turn.text for turn in asked]
    yield {
        "problem_id": row.get("problem_id", row.get("id")),
        "problem": texts[0] if texts else None,
        "answer": answer,
        "process": process,
        "path": media,
        **{name: row.get(name) for name in ("options", "problem_type", "data_type", "data_source")},
    }


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
        llava_video, lambda row: isinstance(row.get("conversations"), list),
        "https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K"),
    "nextqa": Layout(
        nextqa, lambda row: {"video", "question", "answer", "qid", "type"} <= row.keys(),
        "https://github.com/doc-doc/NExT-QA", "from_0"),
    "perception-test": Layout(
        perception_test,
        lambda row: "mc_question" in row or {"video_name", "answer_id", "options"} <= row.keys(),
        "https://github.com/google-deepmind/perception_test", "from_0"),
    "swift": Layout(
        lambda row: conversation(row, row["messages"]), lambda row: isinstance(row.get("messages"), list),
        "https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html"),
    "trl": Layout(
        lambda row: conversation(row, [*row["prompt"], *(row.get("completion") or [])]),
        lambda row: isinstance(row.get("prompt"), list),
        "https://huggingface.co/docs/trl/dataset_formats"),
}  # fmt: skip
"""Layouts by name, in the order in which they are tried. A row that fits none is a table row, whose columns
are guessed."""


def layout_of(row: Row) -> str:
    """Return the name of a row's layout; "table" where none fits."""
    return next((name for name, layout in LAYOUTS.items() if layout.fits(row)), "table")


def messages(chat: Iterable[Any]) -> list[Turn]:
    """Read messages of {"role", "content"} or {"from", "value"}; contents are texts or lists of parts."""
    turns = []
    for message in chat:
        role = {"human": "user", "gpt": "assistant"}.get(str(message.get("from")), message.get("role"))
        content = message.get("content", message.get("value"))
        parts = [{"text": content}] if isinstance(content, str) else content or []
        media = [path for part in parts for path in media_of(part, ("video", "image"))]
        tags = {"video": "<video>", "image": "<image>"}
        texts = [text for part in parts if (text := part.get("text") or tags.get(str(part.get("type"))))]
        turns.append(Turn(str(role), "\n".join(texts).strip(), media))
    return turns


def tags_in(text: str) -> list[str]:
    """Return the media tags of a text, in order."""
    return [tag.strip() for tag in _TAGS.findall(text)]


def without_tags(text: str) -> str:
    """Remove the media tags from a text."""
    return _TAGS.sub("", text).strip()


def media_of(row: Row, columns: Sequence[str]) -> list[Any]:
    """Return the files that the columns name; a single one if all are the same."""
    found = [path for name in columns for path in files_of(row.get(name))]
    return found[:1] if len(set(found)) == 1 else found


def files_of(value: Any) -> list[Any]:
    """Return the paths in a media column: one or several texts or {"path": …}, or an `InTable` for each file
    in a cell of the table. Raises Rejected for other files inside the table."""
    if value is None:
        return []
    if isinstance(value, InTable) and value.places is not None:
        return [replace(value, places=(place,)) for place in value.places]
    found = []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        path = one.get("path") or one.get("url") if isinstance(one, Mapping) else one
        if not isinstance(path, str):
            raise Rejected("media inside the table", f"a file inside the table ({type(one).__name__})")
        found.append(path)
    return found


def split_response(text: Any) -> tuple[str | None, Any]:
    """Split a response with think and answer tags into rationale and answer; without tags it is an answer."""
    if not isinstance(text, str):
        return None, text
    think, answer = _THINK.match(text), _ANSWER.search(text)
    rest = text[think.end() :] if think else text
    process = f"<think>{think.group(1).strip()}</think>" if think and think.group(1).strip() else None
    return process, (answer.group(1) if answer else rest).strip()


# --- tables without a published layout -----------------------------------------------------------

# Column names for each field, in lower case without punctuation; the first one that a table has counts.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "questiontext", "query", "prompt", "instruction", "q"),
    "answer": (
        "answer", "solution", "correctanswer", "correctoption", "correctchoice", "correct", "answerid",
        "answeridx", "answerindex", "correctidx", "correctindex", "groundtruth", "gt", "label",
        "target", "ans", "truth", "answertext", "gold",
    ),
    "options": ("options", "choices", "candidates", "answerchoices", "mcoptions", "answeroptions"),
    "path": (
        "path", "videopath", "video", "videofile", "videoname", "videofilename", "clip", "clippath",
        "filepath", "file", "filename", "media", "mediapath", "videoid", "vid", "clipid", "clipname",
        "image", "imagepath", "imagefile", "imagename", "imageid", "img",
    ),
    "problem_id": ("problemid", "questionid", "qid", "quid", "uid", "id", "key"),
    "problem_type": ("problemtype",),
    "data_type": ("datatype", "modality", "mediatype"),
    "process": ("process", "rationale", "reasoning", "cot", "chainofthought", "explanation"),
    "data_source": ("datasource", "source", "dataset"),
    "start": ("start", "starttime", "startsec", "startseconds", "starts", "begin"),
    "end": ("end", "endtime", "endsec", "endseconds", "ends"),
    "subtitles": ("subtitles", "subtitle", "subtitlepath", "subs", "srt", "vtt", "transcript"),
}  # fmt: skip


class Columns(NamedTuple):
    """The columns of each field: options and paths may have several."""

    names: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]

    def values(self, row: Row) -> dict[str, Any]:
        """Return the fields of a row whose columns are not empty. Several columns give a list, without the
        empty cells at its end."""
        found = {}
        for field, names in self.names.items():
            cells = [row.get(name) for name in names]
            while cells and cells[-1] in (None, "", []):
                cells.pop()
            if cells:
                found[field] = cells if len(names) > 1 else cells[0]
        return found


def guess_columns(names: Iterable[str], given: Mapping[str, str]) -> Columns:
    """Find the columns of each field. given: maps a field to its column, to columns joined by "+", or to
    "none".

    Raises RequestError for unknown fields and columns.
    """
    names = [str(name) for name in names]
    found: dict[str, tuple[str, ...]] = {}
    for field, column in given.items():
        if field not in COLUMN_NAMES:
            raise RequestError(f"columns: no field {field!r}; known are {', '.join(COLUMN_NAMES)}")
        found[field] = () if column == NOTHING else (column,) if column in names else (*column.split("+"),)
        if missing := [one for one in found[field] if one not in names]:
            raise RequestError(f"columns: the table has no column {missing[0]!r}, only {', '.join(names)}")
    taken = {name for columns in found.values() for name in columns}
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in reversed(names) if name not in taken}
    for field, known in COLUMN_NAMES.items():
        guess = tuple(plain[name] for name in known if name in plain)[:1]
        found.setdefault(field, guess or (option_columns(plain) if field == "options" else ()))
    used = {name for columns in found.values() for name in columns}
    fields = {field: found[field] for field in COLUMN_NAMES if found[field]}
    return Columns(fields, tuple(name for name in names if name not in used))


def option_columns(plain: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns of single options in order, at least two: a0, a1, … or option_1, option_2, … or A,
    B, …. plain: maps a name in lower case without punctuation to its column."""
    series: dict[str, dict[int, str]] = {}
    for name, column in plain.items():
        if match := _OPTION.fullmatch(name):
            digit, letter = match.groups()
            place = int(digit) if digit else ord(letter) - ord("a")
            series.setdefault(name[:-1] + ("#" if digit else "@"), {})[place] = column
    for found in series.values():
        first = min(found)
        if first <= 1 and len(found) >= 2 and sorted(found) == list(range(first, first + len(found))):
            return tuple(found[place] for place in sorted(found))
    return ()
