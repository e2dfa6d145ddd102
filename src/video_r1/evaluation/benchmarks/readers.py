"""Readers of single benchmarks, where a declaration is not enough: rows, clip paths, tasks.

TempCompass (arXiv 2403.00476) asks in four forms, which all become multiple choice. Captioning is published
with a language model as judge; here the model chooses among the pieces of information that the caption would
contain, of which one fits the clip.

Rows of minimal pairs (Vinoground, MVP, TimeBlind) name the sets of questions that are right only as a whole.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from video_r1.data.answers import LETTERS, answer_of, options_of, parse_options, split_options
from video_r1.errors import ManifestError
from video_r1.evaluation.benchmarks.spec import Place, Row, Tables, json_or_parquet

FORMS = ("multi-choice", "yes_no", "caption_matching", "captioning")
_NAMED = re.compile(r"(?:Option|Sentence|Caption) (?:\d|[A-Z]): (.*)", re.DOTALL)
_INFORMATION = re.compile(r"Information [A-Z]: (.*)", re.DOTALL)
_INFORMATION_QUESTION = "Which piece of information is consistent with the video?"


def read_tempcompass(path: Path) -> Iterator[Row]:
    """Read the rows of a form, which is the name of their folder."""
    form = path.parent.name
    for row in json_or_parquet(path) if form in FORMS else ():
        yield {**row, **as_choice(form, row), "data_source": f"TempCompass/{form}"}


def as_choice(form: str, row: Row) -> Row:
    """Return `problem`, lettered `options` and the right `letter` of a question in one of the four forms."""
    question, *lines = str(row["question"]).split("\n")
    answer = str(row["answer"]).strip()
    if form == "yes_no":
        options = ["yes", "no"]
        question = "\n".join([question, *lines])
    elif form == "caption_matching":
        options = [match.group(1) if (match := _NAMED.fullmatch(line)) else line for line in lines]
        answer = match.group(1) if (match := _NAMED.fullmatch(answer)) else answer
    elif form == "captioning":
        options = [match.group(1) for line in lines if (match := _INFORMATION.fullmatch(line))]
        answer, question = answer[:1], _INFORMATION_QUESTION
    else:
        options = lines
    choices = options_of(options)
    letter = answer_of(answer, choices)
    if letter not in LETTERS:
        raise ManifestError(f"TempCompass, {form}: the answer {answer!r} is none of {choices}")
    return {"problem": question, "options": choices, "letter": letter}


_TIMEBLIND_OPTIONS = re.compile(r"(.*?)\s*Option A:\s*(.*?)\s*Option B:\s*(.*)", re.DOTALL)


def read_vinoground(path: Path) -> Iterator[Row]:
    """Read `vinoground_textscore.json` (which caption fits a clip) or `vinoground_videoscore.json` (which of
    two clips in one file fits a caption).

    `idx` is `<counterpart>_pos` or `_neg`. `vinoground.csv` has the major category of each counterpart.
    """
    kind, majors = "text" if "textscore" in path.stem else "video", {}
    for table in (path.parent / "vinoground.csv", path.parent.parent / "vinoground.csv"):
        if table.is_file():
            with table.open(encoding="utf-8", newline="") as file:
                majors |= {row["index"]: row["major"].strip() for row in csv.DictReader(file)}
    for row in json_or_parquet(path):
        counterpart = str(row["idx"]).rpartition("_")[0]
        question, options = split_options(str(row["question"]))
        if len(options) != 2:
            raise ManifestError(
                f"{path}: question {row['idx']} has {len(options)} options, not two lines A. and B."
            )
        sets = {"id": f"{row['idx']}-{kind}", "counterpart": counterpart, f"{kind}_set": counterpart}
        asked = {"question": question, "options": options, "major": majors.get(counterpart) or kind}
        yield {**row, **sets, **asked}


def read_mvp(path: Path) -> Iterator[Row]:
    """Read MVP's rows: `video_id` is `<pair>_0` or `_1`; `candidates` is a list in Python's syntax."""
    for row in json_or_parquet(path):
        pair, clip = str(row["video_id"]).rpartition("_")[0], str(row["video_path"]).lstrip("/")
        yield {**row, "candidates": parse_options(row["candidates"]), "pair": pair, "clip": clip}


def read_timeblind(path: Path) -> Iterator[Row]:
    """Read TimeBlind: rows of an instance are question 0 of clips 0 and 1, question 1 of clips 0 and 1."""
    for row in json_or_parquet(path):
        number, text = int(row["index"]), str(row["question"]).strip()
        part: Row = {"instance": number // 4, "asked": number % 4 // 2, "shown": number % 2}
        part["clip"] = str(row["video_path"]).removeprefix("TimeBlind/")
        choice = _TIMEBLIND_OPTIONS.fullmatch(text)
        if row["type"] == "yes_no":
            options, answer = ["yes", "no"], str(row["answer"]).strip().lower()
        elif row["type"] == "multiple_choice" and choice:
            text, *options = choice.groups()
            answer = str(row["answer"]).strip()
        else:
            raise ManifestError(f"{path}: question {number} is neither yes_no nor has an Option A: and B:")
        yield {**row, **part, "question": text, "options": options, "answer": answer}


QUESTIONS_PER_TASK = 200  # of MVBench
QUESTIONS_PER_TRACK = 300  # of VideoMMMU
_TRACKS = ("Adaptation", "Comprehension", "Perception")
_ABOVE = ("", "video/", "data0613/", "video/data0613/")


def videommmu_places(row: Row, tables: Tables) -> list[Place]:
    """Return the clip's path in the folder of its discipline (`validation_Art_Theory_12`: Art), and alone."""
    discipline = tables["disciplines"].get("_".join(row["id"].split("_")[1:-1]), "")
    return [Place(f"{discipline}/{row['id']}.mp4"), Place(f"{row['id']}.mp4")]


