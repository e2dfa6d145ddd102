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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO, cast, get_args

from video_r1.availability import check_math_verify, is_hub_id
from video_r1.data.answers import parse_number
from video_r1.data.grounding import GROUNDING_FORMS, truth_problems
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
from video_r1.data.sources.archives import split_member
from video_r1.data.sources.media_paths import MediaPaths, is_pattern, media_root_of, path_below
from video_r1.data.sources.media_types import MANIFEST_EXTENSIONS, ClipRef
from video_r1.data.sources.remote import check_schemes, fetch, is_address, on_this_machine
from video_r1.errors import ConfigError, ManifestError, MediaError
from video_r1.fingerprint import digest
from video_r1.processes import process_index
from video_r1.settings.filters import PASS_RATES, parse_keep
from video_r1.settings.shared import BadRows, ProblemType

if TYPE_CHECKING:
    import datasets

_READ_CHARACTERS = 1 << 20
_NOT_A_MANIFEST = "it must be a JSON list of rows, or have one JSON row on each line"
_LETTER = re.compile(r"\s*\(?([A-Z])(?:[.):]|\s*$)")  # "A. text", "(A) text", "A: text", "A"
DataType = Literal["image", "video"]
DATA_TYPES: tuple[str, ...] = get_args(DataType)
PROBLEM_TYPES: tuple[str, ...] = get_args(ProblemType)

_PROBLEMS_IN_MESSAGE = 20
_SOLUTION = re.compile(r"\s*<answer>((?:(?!</?answer>).)*)</answer>\s*", re.DOTALL)  # one pair of tags
_PROCESS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_NO_EXTRA: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Sample:
    """Question about an image or video, or several of one kind: a row that passed every check.

    Example: `Sample(7, "Which way does the ball move?", "video", "multiple choice", "<answer>B</answer>",
    "/data/7.mp4", ("A. left", "B. right"))`.
    """

    problem_id: str | int  # unique in its manifest
    problem: str  # the question, without options or instructions
    data_type: DataType
    problem_type: ProblemType
    solution: str  # "<answer>…</answer>"; multiple choice: the letter inside
    path: str  # the first media file or folder of frames: absolute, links resolved, inside the media root;
    # or a URL
    options: tuple[str, ...] = ()  # "A. left", …; empty unless multiple choice
    process: str | None = None  # "<think>…</think>": a rationale for SFT
    data_source: str = ""  # where the sample is from
    start: float | None = None  # window of the clip, in seconds from its beginning; None: from the beginning
    end: float | None = None  # None: to the end
    extra: Mapping[str, Any] = field(default_factory=dict)  # every other field of the row that is not null
    subtitles: str | None = None  # for prompts that show them
    messages: tuple[Mapping[str, str], ...] = ()  # the chat as {"role", "content"}, instead of the template
    more_paths: tuple[str, ...] = ()  # the other files of a question about several, in order

    @property
    def answer(self) -> str:
        """Text inside the solution's tags, stripped."""
        match = _SOLUTION.fullmatch(self.solution)
        return match.group(1).strip() if match else self.solution.strip()

    @property
    def paths(self) -> tuple[str, ...]:
        """All files, in the order in which they are shown."""
        return self.path, *self.more_paths

    @property
    def files(self) -> tuple[ClipRef, ...]:
        """Files with the window to decode; samples with equal `files` have the same frames."""
        fps = self.fps
        return tuple(ClipRef(path, self.data_type, self.start, self.end, fps) for path in self.paths)

    @property
    def mark(self) -> str:
        """Placeholder for a file in the text."""
        return f"<{self.data_type}>"

    @property
    def fps(self) -> float | None:
        """Frame rate of a folder of frames, if the row gives one; None for files."""
        rate = rate_of(self.extra.get("fps"))
        return rate if rate and any(split_member(one) or os.path.isdir(one) for one in self.paths) else None


def question_digest(problem: str, options: Sequence[str], answer: str, paths: Sequence[str]) -> str:
    """Return a digest that tells apart questions with the same id, wherever their files are: only file names
    count, not folders, and the text without <video> and <image>. answer: as in `Sample.answer`.
    """
    problem = problem.replace("<video>", "").replace("<image>", "")
    names = ["::".join(part.rstrip("/").rpartition("/")[2] for part in path.split("::")) for path in paths]
    return digest([problem, list(options), answer, names])


