"""TempCompass (arXiv 2403.00476): five temporal aspects of 410 clips, asked in four forms.

All four forms become multiple choice. Yes/no questions and caption matching have their two answers as
options. Captioning is published with a language model as judge of the caption; here the model chooses among
the pieces of information that the caption would have to be made from, of which one fits the clip.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from video_r1.data.answers import LETTERS
from video_r1.data.making.options import answer_of, options_of
from video_r1.errors import ManifestError
from video_r1.evaluation.benchmarks.spec import Row, json_or_parquet

FORMS = {"multi-choice": 1580, "yes_no": 2453, "caption_matching": 1503, "captioning": 2004}
_NAMED = re.compile(r"(?:Option|Sentence|Caption) (?:\d|[A-Z]): (.*)", re.DOTALL)
_INFORMATION = re.compile(r"Information [A-Z]: (.*)", re.DOTALL)
_INFORMATION_QUESTION = "Which piece of information is consistent with the video?"


def read_tempcompass(path: Path) -> Iterator[Row]:
    """`questions/<form>.json` maps clips to aspects to questions; the hub has rows, a folder a form."""
    form = path.stem if path.stem in FORMS else path.parent.name
    if form not in FORMS:
        return
    rows = _nested(path) if path.stem in FORMS else json_or_parquet(path)
    for row in rows:
        yield {**row, **as_choice(form, row), "data_source": f"TempCompass/{form}"}


def _nested(path: Path) -> Iterator[Row]:
    try:
        clips = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON ({error})") from error
    for clip, aspects in clips.items():
        for aspect, questions in aspects.items():
            for question in questions:
                yield {**question, "video_id": clip, "dim": aspect}


def as_choice(form: str, row: Row) -> Row:
    """`problem`, lettered `options` and the right `letter` of a question in one of the four forms."""
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
