"""Declaration of a benchmark, and the conversion of its published rows to manifest rows.

Templates of a declaration (`<name>.toml`), such as `"{video ID}-{Question ID}"`, are filled from a row; a row
of the published annotation also has `file` and `folder`, the names of its file without extension and folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from video_r1.data.answers import answer_of, options_of, parse_number
from video_r1.data.manifests.records import read_rows
from video_r1.data.manifests.tables import Unreadable
from video_r1.errors import ManifestError

Row = dict[str, Any]
Tables = Mapping[str, Mapping[str, str]]


class Place(NamedTuple):
    """Possible path of a clip, below the benchmark's folder. is_window: the file is cut to the window."""

    path: str
    is_window: bool = False


def json_or_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of an annotation file: a JSON list, JSON lines or Parquet."""
    for number, row in read_rows(path, split="test"):
        if isinstance(row, Unreadable):
            raise ManifestError(f"{path}: row {number}: {row.reason}")
        yield row


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A declared benchmark. `problem`, `choices` and `answer` are names of published fields."""

    name: str  # in `--bench`, and of its folder below the media root
    title: str
    dataset: str  # dataset on the Hugging Face hub of which the folder is a copy
    files: Sequence[str]  # patterns of annotation files; the first one with matches is used
    unpack: str  # how to unpack the downloaded media
    questions: int  # published number
    options: Sequence[int] = (2, 2)  # fewest and most options of its multiple-choice questions
    problem_type: str = ""  # of all questions; "" decides by the task, the options and the answer
    problem_id: str = ""  # template; questions are numbered if it gives nothing
    problem: str = "question"
    choices: str = "options"
    answer: str = "answer"
    answers_are: Literal["letter", "text"] = "letter"  # if it could be either: options "E", "A" and "I"
    task_type: str  # template
    only: Mapping[str, str] = field(default_factory=dict)  # fields and the values that rows must have
    regression: Sequence[str] = ()  # task types whose answer is a measured number
    open_ended: bool = False  # whether there are questions without options
    places: Sequence[str] = ()  # templates of a clip's possible paths
    clip: str = ""  # field with the stem of the clip's file name, if the paths use one
    window: tuple[str, str] | None = None  # fields with the start and the end in seconds
    # Wording by task type ("" for all), with {question} and its {kind}, multi-choice or open-ended.
    prompts: Mapping[str, str] = field(default_factory=dict)
    metric: str = "accuracy"
    headline: Literal["questions", "tasks"] = "questions"  # units of the mean
    # Sets of questions that are right only as a whole, by metric: `by`, template of a question's set ("" for
    # none), and `questions`, the size of a set.
    pairs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference_task: str = ""  # template: the task type of a row of the reference's JSON
    unverified: Sequence[str] = ()  # assumptions that no published file or program confirms
    tables: Tables = field(default_factory=dict)  # arguments, with a row, of the functions below
    read: Callable[[Path], Iterator[Row]] = json_or_parquet
    find_places: Callable[[Row, Tables], Iterable[Place]] | None = None  # replaces `places`
    find_task: Callable[[Row, Tables], str] | None = None  # replaces `reference_task`

    def problem_type_of(self, row: Row, task: str) -> str:
        if self.problem_type:
            return self.problem_type
        if task in self.regression:
            return "regression"
        if not self.open_ended or len(row.get(self.choices) or ()) > 0:
            return "multiple choice"
        return "free-form" if parse_number(str(row[self.answer])) is None else "numerical"

    def sets_of(self, row: Row) -> Row:
        """Return the question's field `pairs`: {metric: [set, its questions]}."""
        sets = {name: [filled(pair["by"], row), pair["questions"]] for name, pair in self.pairs.items()}
        return {"pairs": {name: each for name, each in sets.items() if each[0]}} if sets else {}

    def places_of(self, row: Row) -> list[Place]:
        if self.find_places is not None:
            return list(self.find_places(row, self.tables))
        return [Place(template.format_map(row)) for template in self.places]


