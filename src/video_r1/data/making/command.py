"""`video-r1 data make`: a checked manifest from a folder of clips and a table of questions.

    TABLE ─► rows ─► layout or guessed columns ─► drafts ─► rows of a manifest ─► checked, media opened ─► OUT
                                                    └──────────────┴───────────────────────┴►
                                                    OUT.refused.jsonl

Nothing is dropped without a line that says why and how it is mended.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from video_r1.console import table
from video_r1.data.check import check_media, format_counts
from video_r1.data.making.clip_index import ClipIndex
from video_r1.data.making.columns import Columns, guess_columns
from video_r1.data.making.drafts import Making, manifest_row, question_and_options
from video_r1.data.making.layouts import LAYOUTS, Draft, layout_of
from video_r1.data.making.options import Reading, reading_of
from video_r1.data.making.refusals import REMEDIES, Refused
from video_r1.data.making.tabular import read_table
from video_r1.data.manifests.records import FIELDS, Sample, check_manifest
from video_r1.data.manifests.tables import Unreadable
from video_r1.data.sources.media_paths import MediaPaths, media_root_of
from video_r1.errors import ManifestError, RequestError
from video_r1.files import claimed, replace_rows
from video_r1.settings.commands import MakeSettings
from video_r1.settings.frames import FrameBudget

_COLUMN_ROWS = 100  # of a table, in which its columns are looked for: JSON rows need not all have the same


class Question(NamedTuple):
    """What became of one question so far: its row in the table, and a draft or row of a manifest."""

    number: int
    said: dict[str, Any]


class Table(NamedTuple):
    """A table that was read: its questions, the rows without any, and how it was understood."""

    drafts: list[Question]
    refused: list[dict[str, Any]]
    rows: int
    layout: str
    columns: Columns | None  # of a table without a published layout


def run_make(settings: MakeSettings) -> int:
    """Writes the manifest OUT and OUT.refused.jsonl, and prints how the table was understood and what was
    refused.

    Returns the exit code: 1 when no question could be taken, or when any row was refused and `strict` is set.

    Raises:
        RequestError: OUT is a file that this command did not write, columns that there are not, numbers as
            answers that may be read in two ways.
        ManifestError: there is no such table or media root.
    """
    assert settings.table is not None and settings.out is not None
    out = Path(settings.out)
    refused_path = out.with_name(f"{out.stem}.refused.jsonl")
    if out.exists() and (not refused_path.exists() or str(out.resolve()) == os.path.realpath(settings.table)):
        raise RequestError(f"{out} exists and was not made of this table; choose another --out")
    root = media_root_of(settings.table, settings.media_root)
    places = MediaPaths(root, settings.allow_urls, settings.allowed_roots)
    found = read_drafts(settings)
    print(understood(found))
    making = Making(
        ClipIndex(root, follow_links=bool(settings.allowed_roots)),
        places,
        settings.problem_type,
        settings.subtitles,
    )
    reading = settings.answers if settings.answers != "auto" else _reading(found)
    if reading != "text":
        print(
            f"numbers as answers to a choice: places {reading.replace('_', ' ')} (--answers says otherwise)"
        )
    rows, refused, repeated = made_rows(found.drafts, making, reading)
    if repeated:
        print(f"ids that came before, and got a number behind them: {repeated:,}")
    samples, unusable = checked(rows, settings, root)
    refused = sorted([*found.refused, *refused, *unusable], key=lambda line: line["row"])
    bad = {line["problem_id"] for line in unusable}
    kept = [row.said for row in rows if row.said["problem_id"] not in bad]
    with claimed(out.parent):
        replace_rows(refused_path, refused)
        if kept:
            replace_rows(out, kept)
    print(summary(samples, kept, refused, found.rows, out, refused_path, root))
    return 1 if not kept or (refused and settings.strict) else 0


def read_drafts(settings: MakeSettings) -> Table:
    """What the table's rows say. Raises ManifestError and RequestError."""
    assert settings.table is not None
    numbered = list(read_table(settings.table, settings.split))
    whole = [row for _, row in numbered if isinstance(row, dict)]
    if not whole:
        said = next((row.reason for _, row in numbered if isinstance(row, Unreadable)), "it has no rows")
        raise ManifestError(f"{settings.table}: {said}")
    layout = settings.layout if settings.layout != "auto" else layout_of(whole[0])
    if settings.columns and layout != "table":
        if settings.layout != "auto":
            raise RequestError(f"columns: the layout {layout} has its own; leave one of the two out")
        layout = "table"
    columns = None
    if layout == "table":
        names = dict.fromkeys(name for row in whole[:_COLUMN_ROWS] for name in row)
        columns = guess_columns(names, settings.columns)
    drafts: list[Question] = []
    refused: list[dict[str, Any]] = []
    clips = _clip_map(layout, settings.table)
    for number, row in numbered:
        try:
            for draft in drafts_of(row, layout, columns):
                path = clips.get(str(draft.get("path")))
                drafts.append(Question(number, draft if path is None else {**draft, "path": path}))
        except Refused as error:
            refused.append(error.line(number))
    return Table(drafts, refused, len(numbered), layout, columns)


