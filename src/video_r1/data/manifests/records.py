"""Samples: one question about an image or video, or about several, read from a manifest and checked.

A manifest is a JSON list, JSON lines, a data set of the Hugging Face hub, a `datasets.Dataset` or a list of
rows; docs/data-format.md describes its fields. Every row is checked; all problems are reported together.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

from video_r1.data.answers import parse_number
from video_r1.data.grounding import GROUNDING_FORMS, truth_problems
from video_r1.data.manifests.fields import (
    messages_field,
    one_of,
    options_field,
    path_field,
    quoted,
    rate_of,
    several_problems,
    text_field,
    window_field,
)
from video_r1.data.manifests.parquet_rows import OwnPlace
from video_r1.data.manifests.rows import Unreadable, placed_rows
from video_r1.data.sources.addresses import check_schemes, is_address
from video_r1.data.sources.places import MediaPlaces, media_root_of
from video_r1.data.sources.tar_index import split_member
from video_r1.errors import ManifestError
from video_r1.fingerprint import digest
from video_r1.packages import check_math_verify
from video_r1.processes import process_index
from video_r1.settings.shared import BadRows, ProblemType

if TYPE_CHECKING:
    import datasets

DataType = Literal["image", "video"]
DATA_TYPES: tuple[str, ...] = get_args(DataType)
PROBLEM_TYPES: tuple[str, ...] = get_args(ProblemType)

_PROBLEMS_IN_MESSAGE = 20
_SOLUTION = re.compile(r"\s*<answer>((?:(?!</?answer>).)*)</answer>\s*", re.DOTALL)  # one pair of tags
_PROCESS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_NO_EXTRA: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about an image or video, or several of one kind: a row that has passed every check.

    For example `Sample(7, "Which way does the ball move?", "video", "multiple choice", "<answer>B</answer>",
    "/data/7.mp4", ("A. left", "B. right"))`.
    """

    problem_id: str | int  # unique in its manifest
    problem: str  # the question, without options or instructions
    data_type: DataType
    problem_type: ProblemType
    solution: str  # "<answer>…</answer>"; multiple choice: the letter inside
    path: str  # the media file or folder of frames: absolute, links followed, inside the media root; or an
    # address; of several files the first
    options: tuple[str, ...] = ()  # "A. left", …; empty unless multiple choice
    process: str | None = None  # "<think>…</think>": a rationale for SFT
    data_source: str = ""  # where the sample is from
    start: float | None = None  # the window of the clip that the question is about, in seconds from its
    end: float | None = None  # beginning; None: from the beginning, to the end
    extra: Mapping[str, Any] = field(default_factory=dict)  # every other field of the row that is not null
    subtitles: str | None = None  # what is said in the clip, for prompts that show it
    messages: tuple[Mapping[str, str], ...] = ()  # the chat as {"role", "content"}, in place of the template
    more_paths: tuple[str, ...] = ()  # the other files of a question about several, in order

    @property
    def answer(self) -> str:
        """The text inside the solution's tags, stripped."""
        match = _SOLUTION.fullmatch(self.solution)
        return match.group(1).strip() if match else self.solution.strip()

    @property
    def paths(self) -> tuple[str, ...]:
        """All its files, in the order in which they are shown."""
        return self.path, *self.more_paths

    @property
    def files(self) -> tuple[Sample, ...]:
        """A sample for each of its files, as they are decoded and kept."""
        if not self.more_paths:
            return (self,)
        return tuple(replace(self, path=path, more_paths=()) for path in self.paths)

    @property
    def mark(self) -> str:
        """What stands in the text where a file is to be shown."""
        return f"<{self.data_type}>"

    @property
    def fps(self) -> float | None:
        """Frames a second of a folder of frames, where the row says it; of files the field says nothing."""
        rate = rate_of(self.extra.get("fps"))
        return rate if rate and any(split_member(one) or os.path.isdir(one) for one in self.paths) else None

    @property
    def shown(self) -> tuple[str | float | None, ...]:
        """What is decoded: samples that are alike in this have the same frames."""
        return *self.paths, self.data_type, self.start, self.end, self.fps