def filled(template: str, row: Row) -> str:
    """Fill a template with the row's fields; return "" if one of them is missing or null."""
    try:
        text = template.format_map(row)
    except (KeyError, TypeError):
        return ""
    return "" if text == "None" else text


def annotation_files(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Return the published annotation files in a benchmark's folder, sorted."""
    for pattern in benchmark.files:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    return []


def manifest_rows(benchmark: Benchmark, root: Path) -> Iterator[Row]:
    """Yield manifest rows from the published annotation in `root`/`name`; paths are relative to `root`."""
    folder, number = root / benchmark.name, 0
    for file in annotation_files(benchmark, folder):
        if file.stem not in benchmark.tables.get("folders", {file.stem: ""}):
            continue  # a file that is not one of the tasks
        for row in benchmark.read(file):
            if any(row[name] != value for name, value in benchmark.only.items()):
                continue
            number += 1
            row = {**row, "file": file.stem, "folder": file.parent.name}
            task = filled(benchmark.task_type, row)
            problem_type = benchmark.problem_type_of(row, task)
            options = options_of(row.get(benchmark.choices) or [], problem_type)
            answer = answer_of(row[benchmark.answer], options, benchmark.answers_are)
            place = first_existing(folder, benchmark.places_of(row))
            form = benchmark.prompts.get(task) or benchmark.prompts.get("", "{question}")
            form = form.replace("{kind}", "multi-choice" if options else "open-ended")
            yield {
                "problem_id": f"{benchmark.name}-{filled(benchmark.problem_id, row) or number}",
                "problem": form.replace("{question}", str(row[benchmark.problem]).strip()),
                "data_type": "video",
                "problem_type": problem_type,
                "options": options,
                "solution": f"<answer>{answer}</answer>",
                "path": f"{benchmark.name}/{place.path}",
                "data_source": row.get("data_source", benchmark.title),
                "task_type": task,
                **seconds_of(row, benchmark.window, place),
                **benchmark.sets_of(row),
            }


def reference_rows(benchmark: Benchmark, file: Path) -> Iterator[Row]:
    """Yield manifest rows from the reference's evaluation JSON (`eval_<name>.json`).

    Its paths are `./Evaluation/<Title>/…`, relative to the file's folder. They are tried unchanged, without
    `Evaluation`, and in the benchmark's folder: unchanged, and by the layout of its dataset.
    """
    root = file.parent
    for row in json_or_parquet(file):
        find_task = benchmark.find_task
        task = find_task(row, benchmark.tables) if find_task else filled(benchmark.reference_task, row)
        parts = [part for part in str(row["path"]).split("/") if part != "."]
        inner = parts[1:] if parts[0] == "Evaluation" else parts
        own = [benchmark.name, *inner[1:]]
        places = [Place("/".join(path)) for path in (parts, inner, own)]
        if benchmark.clip:
            named = {benchmark.clip: PurePosixPath(parts[-1]).stem, **row, "file": task}
            published = benchmark.places_of(named)
            places += [place._replace(path=f"{benchmark.name}/{place.path}") for place in published]
        place = first_existing(root, places)
        yield {
            "problem_id": f"{benchmark.name}-{row['problem_id']}",
            "problem": row["problem"],
            "data_type": "image" if row["data_type"] == "image" else "video",  # "frame": a folder of frames
            "problem_type": row["problem_type"],
            "options": row.get("options") or [],
            "solution": row["solution"],
            "path": place.path,
            "data_source": benchmark.title,
            "task_type": task,
            **seconds_of(row, benchmark.window, place),
        }


def first_existing(folder: Path, places: Sequence[Place]) -> Place:
    """Return the first place that exists, or the first of all if none does."""
    return next((place for place in places if (folder / place.path).exists()), places[0])


def seconds_of(row: Row, names: tuple[str, str] | None, place: Place) -> Row:
    """Return the window in seconds, unless the file is cut to it, and `fps` of a folder of frames."""
    if place.is_window:
        return {}
    rate = {} if row.get("fps") is None else {"fps": row["fps"]}
    if names is None or any(row.get(name) is None for name in names):
        return rate
    return {"start": float(row[names[0]]), "end": float(row[names[1]]), **rate}