FIELDS = tuple(field.name for field in fields(Sample) if field.name not in ("extra", "more_paths"))
"""Fields of a row that have a meaning here."""


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

    def without_problems(self, name: object, bad_rows: BadRows = "stop") -> list[Sample]:
        """Return the samples. Raises ManifestError with all problems of the manifest called `name`; with
        `leave_out` rank 0 warns instead, and only a manifest without any good row raises.
        """
        if (problems := self.problems) and self.samples and bad_rows == "leave_out":
            if process_index() == 0:
                bad = len({problem.row for problem in problems})
                shown = "\n".join(f"  {problem}" for problem in problems[:_PROBLEMS_IN_MESSAGE])
                more = "\n  …" if len(problems) > _PROBLEMS_IN_MESSAGE else ""
                good = f"{len(self.samples):,} are used (`video-r1 data check` lists all problems)"
                print(f"{name}: {bad:,} bad rows are left out, {good}:\n{shown}{more}", file=sys.stderr)
        elif problems:
            shown = "; ".join(map(str, problems[:_PROBLEMS_IN_MESSAGE]))
            more = len(problems) - _PROBLEMS_IN_MESSAGE
            rest = f"; and {more} more (`video-r1 data check` lists all)" if more > 0 else ""
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise ManifestError(f"{name}: {count}: {shown}{rest}", tuple(problems))
        return self.samples


def load_manifest(
    source: str | Path | datasets.Dataset | datasets.IterableDataset | Sequence[Any],
    media_root: str | Path | None = None,
    allow_urls: bool = False,
    split: str = "train",
    allowed_roots: Sequence[str | Path] = (),
    bad_rows: BadRows = "stop",
) -> list[Sample]:
    """Read and check a manifest.

    Args:
        source: path or URL of a JSON or JSON lines file; path, URL or glob pattern of Parquet files; a
            Hugging Face dataset id or a folder that `datasets` reads; or a `datasets.Dataset`, an
            `IterableDataset` (read to its end) or a list of dicts.
        media_root: folder or URL that every `path` is relative to and must stay inside. Default: the folder
            of the manifest, the dataset itself, or the current folder.
        allow_urls: accept URLs (https://, s3://, hf://, …) outside the media root as `path`.
        split: the split of a dataset that has several.
        allowed_roots: further folders that absolute paths and links may lead to.
        bad_rows: `leave_out` skips bad rows, and later rows with a repeated id, with a warning.

    Raises:
        ManifestError: with all problems of all rows in `problems`.
        ConfigError: a URL, or a question's type, needs a package that is not installed.
    """
    name = source if isinstance(source, (str, Path)) else type(source).__name__
    checked = check_manifest(source, media_root, allow_urls, split, allowed_roots=allowed_roots)
    samples = checked.without_problems(name, bad_rows)
    if any(sample.problem_type == "math" for sample in samples):
        check_math_verify(name)
    return samples


