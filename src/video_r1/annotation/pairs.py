"""`video-r1 data pairs`: the reversed twin of each question whose answer about the reversed clip is known.

    manifest ─► a rule on the words (data/making/reversal.py) ─► OUT: every question, its twin behind it
                     └─► a teacher, if one is named ───────────┴► OUT.refused.jsonl: no twin, and why

A cue that stays when the clip is played backwards is right about one half of a pair only.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_r1.console import table
from video_r1.data.answers import option_prefix, read_answer
from video_r1.data.making.reversal import Reversals, Unknown
from video_r1.data.manifests.records import Sample, load_manifest, manifest_row
from video_r1.data.sources.media_paths import media_root_of
from video_r1.errors import RequestError
from video_r1.files import claimed, replace_rows
from video_r1.processes import decided_by_first, process_group, process_index
from video_r1.settings.decoding import PairsSettings

if TYPE_CHECKING:
    from video_r1.annotation.annotate import Journal

TWIN = "-reversed"
"""Ending of a twin's problem_id."""
METRIC = "pair accuracy"
ASKED = ("multiple choice", "numerical")
"""Types of questions that a teacher is asked: those whose answers can agree exactly."""
_OF_THE_CLIP = ("key_frames", "annotation", "pass_rates", "pairs")  # what a row says of the clip as it was
Refused = dict[str | int, str]
"""Reason for which a question has no twin, by problem_id."""


def run_pairs(settings: PairsSettings) -> int:
    """Write OUT and OUT.refused.jsonl, print the number of twins, and return the exit code: 1 without any.

    Raises ManifestError for the manifest, RequestError for an OUT that another command wrote and for `words`,
    and with a teacher as `run_annotate`.
    """
    assert settings.manifest is not None and settings.out is not None
    manifest, out = settings.manifest, Path(settings.out)
    refused_path = out.with_name(f"{out.stem}.refused.jsonl")
    if out.exists() and not refused_path.exists():
        raise RequestError(f"{out} exists and was not written by this command; choose another --out")
    words = Reversals(settings.words)
    with process_group(out.parent):
        samples = decided_by_first(lambda: load_manifest(manifest, **settings.manifest_options()))
        there = {str(sample.problem_id) for sample in samples}
        twins: dict[str | int, Sample] = {}
        refused: Refused = {}
        for sample in samples:
            try:
                if f"{sample.problem_id}{TWIN}" in there or sample.play == "reversed":
                    raise Unknown("it has its twin")
                twins[sample.problem_id] = twin_of(sample, words)
            except Unknown as unknown:
                refused[sample.problem_id] = str(unknown)
        if settings.teacher is not None:
            from video_r1.annotation.annotate import answered  # imports torch

            asked = [one for one in samples if one.problem_id in refused and is_asked(one, there)]
            answers = answered(settings, list(map(reversed_question, asked)), agreed)
            for sample, (twin, answer) in zip(asked, answers, strict=False):  # `limit` may cut them
                if answer:
                    twins[sample.problem_id] = replace(twin, solution=f"<answer>{answer}</answer>")
                    del refused[sample.problem_id]
                else:
                    refused[sample.problem_id] += "; the teacher does not agree with itself"
        if process_index() > 0:
            return 0 if twins else 1
        root = media_root_of(manifest, settings.media_root)
        with claimed(out.parent):
            replace_rows(refused_path, ({"problem_id": n, "reason": why} for n, why in refused.items()))
            replace_rows(out, _rows(samples, twins, root))
    reasons = Counter(re.sub("“.*”", "“…”", reason) for reason in refused.values()).most_common()
    if reasons:
        print(table(("no twin", "questions"), [(reason, f"{n:,}") for reason, n in reasons]), end="\n\n")
        print(f"details for each question: {refused_path}")
    print(f"{out}: {len(samples):,} questions and {len(twins):,} reversed twins")
    print(f"to train on it: --train_manifest {out} --media_root {root}")
    return 0 if twins else 1


def _rows(samples: Sequence[Sample], twins: dict[str | int, Sample], root: str) -> Iterator[dict[str, Any]]:
    for sample in samples:
        row, twin = manifest_row(sample, root), twins.get(sample.problem_id)
        if twin is None:
            yield row
            continue
        pair = {METRIC: [str(sample.problem_id), 2]}
        yield {**row, "pairs": {**row.get("pairs", {}), **pair}}
        yield {**manifest_row(twin, root), "pairs": pair}


def is_asked(sample: Sample, there: set[str]) -> bool:
    """Tell whether a teacher can give a question's answer about the reversed clip."""
    plain = sample.data_type == "video" and not sample.messages and not sample.more_paths
    new = sample.play == "forward" and f"{sample.problem_id}{TWIN}" not in there
    return plain and new and sample.problem_type in ASKED


def agreed(samples: Sequence[Sample], journal: "Journal") -> list[tuple[Sample, str]]:
    """Return each question with the answer that all of the teacher's responses give; "" if they differ."""
    found = []
    for sample in samples:
        said = {
            read_answer(each["text"], sample.problem_type, sample.options)
            for each in journal[sample.problem_id].get("completions", ())
        }
        found.append((sample, said.pop() if len(said) == 1 else ""))
    return found


def reversed_question(sample: Sample) -> Sample:
    """Return the question about the reversed clip; its solution is still the original's.

    It has no rationale and no subtitles: they tell what happens forwards.
    """
    extra = {name: value for name, value in sample.extra.items() if name not in _OF_THE_CLIP}
    twin_id = f"{sample.problem_id}{TWIN}"
    return replace(
        sample, problem_id=twin_id, play="reversed", process=None, subtitles=None, extra=extra, work=()
    )


def twin_of(sample: Sample, words: Reversals) -> Sample:
    """Return the question about the reversed clip with its own answer. Raises Unknown."""
    if sample.data_type != "video" or sample.messages or sample.more_paths:
        raise Unknown("not a question about one video")
    letters = [option_prefix(option) for option in sample.options]
    texts = [option.removeprefix(letter) for option, letter in zip(sample.options, letters, strict=True)]
    marks = [letter.strip(" (.):") for letter in letters]
    said = texts[marks.index(sample.answer)] if texts else sample.answer
    answer = words.answer(sample.problem, sample.problem_type, texts, said)
    solution = f"<answer>{marks[texts.index(answer)] if texts else answer}</answer>"
    return replace(reversed_question(sample), solution=solution)
