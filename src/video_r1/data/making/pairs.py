"""`video-r1 data pairs`: the reversed twin of each question whose answer about the reversed clip is known.

    manifest ─► a rule on the words (reversal.py) ─► OUT: every question, its twin behind it
                                └──────────────────► OUT.refused.jsonl: questions without a twin, and why

A cue that stays when the clip is played backwards is right about one half of a pair only.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from video_r1.console import table
from video_r1.data.answers import option_prefix
from video_r1.data.making.reversal import Reversals, Unknown
from video_r1.data.manifests.records import Sample, load_manifest, manifest_row
from video_r1.data.sources.media_paths import media_root_of
from video_r1.errors import RequestError
from video_r1.files import claimed, replace_rows
from video_r1.settings.commands import PairsSettings

TWIN = "-reversed"
"""Ending of a twin's problem_id."""
METRIC = "pair accuracy"
_OF_THE_CLIP = ("key_frames", "annotation", "pass_rates", "pairs")  # what a row says of the clip as it was


def run_pairs(settings: PairsSettings) -> int:
    """Write OUT and OUT.refused.jsonl, print the number of twins, and return the exit code: 1 without any.

    Raises ManifestError for the manifest, RequestError for an OUT that another command wrote and for `words`.
    """
    assert settings.manifest is not None and settings.out is not None
    out = Path(settings.out)
    refused_path = out.with_name(f"{out.stem}.refused.jsonl")
    if out.exists() and not refused_path.exists():
        raise RequestError(f"{out} exists and was not written by this command; choose another --out")
    words = Reversals(settings.words)
    samples = load_manifest(settings.manifest, **settings.manifest_options())
    root = media_root_of(settings.manifest, settings.media_root)
    there = {str(sample.problem_id) for sample in samples}
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for sample in samples:
        row = manifest_row(sample, root)
        rows.append(row)
        try:
            if f"{sample.problem_id}{TWIN}" in there or sample.play == "reversed":
                raise Unknown("it has its twin")
            twin = manifest_row(twin_of(sample, words), root)
        except Unknown as unknown:
            refused.append({"problem_id": sample.problem_id, "reason": str(unknown)})
            continue
        pair = {METRIC: [str(sample.problem_id), 2]}
        row["pairs"] = {**row.get("pairs", {}), **pair}
        rows.append({**twin, "pairs": pair})
    with claimed(out.parent):
        replace_rows(refused_path, refused)
        replace_rows(out, rows)
    reasons = Counter(re.sub("“.*”", "“…”", line["reason"]) for line in refused).most_common()
    if reasons:
        print(table(("no twin", "questions"), [(reason, f"{n:,}") for reason, n in reasons]), end="\n\n")
        print(f"details for each question: {refused_path}")
    twins = len(rows) - len(samples)
    print(f"{out}: {len(samples):,} questions and {twins:,} reversed twins")
    print(f"to train on it: --train_manifest {out} --media_root {root}")
    return 0 if twins else 1


def twin_of(sample: Sample, words: Reversals) -> Sample:
    """Return the question about the reversed clip with its own answer. Raises Unknown.

    The twin has no rationale and no subtitles: they tell what happens forwards.
    """
    if sample.data_type != "video" or sample.messages or sample.more_paths:
        raise Unknown("not a question about one video")
    letters = [option_prefix(option) for option in sample.options]
    texts = [option.removeprefix(letter) for option, letter in zip(sample.options, letters, strict=True)]
    marks = [letter.strip(" (.):") for letter in letters]
    said = texts[marks.index(sample.answer)] if texts else sample.answer
    answer = words.answer(sample.problem, sample.problem_type, texts, said)
    return replace(
        sample,
        problem_id=f"{sample.problem_id}{TWIN}",
        solution=f"<answer>{marks[texts.index(answer)] if texts else answer}</answer>",
        play="reversed",
        process=None,
        subtitles=None,
        extra={name: value for name, value in sample.extra.items() if name not in _OF_THE_CLIP},
    )