def check_manifest(
    source: str | Path | datasets.Dataset | datasets.IterableDataset | Sequence[Any],
    media_root: str | Path | None = None,
    allow_urls: bool = False,
    split: str = "train",
    min_options: int = 2,
    allowed_roots: Sequence[str | Path] = (),
) -> CheckedManifest:
    """Read a manifest as `load_manifest` does, but return the problems of bad rows instead of raising.

    min_options: smallest number of options of a multiple-choice question.

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
    samples: list[Sample] = []
    rows: list[int] = []
    problems: list[Problem] = []
    rows_by_id: dict[str, int] = {}
    number = 0
    for number, row in placed_rows(source, split):
        if isinstance(row, Unreadable):
            problems.append(Problem(number, None, row.reason))
            continue
        sample, found = check_row(row, places, min_options)
        problem_id = row.get("problem_id") if isinstance(row, dict) else None
        if not isinstance(problem_id, (int, str)):
            problem_id = None
        else:  # results are stored by id, where 7 and "7" are the same
            first = rows_by_id.setdefault(str(problem_id), number)
            if first != number:
                found.append(f"problem_id is used before, in row {first}; each row needs its own")
        problems.extend(Problem(number, problem_id, text) for text in found)
        if sample is not None and not found:
            samples.append(sample)
            rows.append(number)
    if number == 0:
        problems.append(Problem(0, None, "the manifest has no rows"))
    return CheckedManifest(samples, rows, problems)


def check_row(row: Any, places: MediaPaths, min_options: int) -> tuple[Sample | None, list[str]]:
    """Return a row's sample, or None, and everything that is wrong with the row."""
    if not isinstance(row, dict):
        return None, [f"is {quoted(row)}, not an object with fields"]
    found: list[str] = []
    problem_id = row.get("problem_id")
    if problem_id is None:
        found.append("problem_id is missing")
    elif isinstance(problem_id, bool) or not isinstance(problem_id, (int, str)) or problem_id == "":
        found.append(f"problem_id is {quoted(problem_id)}; it must be an integer or a string")
    given = messages_field(row, found)
    problem = text_field(row, "problem", found, required=not given) or (given[-1]["content"] if given else "")
    data_type = one_of(row, "data_type", DATA_TYPES, found)
    problem_type = one_of(row, "problem_type", PROBLEM_TYPES, found)
    solution = text_field(row, "solution", found)
    paths = path_field(row, lambda one: str(one) if isinstance(one, OwnPlace) else places.find(one), found)
    answer = None
    if solution:
        match = _SOLUTION.fullmatch(solution)
        answer = match.group(1).strip() if match else ""
        if not answer:
            found.append(f"solution is {quoted(solution)}; it must be <answer>…</answer> with a text inside")
    options, letter = options_field(row, problem_type, answer, min_options, found)
    if letter is not None:
        solution = f"<answer>{letter}</answer>"  # in one spelling: answers are compared exactly
    if problem_type in ("numerical", "regression") and answer and parse_number(answer) is None:
        found.append(
            f"the solution of a {problem_type} problem must be a finite number, not {quoted(answer)}"
        )
    start, end = window_field(row, data_type, found)
    if problem_type in GROUNDING_FORMS and answer:
        window = None if end is None else end - (start or 0.0)
        found.extend(truth_problems(answer, problem_type, data_type, window))
    process = text_field(row, "process", found, required=False)
    if process and not _PROCESS.fullmatch(process):
        found.append(f"process is {quoted(process)}; it must be <think>…</think>")
    data_source = text_field(row, "data_source", found, required=False)
    subtitles = text_field(row, "subtitles", found, required=False).strip() or None
    if len(paths) > 1:
        asked = [turn["content"] for turn in given if turn["role"] == "user"]
        text = "\n".join(asked or [problem, *options])
        marks, has_window = text.count(f"<{data_type}>"), (start, end) != (None, None)
        found.extend(several_problems(len(paths), data_type, problem_type, marks, has_window))
    if row.get("fps") is not None and rate_of(row["fps"]) is None and any(map(os.path.isdir, paths)):
        found.append(f"fps is {quoted(row['fps'])}; a folder of frames needs a number above 0")
    if found:
        return None, found
    extra = {
        sys.intern(name): sys.intern(value) if type(value) is str and len(value) < 40 else value
        for name, value in row.items()
        if value is not None and name not in FIELDS
    }
    process, data_source, extra = process or None, sys.intern(data_source), extra or _NO_EXTRA
    path, *more_paths = paths
    sample = Sample(
        cast("str | int", problem_id), problem, data_type, problem_type, solution, path,
        options, process, data_source, start, end, extra, subtitles, given, tuple(more_paths),
    )  # fmt: skip
    return sample, []


def text_field(row: dict[str, Any], name: str, found: list[str], required: bool = True) -> str:
    value = row.get(name)
    if value is None:
        if required:
            found.append(f"{name} is missing")
        return ""
    if not isinstance(value, str):
        found.append(f"{name} is {quoted(value)}; it must be a string")
        return ""
    if required and not value.strip():
        found.append(f"{name} is empty")
        return ""
    return value


def path_field(row: dict[str, Any], find: Callable[[str], str], found: list[str]) -> list[str]:
    """Return the files of a row, whose `path` is a string or a list. find: resolves one, or ValueError."""
    given = row.get("path")
    if isinstance(given, (list, tuple)):
        if not given or not all(isinstance(path, str) and path.strip() for path in given):
            found.append(f"path is {quoted(given)}; a list of paths needs a string for each clip or image")
            return []
    else:
        given = [path] if (path := text_field(row, "path", found)) else []
    paths = []
    for path in given:
        try:
            paths.append(find(path))
        except ValueError as error:
            found.append(str(error))
    return paths