def videommmu_task(row: Row, tables: Tables) -> str:
    """Return the track of a reference row, whose questions are numbered from 1, track after track."""
    return _TRACKS[(int(row["problem_id"]) - 1) // QUESTIONS_PER_TRACK]


def mmvu_places(row: Row, tables: Tables) -> list[Place]:
    """Return the clip's path; its URL ends in `…/resolve/main/videos/<Subject>/<n>.mp4`."""
    return [Place(row.get("video_path") or "videos/" + str(row["video"]).partition("/videos/")[2])]


def mmvu_task(row: Row, tables: Tables) -> str:
    return PurePosixPath(row["path"]).parent.name.replace("_", " ")


def mvbench_places(row: Row, tables: Tables) -> Iterator[Place]:
    """Yield paths in the archives' own folder, unpacked in `video` or above; `data0613` has several folders.

    Clips without an extension are folders of frames.
    """
    folder, name = tables["folders"][row["file"]], str(row["video"])
    stem = str(PurePosixPath(name).with_suffix("")) if "." in name else name
    names = dict.fromkeys([name, f"{stem}.mp4"] if "." in name else [f"{stem}.mp4"])
    places = [Place(f"{folder}/{each}") for each in names]
    if "." not in name:
        places.append(Place(f"{folder}/{stem}"))
    if converted := tables["converted"].get(folder):
        places += [Place(f"{converted}/{each}") for each in names]
    if cut := tables["cut"].get(folder):
        window = f"{row.get('start')}_{row.get('end')}"
        places += [Place(f"{cut}/{stem}_{window}.mp4", True), Place(f"{cut}/{stem}.mp4", True)]
    for place in places:
        yield from (place._replace(path=above + place.path) for above in _ABOVE)


def mvbench_task(row: Row, tables: Tables) -> str:
    """Return the task of a reference row; all 4,000 questions are numbered from 1, task after task."""
    return list(tables["folders"])[(int(row["problem_id"]) - 1) // QUESTIONS_PER_TASK]


def read_tomato(path: Path) -> Iterator[Row]:
    """Read `data/<kind of reasoning>.json`: questions by number, the answer as an index from 0."""
    kind = path.stem.replace("&", "_")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON ({error})") from error
    for number, row in rows.items():
        yield {**row, "id": f"{kind}-{number}", "task": kind, "letter": LETTERS[row["answer"]]}


def read_longvideobench(path: Path) -> Iterator[Row]:
    """Read LongVideoBench: options in `candidates` or `option0` to `option4` ("N/A" is none)."""
    for row in json_or_parquet(path):
        five = [row.get(f"option{place}") for place in range(5)]
        options = row.get("candidates") or [option for option in five if option not in (None, "N/A")]
        yield {**row, "options": options, "letter": LETTERS[row["correct_choice"]]}


def read_charades_sta(path: Path) -> Iterator[Row]:
    """Read Charades-STA: `timestamp` is [start, end] in seconds with one decimal, kept as 16-bit numbers."""
    for row in json_or_parquet(path):
        span = [round(float(second), 1) for second in row["timestamp"]]
        yield {**row, "answer": json.dumps({"time": span})}
