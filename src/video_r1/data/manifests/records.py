"""Manifests: rows are read, checked and turned into Samples.

A manifest is a JSON list, JSON lines, a Hugging Face dataset id, a `datasets.Dataset` or a list of rows;
docs/data-format.md describes its fields. Every row is checked; all problems are reported together.

JSON files are parsed row by row with the standard library. `datasets` would give each column of a JSON file
one type, and so reject the whole file or convert silently where a single row has to be reported (an id that
is a number in one row and a string in another). Parquet tables and datasets are read by tables.py.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO, cast, get_args

from video_r1.availability import check_math_verify, is_hub_id
from video_r1.console import tell
from video_r1.data.answers import LETTERS, extract_answer, option_prefix
from video_r1.data.grounding import GROUNDING_FORMS, truth_problems
from video_r1.data.manifests.problem_types import PROBLEM_TYPES, in_our_words, tell_renamings
from video_r1.data.manifests.tables import (
    ENDING,
    OwnPlace,
    Unreadable,
    dataset_rows,
    name_of,
    named_rows,
    placed,
    table_rows,
    tables_of,
)
from video_r1.data.scores import correctness, format_reward, unpaid
from video_r1.data.sources.archives import split_member
from video_r1.data.sources.media_paths import MediaPaths, is_pattern, media_root_of, path_below
from video_r1.data.sources.media_types import MANIFEST_EXTENSIONS, ClipRef, Play
from video_r1.data.sources.remote import check_schemes, fetch, is_address, on_this_machine
from video_r1.errors import ConfigError, ManifestError, MediaError
from video_r1.fingerprint import digest
from video_r1.processes import process_index
from video_r1.settings.filters import PASS_RATES, parse_keep
from video_r1.settings.shared import BadRows, ProblemType

if TYPE_CHECKING:
    import datasets

_NOT_A_MANIFEST = "it must be a JSON list of rows, or have one JSON row on each line"
_BRACKET = re.compile(r"\s*(\[)\s*")
_COMMA = re.compile(r"\s*(,|(?=]))\s*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LARGEST_FETCHED = 1 << 32  # bytes
_DEEPEST = 100  # levels of lists and objects in a row
_LETTER = re.compile(r"\s*\(?([A-Z])(?:[.):]|\s*$)")  # "A. text", "(A) text", "A: text", "A"
DataType = Literal["image", "video", "text"]
DATA_TYPES: tuple[str, ...] = get_args(DataType)

TABLE_EXTENSIONS = (".csv", ".tsv", ".tab")
"""Tables that are no manifests: `data make` reads them."""
_PROBLEMS_IN_MESSAGE = 20
# One pair of tags; the text inside, stripped, is not empty.
_SOLUTION = re.compile(r"\s*<answer>\s*(?=\S)((?:(?!</?answer>).)+?)\s*</answer>\s*", re.DOTALL)
Score = Callable[[str, str, str], float]  # problem type, answer, truth: in [0, 1]
_NO_EXTRA: Mapping[str, Any] = {}


class Work(NamedTuple):
    """An assistant's turn that calls tools, before its answer: what SFT teaches."""

    text: str  # before the calls
    calls: tuple[tuple[str, Mapping[str, Any]], ...]  # names and arguments
    results: tuple[str, ...]  # texts that came back; those of `look` are not used