def several_problems(
    count: int, data_type: str, problem_type: str, marks: int, has_window: bool
) -> Iterator[str]:
    """Yield what is wrong with a row of `count` clips or images. marks: placeholders in its text."""
    files = f"path names {count} {data_type}s"
    if has_window:
        yield f"start and end are a window of one clip, and {files}; cut the clips and name the parts"
    if problem_type in GROUNDING_FORMS:
        yield f"a {problem_type} problem is about one {data_type}, and {files}"
    if marks not in (0, count):
        yield (
            f"{files}, and its text has the mark <{data_type}> {marks} times; write it once for each, in "
            "order, or not at all: they then precede the question"
        )


def messages_field(row: dict[str, Any], found: list[str]) -> tuple[Mapping[str, str], ...]:
    """Return the turns of a chat; the last one must be the user's."""
    given = row.get("messages")
    if given is None or given in ([], ()):
        return ()
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
        for turn in given
    ):
        turn = '{"role": "system" | "user" | "assistant", "content": a text}'
        found.append(f"messages is {quoted(given)}; it must be a list of {turn}")
        return ()
    if given[-1]["role"] != "user":
        found.append(f"the last of messages has the role {given[-1]['role']}; it must be the user's")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in given)


def one_of(row: dict[str, Any], name: str, known: tuple[str, ...], found: list[str]) -> Any:
    value = row.get(name)
    if value is None:
        found.append(f"{name} is missing")
    elif not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(str(value).lower().replace("_", " "), [k.lower() for k in known], 1)
        hint = f" (did you mean {next(k for k in known if k.lower() == near[0])!r}?)" if near else ""
        found.append(f"{name} is {quoted(value)}; known are {', '.join(known)}{hint}")
    else:
        return sys.intern(value)
    return ""


def options_field(
    row: dict[str, Any], problem_type: str, answer: str | None, min_options: int, found: list[str]
) -> tuple[tuple[str, ...], str | None]:
    """Return the options, and the letter of the solution if the problem is multiple choice."""
    options = row.get("options")
    if options is None:
        options = []
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
        found.append(f"options is {quoted(options)}; it must be a list of strings")
        return (), None
    if problem_type != "multiple choice":
        if options and problem_type:
            found.append(f"options are given, but the problem is {problem_type}, not multiple choice")
        return tuple(options), None
    if len(options) < min_options:
        found.append(f"a multiple choice problem needs two options or more, found {len(options)}")
        return tuple(options), None
    letters = []
    for option in options:
        match = _LETTER.match(option)
        if match is None:
            found.append(f"option {quoted(option)} does not begin with its letter, as in 'A. the man sits'")
        else:
            letters.append(match.group(1))
    twice = sorted({letter for letter in letters if letters.count(letter) > 1})
    if twice:
        found.append(f"options use the letter {', '.join(twice)} more than once")
    if not answer or len(letters) < len(options):
        return tuple(options), None
    solution = _LETTER.match(answer)
    letter = solution and solution.group(1)
    if letter is None:
        found.append(
            f"the solution of a multiple choice problem must be an option's letter, not {quoted(answer)}"
        )
    elif letter not in letters:
        found.append(f"the solution {letter} is not among the options {', '.join(letters)}")
    elif letter != answer.strip("(). :") and answer != options[letters.index(letter)].strip():
        found.append(f"the solution {quoted(answer)} is not the text of option {letter}")
    return tuple(options), letter


def window_field(row: dict[str, Any], data_type: str, found: list[str]) -> tuple[float | None, float | None]:
    times: list[float | None] = []
    for name in ("start", "end"):
        value = row.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < 1e9):  # false for NaN as well
            found.append(f"{name} is {quoted(value)}; it must be a time in seconds from the beginning")
            return None, None
        times.append(None if value is None else float(value))
    start, end = times
    if end is not None and end <= (start or 0.0):
        found.append(f"the window ends ({end:g} s) before it starts ({start or 0.0:g} s)")
    if data_type == "image" and (start is not None or end is not None):
        found.append("start and end are for videos, and this is an image")
    return start, end