def question_digest(problem: str, options: Sequence[str], answer: str, paths: Sequence[str]) -> str:
    """What tells questions of one id apart, wherever their files lie: of the folders only the names in them
    count, of the text all but the marks of several files. answer: that of `Sample.answer`.
    """
    problem = problem.replace("<video>", "").replace("<image>", "")
    names = ["::".join(part.rstrip("/").rpartition("/")[2] for part in path.split("::")) for path in paths]
    return digest([problem, list(options), answer, names])


FIELDS = tuple(field.name for field in fields(Sample) if field.name not in ("extra", "more_paths"))
"""The fields of a row that have a meaning here."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row of a manifest. `row` counts from 1 (JSON lines: the line); 0: the whole."""

    row: int
    problem_id: str | int | None
    text: str

    def __str__(self) -> str:
        if not self.row:
            return self.text
        name = "" if self.problem_id is None else f" (id {self.problem_id})"
        return f"row {self.row}{name}: {self.text}"


class CheckedManifest(NamedTuple):
    """The good rows of a manifest, the number of each in the file, and what is wrong with the others."""

    samples: list[Sample]
    rows: list[int]
    problems: list[Problem]

    def without_problems(self, name: object, bad_rows: BadRows = "stop") -> list[Sample]:
        """The samples. Raises ManifestError with all problems of the manifest that is called `name`; where
        bad rows are left out, the first process says so, and only a manifest without a good one is refused.
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
    """Reads and checks a manifest.

    Args:
        source: a JSON or JSON lines file or its address, a Parquet file, its address or a pattern of several,
            a data set id of the Hugging Face hub or a folder that `datasets` reads, or a `datasets.Dataset`,
            an `IterableDataset` (read to its end) or a list of dicts with its fields.
        media_root: the folder, or the address of one, that every `path` is relative to and must stay inside.
            Default: the folder of the manifest, the data set itself, or the current folder.
        allow_urls: accept addresses (https://, s3://, hf://, …) outside of it as `path`.
        split: the split to read of a data set that has several.
        allowed_roots: further folders that absolute paths and links may lead to.
        bad_rows: `leave_out` names and leaves out rows that are no question, and a repeated id's later rows.

    Raises:
        ManifestError: with all problems of all rows in `problems`.
        ConfigError: an address, or a question's type, needs a package that is not installed.
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
    """As `load_manifest`, but gives the good rows and the problems instead of raising over bad rows.

    min_options: fewest options of a multiple-choice question.

    Raises:
        ManifestError: there is nothing to check: no such source, or a media root is not a folder.
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
    places = MediaPlaces(media_root, allow_urls, allowed_roots)
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
        else:  # 7 and "7" are the same id wherever results are stored by id
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


def check_row(row: Any, places: MediaPlaces, min_options: int) -> tuple[Sample | None, list[str]]:
    """The sample of a row, or None, and everything that is wrong with the row."""
    if not isinstance(row, dict):
        return None, [f"is {quoted(row)}, not an object with fields"]
    found: list[str] = []
    problem_id = row.get("problem_id")
    if problem_id is None:
        found.append("problem_id is missing")
    elif isinstance(problem_id, bool) or not isinstance(problem_id, (int, str)) or problem_id == "":
        found.append(f"problem_id is {quoted(problem_id)}; it must be an integer or a string")
    said = messages_field(row, found)
    problem = text_field(row, "problem", found, required=not said) or (said[-1]["content"] if said else "")
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
        solution = f"<answer>{letter}</answer>"  # however it is spelled: answers are compared exactly
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
        asked = [turn["content"] for turn in said if turn["role"] == "user"]
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
        options, process, data_source, start, end, extra, subtitles, said, tuple(more_paths),
    )  # fmt: skip
    return sample, []