def drafts_of(row: Any, layout: str, columns: Columns | None) -> Iterator[Draft]:
    """The drafts of one row of a table. Raises Refused."""
    if isinstance(row, Unreadable):
        raise Refused("unreadable row", row.reason)
    if not isinstance(row, dict):
        raise Refused("unreadable row", f"it is {row!r:.60}, not fields by name")
    if columns is not None:
        yield {
            name: row[name] for name in columns.unused if name in row and name not in FIELDS
        } | columns.values(row)
        return
    if not LAYOUTS[layout].fits(row):
        raise Refused("unreadable row", f"it is not of the layout {layout}: its fields are {', '.join(row)}")
    try:
        yield from LAYOUTS[layout].drafts(row)
    except (
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # a row that only begins so
        raise Refused("unreadable row", f"it is not of the layout {layout} ({error})") from error


def _clip_map(layout: str, table: str) -> dict[str, str]:
    """Where a layout's file beside the table says that each clip lies; empty without such a file."""
    name = LAYOUTS[layout].map_file if layout in LAYOUTS else ""
    path = Path(table).with_name(name) if name else None
    if path is None or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ManifestError(
            f"{path}: it is no JSON object of clips ({error}); mend it, or move it away"
        ) from error


def _reading(found: Table) -> Reading:
    if found.layout in LAYOUTS and (known := LAYOUTS[found.layout].numbers) is not None:
        return known
    choices = []
    for question in found.drafts:
        try:
            options = question_and_options(question.said)[1]
        except Refused:  # counted when its row is made
            continue
        if options and question.said.get("answer") is not None:
            choices.append((question.said["answer"], options))
    return reading_of(choices)


def made_rows(
    drafts: Iterable[Question], making: Making, reading: Reading
) -> tuple[list[Question], list[dict[str, Any]], int]:
    """Rows of a manifest, lines about the others, and how many ids came before and got a number behind them.
    Questions without an id have their row's number."""
    rows: list[Question] = []
    refused: list[dict[str, Any]] = []
    taken: set[str] = set()
    repeated = 0
    for number, draft in drafts:
        name = draft.get("problem_id")
        name = number if name in (None, "") else name
        name = int(name) if isinstance(name, float) and name.is_integer() else name
        name = name if isinstance(name, (int, str)) and not isinstance(name, bool) else str(name)
        try:
            row = manifest_row(draft, making, reading)
        except Refused as error:
            refused.append(error.line(number, name))
            continue
        own, count = name, 1
        while str(own) in taken:
            count += 1
            own = f"{name}-{count}"
        taken.add(str(own))
        repeated += own != name
        rows.append(Question(number, {"problem_id": own, **row}))
    return rows, refused, repeated


def checked(
    rows: Sequence[Question], settings: MakeSettings, root: str
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """The samples that a training would have, and lines about the rows that it would not take."""
    samples, numbers, problems = check_manifest(
        [row.said for row in rows], root, settings.allow_urls, allowed_roots=settings.allowed_roots
    )
    refused = [
        Refused("no manifest row", problem.text).line(rows[problem.row - 1].number, problem.problem_id)
        for problem in problems
        if problem.row
    ]
    if settings.media and samples:
        budget = replace(FrameBudget(), **settings.remote_files())
        result = check_media(samples, budget, settings.workers, numbers)
        refused += [
            Refused("media", problem.text).line(rows[problem.row - 1].number, problem.problem_id)
            for problem in result.problems
        ]
        samples = result.usable
    return samples, refused


def understood(found: Table) -> str:
    """How the table was read, and how to have it read in another way."""
    if found.columns is None:
        return f"layout: {found.layout} ({LAYOUTS[found.layout].source}; --layout names another one)\n"
    lines = [table(("field", "column", ""), found.columns.lines())]
    if found.columns.unused:
        lines.append(f"kept as they are: {', '.join(found.columns.unused)}")
    lines.append("to change that: --columns problem=COLUMN,answer=COLUMN,… (none: without this field)")
    return "\n".join(lines) + "\n"


def summary(
    samples: Sequence[Sample],
    kept: Sequence[Any],
    refused: Sequence[dict[str, Any]],
    rows: int,
    out: Path,
    refused_path: Path,
    root: str,
) -> str:
    """What was taken and what was refused, with the remedies and the next command."""
    lines = []
    counts = Counter(line["reason"] for line in refused)
    if counts:
        lines += [table(("refused", "questions"), [(name, f"{n:,}") for name, n in counts.most_common()]), ""]
        lines += [f"{reason}: {REMEDIES[reason]}" for reason, _ in counts.most_common()]
        lines += ["", f"each one with what was found: {refused_path}", ""]
    if not kept:
        return "\n".join([*lines, f"nothing could be taken of {rows:,} rows; {out} is not written"])
    spoken = sum(sample.subtitles is not None for sample in samples)
    lines += [format_counts(samples), ""]
    lines.append(
        f"{out}: {len(kept):,} questions of {rows:,} rows"
        + (f", {spoken:,} of them with subtitles (shown with --subtitles)" if spoken else "")
    )
    lines.append(f"to train on it: --train_manifest {out} --media_root {root}")
    return "\n".join(lines)