@dataclass(frozen=True, slots=True)
class Sample:
    """Question about an image or video, several of one kind, or text alone: a row that passed every check.

    Example: `Sample(7, "Which way does the ball move?", "video", "multiple choice", "<answer>B</answer>",
    "/data/7.mp4", ("A. left", "B. right"))`.
    """

    problem_id: str | int  # unique in its manifest
    problem: str  # the question, without options or instructions
    data_type: DataType
    problem_type: ProblemType
    solution: str  # "<answer>…</answer>"; multiple choice: the letter inside
    path: str  # the first media file or folder of frames: absolute, links resolved, inside the media root;
    # or a URL; "" for text alone
    options: tuple[str, ...] = ()  # "A. left", …; empty unless multiple choice
    process: str | None = None  # "<think>…</think>": a rationale for SFT
    data_source: str = ""  # where the sample is from
    start: float | None = None  # window of the clip, in seconds from its beginning; None: from the beginning
    end: float | None = None  # None: to the end
    extra: Mapping[str, Any] = field(default_factory=dict)  # every other field of the row that is not null
    subtitles: str | None = None  # for prompts that show them
    messages: tuple[Mapping[str, str], ...] = ()  # the chat as {"role", "content"}, instead of the template
    more_paths: tuple[str, ...] = ()  # the other files of a question about several, in order
    play: Play = "forward"  # reversed: the clip is shown backwards
    work: tuple[Work, ...] = ()  # messages behind the user's: calls of tools and their results

    @property
    def answer(self) -> str:
        """Text inside the solution's tags, stripped."""
        return extract_answer(self.solution)

    @property
    def paths(self) -> tuple[str, ...]:
        """All files, in the order in which they are shown."""
        return () if self.data_type == "text" else (self.path, *self.more_paths)

    @property
    def files(self) -> tuple[ClipRef, ...]:
        """Files with the window to decode; samples with equal `files` have the same frames."""
        fps, kind = self.fps, cast(Literal["image", "video"], self.data_type)
        return tuple(ClipRef(path, kind, self.start, self.end, fps, self.play) for path in self.paths)

    @property
    def cluster(self) -> tuple[object, ...]:
        """Key of the questions that intervals resample together: of one clip, forward or reversed; text is
        alone.
        """
        return (self.paths, self.start, self.end) if self.paths else (self.problem_id,)

    @property
    def mark(self) -> str:
        """Placeholder for a file in the text."""
        return f"<{self.data_type}>"

    @property
    def fps(self) -> float | None:
        """Frame rate of a folder of frames, if the row gives one; None for files."""
        rate = _rate_of(self.extra.get("fps"))
        return rate if rate and any(split_member(one) or os.path.isdir(one) for one in self.paths) else None


def manifest_row(sample: Sample, media_root: str) -> dict[str, Any]:
    """Return a sample as a row of a manifest, its paths relative to the media root."""
    row = {
        name: getattr(sample, name)
        for name in FIELDS
        if getattr(sample, name) not in (None, (), "", "forward")
    }
    if sample.work:
        row["messages"] = [*sample.messages, *work_messages(sample.work)]
    if paths := [path_below(media_root, path) for path in sample.paths]:
        row["path"] = paths if len(paths) > 1 else paths[0]
    return {**row, **sample.extra}


def work_messages(work: Sequence[Work]) -> list[dict[str, Any]]:
    """Return turns with calls and their results as messages of a manifest row, in OpenAI's form."""
    messages: list[dict[str, Any]] = []
    for text, calls, results in work:
        said = [{"type": "function", "function": {"name": name, "arguments": a}} for name, a in calls]
        messages.append({"role": "assistant", "content": text, "tool_calls": said})
        messages += [{"role": "tool", "content": result} for result in results]
    return messages


def question_digest(problem: str, options: Sequence[str], answer: str, paths: Sequence[str]) -> str:
    """Return a digest that tells apart questions with the same id, wherever their files are: only file names
    count, not folders, and the text without <video> and <image>. answer: as in `Sample.answer`.
    """
    problem = problem.replace("<video>", "").replace("<image>", "")
    names = ["::".join(part.rstrip("/").rpartition("/")[2] for part in path.split("::")) for path in paths]
    return digest([problem, list(options), answer, names])


def samples_digest(samples: Sequence[Sample], names: Sequence[str] = ()) -> str:
    """Return a digest of these fields of the samples (default: all), in order. Paths count from the folder
    that contains all files, so that a data set may be moved.
    """
    names = names or [field.name for field in fields(Sample)]
    folders = {os.path.dirname(path.rpartition("::")[2]) for sample in samples for path in sample.paths}
    local = [folder for folder in folders if os.path.isabs(folder)]
    root = os.path.commonpath(local).rstrip(os.sep) + os.sep if local else os.sep

    def values(sample: Sample) -> list[Any]:
        paths = [path.replace(root, "", 1) for path in sample.paths]
        return [paths, *(getattr(sample, name) for name in names if name not in ("path", "more_paths"))]

    return digest([digest(values(sample)) for sample in samples])


