"""How the rows of published data sets say a question: for each layout one function from a row to drafts.

A draft has what the row says, by the names of a manifest's fields, as it stands there; `drafts.py` makes a
row of a manifest of it. To add a layout: a function, and a line in LAYOUTS.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from video_r1.data.making.options import Reading
from video_r1.data.making.refusals import Refused
from video_r1.data.making.tabular import KEY
from video_r1.data.manifests.tables import InTable

Row = Mapping[str, Any]
Draft = dict[str, Any]
"""`answer` in place of `solution`; options may be in the question; the path may lack folders and ending."""

MAP_FILE = "map_vid_vidorID.json"  # of NExT-QA: the folder of each video
_TAGS = re.compile(r"<(?:image|video)>\s*")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Turn(NamedTuple):
    """One message: its text without tags of media, the files that its parts name, and the text with a tag
    where each file stands."""

    role: str
    text: str
    media: tuple[str, ...] = ()
    tagged: str = ""


class Layout(NamedTuple):
    """A published layout. fits: whether a row is of it. numbers: how whole numbers as answers are read, where
    that is known. map_file: beside the table, a JSON
    object with the path of each video."""

    drafts: Callable[[Row], Iterator[Draft]]
    fits: Callable[[Row], bool]
    source: str
    numbers: Reading | None = None
    map_file: str = ""


def video_r1(row: Row) -> Iterator[Draft]:
    """Video-R1-260k.json, and Video-R1-COT-165k.json, which has `process` as well."""
    process, answer = split_response(row.get("solution"))
    said = {name: value for name, value in row.items() if name != "solution"}
    yield {**said, "answer": answer, "process": row.get("process") or process}


def onethinker(row: Row) -> Iterator[Draft]:
    """onethinker_rl_train.json: as Video-R1's, the file in `images` or `videos`, the answer in `solution`
    or `answer`, and a tag in the question where it goes. Its segmentation is refused."""
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
    """Several questions and answers about one clip, or about images. Options stand in the question, a line
    each, and an instruction behind them. The multiple-choice answers are "B." or "B. text"."""
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
    """mc.csv: `answer` is the place of the right one of a0 to a4, from 0. NExT-GQA has its text there, and
    the open-ended file has no a0."""
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
    """all_train.json: a video's `mc_question` has its questions, each with `answer_id` from 0. On the hub a
    row is one question."""
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


def swift(row: Row) -> Iterator[Draft]:
    """`messages` with the tags <video> and <image>, and lists of their files; for GRPO `solution` beside
    them."""
    return conversation(row, row["messages"])


def trl(row: Row) -> Iterator[Draft]:
    """`prompt` is a list of messages, whose content may have parts; the answer is `solution`, `answer` or
    `ground_truth`, or the `completion`."""
    return conversation(row, [*row["prompt"], *(row.get("completion") or [])])


def conversation(row: Row, said: Iterable[Any]) -> Iterator[Draft]:
    """The draft of one conversation, whose system message this project's own instruction takes the place
    of."""
    turns = [turn for turn in messages(said) if turn.role != "system"]
    asked = [turn for turn in turns if turn.role == "user"]
    if len(asked) > 1:
        raise Refused("several questions", f"a conversation with {len(asked)} questions")
    replies = [turn.text for turn in turns if turn.role == "assistant"]
    given = next(
        (row[name] for name in ("solution", "answer", "ground_truth") if row.get(name) is not None), None
    )
    process, answer = split_response(replies[-1] if replies and given is None else given)
    if replies and given is not None:
        process = split_response(replies[-1])[0]
    media = media_of(row, ("videos", "video", "images", "image"))
    media = media or [path for turn in asked for path in turn.media]
    said = [turn.tagged if len(media) > 1 else turn.text for turn in asked]
    yield {
        "problem_id": row.get("problem_id", row.get("id")),
        "problem": said[0] if said else None,
        "answer": answer,
        "process": process,
        "path": media,
        **{name: row.get(name) for name in ("options", "problem_type", "data_type", "data_source")},
    }


LAYOUTS = {
    "onethinker": Layout(
        onethinker,
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
        "https://github.com/doc-doc/NExT-QA", "from_0", MAP_FILE),
    "perception-test": Layout(
        perception_test,
        lambda row: "mc_question" in row or {"video_name", "answer_id", "options"} <= row.keys(),
        "https://github.com/google-deepmind/perception_test", "from_0"),
    "swift": Layout(
        swift, lambda row: isinstance(row.get("messages"), list),
        "https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html"),
    "trl": Layout(
        trl, lambda row: isinstance(row.get("prompt"), list),
        "https://huggingface.co/docs/trl/dataset_formats"),
}  # fmt: skip
"""By name, in the order in which they are tried. What fits none is a table, whose columns are guessed."""


def layout_of(row: Row) -> str:
    """The name of the layout that a row is of; "table" for any other."""
    return next((name for name, layout in LAYOUTS.items() if layout.fits(row)), "table")


def messages(said: Iterable[Any]) -> list[Turn]:
    """Messages as {"role", "content"} or {"from", "value"}; contents are texts or lists of parts."""
    turns = []
    for message in said:
        role = {"human": "user", "gpt": "assistant"}.get(str(message.get("from")), message.get("role"))
        content = message.get("content", message.get("value"))
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        media = tuple(
            path for part in parts for kind in ("video", "image") for path in files_of(part.get(kind))
        )
        tags = {"video": "<video>", "image": "<image>"}
        texts = [text for part in parts if (text := part.get("text") or tags.get(str(part.get("type"))))]
        tagged = "\n".join(texts).strip()
        turns.append(Turn(str(role), without_tags(tagged), media, tagged))
    return turns


def tags_in(text: str) -> list[str]:
    """The tags of media in a text, in their order."""
    return [tag.strip() for tag in _TAGS.findall(text)]


def without_tags(text: str) -> str:
    return _TAGS.sub("", text).strip()


def media_of(row: Row, columns: Sequence[str]) -> list[Any]:
    """The files that the columns name; one, where all are the same."""
    found = [path for name in columns for path in files_of(row.get(name))]
    return found[:1] if len(set(found)) == 1 else found


def files_of(value: Any) -> list[Any]:
    """The paths in a column of media: one or several texts or {"path": …}; or `InTable` for each that lies
    in a cell of the table. Raises Refused for others that are in the table itself."""
    if value is None:
        return []
    if isinstance(value, InTable) and value.places is not None:
        return [replace(value, places=(place,)) for place in value.places]
    found = []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        path = one.get("path") or one.get("url") if isinstance(one, Mapping) else one
        if not isinstance(path, str):
            raise Refused("media inside the table", f"a file of the table's own ({type(one).__name__})")
        found.append(path)
    return found


def split_response(text: Any) -> tuple[str | None, Any]:
    """The rationale and the answer of a response with the tags of this format; others are an answer."""
    if not isinstance(text, str):
        return None, text
    think, answer = _THINK.match(text), _ANSWER.search(text)
    rest = text[think.end() :] if think else text
    process = f"<think>{think.group(1).strip()}</think>" if think and think.group(1).strip() else None
    return process, (answer.group(1) if answer else rest).strip()