def rate_of(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < 1e6 else None


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
    if not there:
        raise ConfigError(
            f"keep {expression!r}: the manifest has no pass rates; video-r1 data audit writes one that has"
        )
    for name in sorted(keep.names.difference(there)):
        near = difflib.get_close_matches(name, there, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"keep {expression!r}: no question has a pass rate {name!r}; {hint}There are {', '.join(there)}"
        )
    kept = [place for place, each in enumerate(rates) if keep.keeps(each)]
    if not kept:
        raise ConfigError(f"keep {expression!r}: none of the {len(samples):,} questions is kept")
    if process_index() == 0 and not quiet:
        lacking = sum(not keep.names <= rates[place].keys() for place in kept)
        unknown = f", {lacking:,} of them without a rate that it names" if lacking else ""
        given = f"keep {expression!r}: {len(kept):,} of {len(samples):,} questions are trained on{unknown}"
        print(given, file=sys.stderr)
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
    elif not isinstance(source, (str, Path)):
        yield from dataset_rows(source, split)
    elif (name := on_this_machine(str(source))) and is_address(name):
        yield from _rows_at(name, split)
    else:
        yield from _local_rows(name, split)


def _rows_at(address: str, split: str) -> Iterator[tuple[int, Any]]:
    name = name_of(address)
    if name.endswith(ENDING):
        yield from enumerate(table_rows(tables_of(address)), start=1)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, name or "manifest")
        try:
            fetch(address, copy)
        except MediaError as error:
            raise ManifestError(str(error)) from error
        yield from _local_rows(str(copy), split)


def _local_rows(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file, a glob pattern of tables, a folder or a dataset id."""
    path = Path(source)
    if path.suffix == ENDING and not path.is_dir() and (path.is_file() or is_pattern(source)):
        yield from enumerate(table_rows(tables_of(source)), start=1)
    elif path.is_file():
        yield from _file_rows(path)
    elif path.is_dir():
        yield from named_rows(str(path), split)
    elif path.suffix in MANIFEST_EXTENSIONS or path.is_absolute():
        lab = f"; video-r1 lab make {path.parent} makes it" if path.parent.name == "lab" else ""
        raise ManifestError(f"{path}: no such manifest file{lab}")
    elif "/" in source and not is_hub_id(source):
        raise ManifestError(f"{path}: no such manifest, and not a dataset id of the hub")
    else:
        yield from named_rows(source, split)


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as stream:
            start = stream.read(_READ_CHARACTERS)
            while start and start.isspace():
                start = stream.read(_READ_CHARACTERS)
            stream.seek(0)
            rows = _list_rows(stream) if start.lstrip().startswith("[") else _line_rows(stream)
            for number, row in rows:
                yield number, row
    except UnicodeDecodeError as error:
        yield number + 1, Unreadable(f"the file is not UTF-8 text from here on ({error.reason})")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error


def _line_rows(stream: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        line = line.strip()
        if not line:
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line == "{":
                yield number, Unreadable(f"the file is one JSON object spread over lines; {_NOT_A_MANIFEST}")
                return
            yield number, Unreadable(f"line {number} is not JSON: {error}")


def _list_rows(stream: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON list, parsed piece by piece: a long list is never in memory as a whole."""
    decoder = json.JSONDecoder()
    text = stream.read(_READ_CHARACTERS)
    place = text.index("[") + 1
    lines = 1  # line number of text[0]
    number, after_row = 0, False
    size, complete = _READ_CHARACTERS, False
    while True:
        while place < len(text) and (text[place].isspace() or (after_row and text[place] == ",")):
            after_row = after_row and text[place] != ","
            place += 1
        failure: Exception | None = None
        if place < len(text):
            if text[place] == "]" and (after_row or number == 0):
                if (text[place + 1 :] + stream.read(_READ_CHARACTERS)).strip():
                    yield number + 1, Unreadable("there is text after the end of the list")
                return
            if after_row:
                failure = ValueError("a comma is missing")
                complete = True
            else:
                try:
                    row, end = decoder.raw_decode(text, place)
                    if end < len(text) or complete:  # a number at the end of a piece may continue
                        number, after_row, place = number + 1, True, end
                        size = _READ_CHARACTERS
                        yield number, row
                        continue
                except (ValueError, RecursionError) as error:
                    failure = error
        if complete:
            line = lines + text.count("\n", 0, getattr(failure, "pos", place))
            reason = getattr(failure, "msg", str(failure)) if failure else "the list is not closed"
            yield (
                number + 1,
                Unreadable(f"the JSON is broken near line {line}: {reason}; nothing after it was read"),
            )
            return
        more = stream.read(size)
        size *= 2  # a long row is parsed again with each piece: growing pieces keep the work linear
        complete = not more
        lines += text.count("\n", 0, place)
        text, place = text[place:] + more, 0