@dataclass(frozen=True, slots=True)
class Problem:
    """An error in a row of a manifest. `row` counts from 1 (JSON lines: the line); 0: the whole manifest."""

    row: int
    problem_id: str | int | None
    text: str

    def __str__(self) -> str:
        if not self.row:
            return self.text
        name = "" if self.problem_id is None else f" (id {self.problem_id})"
        return f"row {self.row}{name}: {self.text}"


class CheckedManifest(NamedTuple):
    """The good rows of a manifest with their numbers in the file, and the problems of the other rows."""

    samples: list[Sample]
    rows: list[int]
    problems: list[Problem]

    def without_problems(self, name: object, bad_rows: BadRows | None = None) -> list[Sample]:
        """Return the samples. Raises ManifestError with all problems of the manifest called `name`; with
        `leave_out` rank 0 warns instead, and only a manifest without any good row raises. None: `stop`,
        where nobody can choose. Raises ConfigError for a type that needs a package that is not installed.
        """
        shown = [str(problem) for problem in self.problems[:_PROBLEMS_IN_MESSAGE]]
        more = len(self.problems) - len(shown)
        if self.problems and self.samples and bad_rows == "leave_out":
            bad = len({problem.row for problem in self.problems})
            good = f"{len(self.samples):,} are used (`video-r1 data check` lists all problems)"
            lines = "\n  ".join([*shown, "…"] if more else shown)
            if process_index() == 0:
                tell(f"{name}: {bad:,} bad rows are left out, {good}:\n  {lines}")
        elif self.problems:
            rest = f"; and {more} more (`video-r1 data check` lists all)" if more else ""
            if self.samples and bad_rows:
                rest += f"; correct them, or use the other {len(self.samples):,} (bad_rows leave_out)"
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            raise ManifestError(f"{name}: {count}: {'; '.join(shown)}{rest}", tuple(self.problems))
        if any(sample.problem_type == "math" for sample in self.samples):
            check_math_verify(name)
        return self.samples


def load_manifest(
    source: str | Path | datasets.Dataset | datasets.IterableDataset | Sequence[Any],
    media_root: str | Path | None = None,
    allow_urls: bool = False,
    split: str = "train",
    allowed_roots: Sequence[str | Path] = (),
    bad_rows: BadRows | None = "stop",
    score: Score | None = correctness,
) -> list[Sample]:
    """Read and check a manifest.

    source: path or URL of a JSON or JSON lines file; path, URL or glob pattern of Parquet files; a dataset id
        of the hub or a folder that `datasets` reads; a Dataset, an IterableDataset or a list of dicts.
    media_root: folder or URL that every `path` is relative to and must stay inside. Default: the folder of
        the manifest, the dataset itself, or the current folder.
    allow_urls: accept URLs (https://, s3://, hf://, …) outside the media root as `path`.
    split: the split of a dataset that has several.
    allowed_roots: further folders that absolute paths and links may lead to.
    bad_rows: as in `CheckedManifest.without_problems`.
    score: a row whose own solution does not get the full score is bad. None: published questions are taken
        as they are, also with one option or equal ones.

    Raises:
        ManifestError: with all problems of all rows in `problems`.
        ConfigError: a URL, or a question's type, needs a package that is not installed.
    """
    name = source if isinstance(source, (str, Path)) else type(source).__name__
    checked = check_manifest(source, media_root, allow_urls, split, allowed_roots, score)
    return checked.without_problems(name, bad_rows)


def check_manifest(
    source: str | Path | datasets.Dataset | datasets.IterableDataset | Sequence[Any],
    media_root: str | Path | None = None,
    allow_urls: bool = False,
    split: str = "train",
    allowed_roots: Sequence[str | Path] = (),
    score: Score | None = correctness,
) -> CheckedManifest:
    """Read a manifest as `load_manifest` does, but return the problems of bad rows instead of raising.

    Raises:
        ManifestError: no such source, or a media root is not a folder.
    """
    media_root = media_root_of(source, media_root)
    if is_address(media_root):
        try:
            check_schemes(media_root)
        except ValueError as error:
            raise ManifestError(f"the media root {media_root} {error}") from error
    elif not os.path.isdir(media_root):
        raise ManifestError(
            f"the media root {media_root} is not a folder; set media_root to the folder that "
            "the paths of the manifest start at"
        )
    places = MediaPaths(media_root, allow_urls, allowed_roots)
    checked = CheckedManifest([], [], [])
    rows_by_id: dict[str, int] = {}
    renamings: Counter[str] = Counter()
    number = 0
    for number, row in placed_rows(source, split):
        if isinstance(row, Unreadable):
            checked.problems.append(Problem(number, None, row.reason))
            continue
        if renamed := in_our_words(row)[1]:
            renamings[renamed] += 1
        sample, found = check_row(row, places, score)
        given = row.get("problem_id") if isinstance(row, dict) else None
        problem_id = given if isinstance(given, (int, str)) else None
        # Results are stored by id, where 7 and "7" are the same.
        if problem_id is not None and (first := rows_by_id.setdefault(str(problem_id), number)) != number:
            found.append(f"problem_id is used before, in row {first}; each row needs its own")
        checked.problems.extend(Problem(number, problem_id, text) for text in found)
        if sample is not None and not found:
            checked.samples.append(sample)
            checked.rows.append(number)
    if number == 0:
        checked.problems.append(Problem(0, None, "the manifest has no rows"))
    tell_renamings(renamings)
    return checked


def _is_filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1e9  # false for NaN as well


def read_chat(value: Any) -> tuple[tuple[Mapping[str, str], ...], tuple[Work, ...]]:
    """Split messages into the chat up to the last user's and the work behind it.

    Raises ValueError, TypeError or RecursionError for anything else.
    """
    if not _is_list(value) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError
    last = max((place for place, turn in enumerate(value) if turn.get("role") == "user"), default=-1)
    turns = [(turn.get("role"), turn.get("content"), turn.get("tool_calls")) for turn in value]
    for role, content, calls in turns[: last + 1]:
        if role not in ("system", "user", "assistant") or not isinstance(content, str) or calls:
            raise ValueError
    chat = tuple({"role": role, "content": content} for role, content, _ in turns[: last + 1])
    work, waiting = [], iter(turns[last + 1 :])
    for role, content, calls in waiting:
        if role != "assistant" or not _is_list(calls) or not calls:
            raise ValueError
        answers = [next(waiting, (None, None, None)) for _ in calls]
        texts = [text if text is not None else "" for text in (content, *(a[1] for a in answers))]
        if any(a[0] != "tool" for a in answers) or not all(isinstance(text, str) for text in texts):
            raise ValueError
        work.append(Work(texts[0], tuple(map(_read_call, calls)), tuple(texts[1:])))
    return chat, tuple(work)


def _read_call(call: Any) -> tuple[str, Mapping[str, Any]]:
    """Return name and arguments of a call in the form of OpenAI or of transformers. Raises ValueError or
    TypeError.
    """
    call = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        raise ValueError
    arguments = call.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError
    json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()  # no infinity, no half of a character
    # Parquet gives every call the arguments of all calls.
    return name, {given: value for given, value in arguments.items() if value is not None}


def _is_chat(value: Any) -> bool:
    try:
        read_chat(value)
    except (ValueError, TypeError, RecursionError):
        return False
    return True


CHAT_FORM = '{"role": "system" | "user" | "assistant", "content": a text}'
_WORK = (
    'the assistant\'s with "tool_calls", each followed by a {"role": "tool"} for each call (its final answer '
    "is `process` and `solution`)"
)
_STRING = (lambda value: isinstance(value, str), "it must be a string")
_TIME = (_is_time, "it must be a time in seconds from the beginning")
_FIELDS: dict[str, tuple[Callable[[Any], object], str]] = {
    "problem_id": (
        lambda value: isinstance(value, (int, str)) and value != "" and not isinstance(value, bool),
        "it must be an integer or a string",
    ),
    "problem": (_is_filled, "it must be a text"),
    "data_type": (lambda value: value in DATA_TYPES, f"known are {', '.join(DATA_TYPES)}"),
    "problem_type": (lambda value: value in PROBLEM_TYPES, f"known are {', '.join(PROBLEM_TYPES)}"),
    "solution": (
        lambda value: isinstance(value, str) and _SOLUTION.fullmatch(value),
        "it must be <answer>…</answer> with a text inside",
    ),
    "path": (
        lambda value: _is_filled(value) or (value and _is_list(value) and all(map(_is_filled, value))),
        "it must be a string, or a list with a string for each clip or image",
    ),
    "options": (
        lambda value: _is_list(value) and all(isinstance(one, str) for one in value),
        "it must be a list of strings",
    ),
    "process": (
        lambda value: (
            isinstance(value, str) and (not value or format_reward(f"{value.strip()}<answer></answer>"))
        ),
        "it must be <think>…</think>, without further tags",
    ),
    "data_source": _STRING,
    "start": _TIME,
    "end": _TIME,
    "subtitles": _STRING,
    "play": (lambda value: value in ("forward", "reversed"), "it must be forward or reversed"),
    "messages": (
        _is_chat,
        f"it must be a list of {CHAT_FORM}, the last one the user's; behind it only {_WORK}",
    ),
}
"""For each field with a meaning here: the test of its value, and what the value must be."""
FIELDS = tuple(_FIELDS)
_REQUIRED = ("problem_id", "problem", "data_type", "problem_type", "solution", "path")


def check_row(
    row: Any, places: MediaPaths, score: Score | None = correctness
) -> tuple[Sample | None, list[str]]:
    """Return a row's sample, or None and what is wrong with the row: with its fields, or else with what they
    say together. score: as for `load_manifest`. A path that is an `OwnPlace` is taken as it is.
    """
    if not isinstance(row, dict):
        return None, [f"is {quoted(row)}, not an object with fields"]
    row, _ = in_our_words(row)
    given, found = _read_fields(row)
    if found:
        return None, found
    data_type, problem_type = sys.intern(given["data_type"]), sys.intern(given["problem_type"])
    messages, work = read_chat(given.get("messages", ()))
    problem, options = given.get("problem") or messages[-1]["content"], tuple(given.get("options", ()))
    start, end = (None if name not in given else float(given[name]) for name in ("start", "end"))
    paths, named = [], given.get("path", ())
    for path in [named] if isinstance(named, str) else named:
        try:
            paths.append(str(path) if isinstance(path, OwnPlace) else places.find(path))
            if "\\" in path and not is_address(path) and not os.path.exists(paths[-1]):
                found.append(f"path {path!r} has backslashes; write / between folders")
        except ValueError as error:
            found.append(str(error))
    answer = extract_answer(given["solution"])
    window = None if end is None else end - (start or 0.0)
    if problem_type == "multiple choice":
        try:  # in one spelling: answers are compared exactly
            answer = _letter(options, answer, published=score is None, in_messages=bool(messages))
        except ValueError as error:
            found.append(str(error))
    elif options:
        found.append(f"options are given, but the problem is {problem_type}, not multiple choice")
    is_grounding = problem_type in GROUNDING_FORMS
    misplaced = [*truth_problems(answer, problem_type, data_type, window)] if is_grounding else []
    found += misplaced or (unpaid(problem_type, answer, score) if score else ())
    found += _media_problems(given, paths, window, messages or [{"content": "\n".join([problem, *options])}])
    looks = [asked for turn in work for name, asked in turn.calls if name == "look"]
    spans: list[tuple[Any, Any]] = [(look.get("start"), look.get("end")) for look in looks]
    if wrong := [span for span in spans if not (all(map(_is_time, span)) and span[0] < span[1])]:
        found.append(
            f"messages look from {wrong[0][0]} to {wrong[0][1]}; both must be times, the later one last"
        )
    if row.get("fps") is not None and _rate_of(row["fps"]) is None and any(map(os.path.isdir, paths)):
        found.append(f"fps is {quoted(row['fps'])}; a folder of frames needs a number above 0")
    if found:
        return None, found
    extra = {
        sys.intern(name): sys.intern(value) if type(value) is str and len(value) < 40 else value
        for name, value in row.items()
        if value is not None and name not in _FIELDS
    }
    sample = Sample(
        given["problem_id"], problem, cast("DataType", data_type), cast("ProblemType", problem_type),
        f"<answer>{answer}</answer>" if problem_type == "multiple choice" else given["solution"],
        paths[0] if paths else "", options, given.get("process") or None,
        sys.intern(given.get("data_source", "")), start, end, extra or _NO_EXTRA,
        given.get("subtitles", "").strip() or None,
        messages, tuple(paths[1:]), given.get("play", "forward"), work,
    )  # fmt: skip
    return sample, []


def _read_fields(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a row that have a value, and what is wrong with each by itself."""
    given: dict[str, Any] = {}
    found = []
    optional = {"path": row.get("data_type") == "text", "problem": bool(row.get("messages"))}
    for name, (is_valid, wanted) in _FIELDS.items():
        value = row.get(name)
        if value is None or (name == "path" and optional[name] and not value):
            if name in _REQUIRED and not optional.get(name):
                found.append(f"{name} is missing")
            continue
        given[name] = value
        if not is_valid(value):
            found.append(f"{name} is {quoted(value)}; {wanted}")
    if not found and not given.get("problem") and not read_chat(given["messages"])[0]:
        found.append("problem is missing")
    return given, found


def _media_problems(
    given: Mapping[str, Any],
    paths: Sequence[str],
    window: float | None,
    turns: Sequence[Mapping[str, str]],
) -> Iterator[str]:
    """Yield which fields of a row do not fit its media. turns: of the chat, for the marks in them."""
    data_type, problem_type = given["data_type"], given["problem_type"]
    start, end = given.get("start"), given.get("end")
    if data_type == "text":
        for name in ("path", "start", "end", "play", "subtitles"):
            if given.get(name) not in (None, "", "forward"):
                yield f"{name} is given, but data_type is text"
    if window is not None and window <= 0:
        yield f"the window ends ({end:g} s) before it starts ({start or 0.0:g} s)"
    if data_type == "image" and (start, end) != (None, None):
        yield "start and end are for videos, and this is an image"
    if data_type == "image" and given.get("play") == "reversed":
        yield "play is for videos, and this is an image"
    if len(paths) < 2:
        return
    files = f"path names {len(paths)} {data_type}s"
    if (start, end) != (None, None):
        yield f"start and end are a window of one clip, and {files}; cut the clips and name the parts"
    if problem_type in GROUNDING_FORMS:
        yield f"a {problem_type} problem is about one {data_type}, and {files}"
    said = [turn["content"] for turn in turns if turn.get("role", "user") == "user"]
    if (marks := "\n".join(said).count(f"<{data_type}>")) not in (0, len(paths)):
        yield (
            f"{files}, and its text has the mark <{data_type}> {marks} times; write it once for each, in "
            "order, or not at all: they then precede the question"
        )


def _letter(options: Sequence[str], answer: str, published: bool, in_messages: bool) -> str:
    """Return the letter of the option that `answer` names. in_messages: the options may stand there instead.
    Raises ValueError.
    """
    if len(options) < (1 if published else 2) and (options or not in_messages):
        raise ValueError(f"a multiple choice problem needs two options or more, found {len(options)}")
    letters = [match[1] if (match := _LETTER.match(option)) else "" for option in options]
    if "" in letters:
        option = quoted(options[letters.index("")])
        raise ValueError(f"option {option} does not begin with its letter, as in 'A. the man sits'")
    if twice := sorted({letter for letter in letters if letters.count(letter) > 1}):
        raise ValueError(f"options use the letter {', '.join(twice)} more than once")
    texts = [" ".join(option[len(option_prefix(option)) :].rstrip(". ").split()) for option in options]
    if not published and (same := next((text for text in texts if text and texts.count(text) > 1), None)):
        which = " and ".join(letter for letter, text in zip(letters, texts, strict=True) if text == same)
        raise ValueError(f"the options {which} are the same, {quoted(same)}")
    match = _LETTER.match(answer)
    if match is None or (not options and answer.strip("(). :") != match[1]):
        wanted = f"an option's letter, not {quoted(answer)}"
        raise ValueError(f"the solution of a multiple choice problem must be {wanted}")
    letter = match[1]
    if letter not in (letters or LETTERS):
        raise ValueError(f"the solution {letter} is not among the options {', '.join(letters)}")
    if options and letter != answer.strip("(). :") and answer != options[letters.index(letter)].strip():
        raise ValueError(f"the solution {quoted(answer)} is not the text of option {letter}")
    return letter


def _rate_of(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 < value < 1e6 else None


def quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def pass_rates(sample: Sample) -> dict[str, float]:
    """Return a sample's pass rates by name, as `data audit` writes them: {"blind": 0.25, "ordered": 0.875}.

    Raises ManifestError for other values.
    """
    found = sample.extra.get(PASS_RATES, {})
    if not isinstance(found, Mapping):
        raise ManifestError(f"question {sample.problem_id!r}: {PASS_RATES} must map names to numbers")
    rates = {str(name): value for name, value in found.items() if value is not None}
    for name, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ManifestError(
                f"question {sample.problem_id!r}: the pass rate {name!r} is {value!r}; it must be from 0 to 1"
            )
    return rates


def kept_samples(samples: Sequence[Sample], expression: str, quiet: bool = False) -> list[Sample]:
    """Return the samples that the expression keeps (settings/filters.py), in order. Rank 0 prints how many.

    Raises ConfigError for an invalid expression, for a rate that no sample has, and if no sample is kept;
    ManifestError for invalid rates.
    """
    keep = parse_keep(expression)
    rates = [pass_rates(sample) for sample in samples]
    there = sorted({name for each in rates for name in each})
    kept = [place for place, each in enumerate(rates) if keep.keeps(each)]
    problem = None
    if not there:
        problem = "the manifest has no pass rates; video-r1 data audit writes one that has"
    elif unknown := sorted(keep.names.difference(there)):
        problem = f"no question has a pass rate {unknown[0]!r}; there are {', '.join(there)}"
    elif not kept:
        problem = f"none of the {len(samples):,} questions is kept"
    if problem:
        raise ConfigError(f"keep {expression!r}: {problem}")
    if process_index() == 0 and not quiet:
        lacking = sum(not keep.names <= rates[place].keys() for place in kept)
        some = f", {lacking:,} of them without a rate that it names" if lacking else ""
        count = f"{len(kept):,} of {len(samples):,} questions are trained on{some}"
        tell(f"keep {expression!r}: {count}")
    return [samples[place] for place in kept]


def placed_rows(source: Any, split: str, media_root: str | None = None) -> Iterator[tuple[int, Any]]:
    """Read rows as `read_rows` does, and set the `path` of a row that contains its file: an `OwnPlace`, or
    with a media root the text that a manifest with that root would have.
    """
    for number, row in read_rows(source, split):
        try:
            row = placed(row) if isinstance(row, dict) else row
        except ValueError as error:
            row = Unreadable(str(error))
        if media_root is not None and isinstance(row, dict):
            path = row.get("path")
            if isinstance(path, OwnPlace):
                row = {**row, "path": path_below(media_root, path)}
            elif isinstance(path, list) and path and isinstance(path[0], OwnPlace):
                row = {**row, "path": [path_below(media_root, one) for one in path]}
        yield number, row


def read_rows(source: Any, split: str) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, the row or `Unreadable`). In JSON lines the row number is the line number.

    A column that holds files has `InTable` in each row. source, split: as for `load_manifest`. Raises
    ManifestError if the source cannot be opened.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        yield from enumerate(source, start=1)
        return
    if not isinstance(source, (str, Path)):
        yield from dataset_rows(source, split)
        return
    name = on_this_machine(str(source))
    remote = is_address(name)
    path = Path(name_of(name) if remote else name)
    if path.suffix == ENDING and (remote or path.is_file() or (is_pattern(name) and not path.is_dir())):
        yield from enumerate(table_rows(tables_of(name)), start=1)
    elif path.suffix.lower() in TABLE_EXTENSIONS and (remote or path.is_file()):
        raise ManifestError(f"{name}: a table, not a manifest; video-r1 data make writes one from it")
    elif remote:
        with local_copy(name) as copy:
            yield from _file_rows(copy)
    elif path.is_file():
        yield from _file_rows(path)
    else:
        if not path.is_dir():
            check_source(name)
        yield from named_rows(name, split)


@contextmanager
def local_copy(address: str) -> Iterator[Path]:
    """Yield a temporary copy of a manifest or table. Raises ManifestError."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, name_of(address) or "manifest")
        try:
            fetch(address, copy, _LARGEST_FETCHED, "a manifest may be")
        except MediaError as error:
            raise ManifestError(str(error)) from error
        yield copy


def check_source(source: str) -> None:
    """Raise ManifestError, without asking the hub, for a manifest or table that is not there."""
    source = on_this_machine(source)
    path = Path(source)
    if is_address(source) or is_pattern(source) or path.exists():
        return
    if path.suffix.lower() in (*MANIFEST_EXTENSIONS, *TABLE_EXTENSIONS, ENDING) or path.is_absolute():
        hint = f"; video-r1 lab make {path.parent} makes it" if path.parent.name == "lab" else ""
        names = os.listdir(path.parent) if path.parent.is_dir() else ()
        if near := difflib.get_close_matches(path.name, names, 1, 0.8):
            hint = f"; did you mean {path.with_name(near[0])}?"
        raise ManifestError(f"{path}: no such manifest or table{hint}")
    if "/" in source and not is_hub_id(source):
        raise ManifestError(f"{path}: no such manifest, and not a dataset id of the hub")


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as stream:
            is_list = stream.read(1 << 10).lstrip().startswith("[")
            stream.seek(0)
            for number, row in _list_rows(stream.read()) if is_list else _line_rows(stream):
                yield number, row
    except UnicodeDecodeError:
        yield number + 1, Unreadable(not_utf8(path))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error


def not_utf8(path: Path) -> str:
    """Describe the first line of a file that is not UTF-8."""
    text = path.read_bytes()
    coding = "utf-16" if text.startswith((b"\xff\xfe", b"\xfe\xff")) else "cp1252"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line, column = text.count(b"\n", 0, error.start) + 1, error.start - text.rfind(b"\n", 0, error.start)
        return (
            f"line {line}, column {column} is not UTF-8, and nothing after it is read; save the file as "
            f"UTF-8 (Excel: CSV UTF-8; iconv -f {coding} -t utf-8 OLD > NEW)"
        )
    return "the file is not UTF-8"


def _line_rows(stream: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.strip()
        if not line:
            continue
        try:
            yield number, _sound(json.loads(line), line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line == "{":
                yield number, Unreadable(f"the file is one JSON object spread over lines; {_NOT_A_MANIFEST}")
                return
            yield number, Unreadable(f"line {number} is not JSON: {error}")


def _list_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON list, up to the place where it is broken."""
    decoder, number, place = json.JSONDecoder(), 0, 0  # place: after the last row
    try:
        while comma := (_COMMA if number else _BRACKET).match(text, place):
            if not text.startswith("]", comma.end()):
                row, place = decoder.raw_decode(text, comma.end())
                number += 1
                yield number, _sound(row, text[comma.end() : place])
            elif comma[1] == ",":
                reason = "remove the comma before the end of the list"
                raise json.JSONDecodeError(reason, text, comma.start(1))
            elif text[comma.end() + 1 :].strip():
                raise json.JSONDecodeError("there is text after the end of the list", text, comma.end() + 1)
            else:
                return
        raise json.JSONDecodeError("a comma or ] is missing", text, place)
    except (ValueError, RecursionError) as error:
        at = (
            error
            if isinstance(error, json.JSONDecodeError)
            else json.JSONDecodeError(str(error), text, place)
        )
        where = f"line {at.lineno}, column {at.colno}"
        broken = f"the JSON is broken at {where}: {at.msg}; nothing after it was read"
        yield number + 1, Unreadable(broken)


def _sound(row: Any, text: str) -> Any:
    """Return the row parsed from `text`, or `Unreadable` if other programs could not read or write it."""
    if text.count("[") + text.count("{") > _DEEPEST and is_deep(row, _DEEPEST):
        return Unreadable(f"it is nested deeper than {_DEEPEST} levels")
    if "\\u" in text and _SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Unreadable("it has half a character (a lone surrogate, \\ud800 to \\udfff)")
    return row


def is_deep(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested in more than so many levels."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(is_deep(part, levels - 1) for part in parts)
