"""`video-r1 data make`: a checked manifest from a folder of clips and a table of questions.

    TABLE ─► rows ─► layout or guessed columns ─► drafts ─► rows of a manifest ─► checked, media opened ─► OUT
                                                    └──────────────┴───────────────────────┴►
                                                    OUT.refused.jsonl        (--holdout: and held-out.json)

Every rejected row gets a line in OUT.refused.jsonl with the reason and the remedy.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from video_r1.console import table
from video_r1.data.check import FORMER_ID, check_media, format_counts
from video_r1.data.making.clip_index import ClipIndex
from video_r1.data.making.columns import (
    CHAT_COLUMNS,
    COLUMN_NAMES,
    Columns,
    guess_columns,
    is_empty,
    questions_in,
)
from video_r1.data.making.drafts import Making, manifest_row, numbers_of, question_and_options
from video_r1.data.making.layouts import (
    LAYOUTS,
    REMEDIES,
    Draft,
    Numbers,
    Rejected,
    conversation,
    files_of,
    layout_of,
    plain_text,
    split_response,
)
from video_r1.data.making.table_files import read_table
from video_r1.data.manifests.records import FIELDS, Sample, check_manifest
from video_r1.data.manifests.tables import InTable, Unreadable
from video_r1.data.sources.media_paths import MediaPaths, media_root_of, path_below
from video_r1.errors import ManifestError, RequestError
from video_r1.files import claimed, replace_rows
from video_r1.fingerprint import digest
from video_r1.settings.commands import MakeSettings
from video_r1.settings.frames import FrameBudget

_ROWS_SHOWN = 5


class DraftRow(NamedTuple):
    """A question on its way into the manifest: its row in the table, and its draft or manifest row."""

    number: int
    fields: dict[str, Any]


Rejections = list[dict[str, Any]]
"""Lines of OUT.refused.jsonl."""


def run_make(settings: MakeSettings) -> int:
    """Write the manifest OUT, OUT.refused.jsonl and with `holdout` held-out.json, and print how the table was
    understood.

    Returns the exit code: 1 if no question was accepted, or if any row was rejected and `strict` is set.

    Raises:
        RequestError: OUT is a file that this command did not write, unknown columns, numbers as answers that
            may be read in two ways, or questions that cannot be divided by clip.
        ManifestError: no such table or media root.
    """
    assert settings.table is not None and settings.out is not None
    out = Path(settings.out)
    rejected_path, held_path = out.with_name(f"{out.stem}.refused.jsonl"), out.with_stem("held-out")
    is_ours = rejected_path.exists()
    for path in (out, held_path) if settings.holdout else (out,):
        if path.exists() and (not is_ours or str(path.resolve()) == os.path.realpath(settings.table)):
            raise RequestError(f"{path} exists and was not made from this table; choose another --out")
    if settings.holdout and out.stem == held_path.stem:
        raise RequestError(f"--out {out} is where --holdout writes; choose another --out")
    root = media_root_of(settings.table, settings.media_root)
    places = MediaPaths(root, settings.allow_urls, settings.allowed_roots)
    table_rows = list(read_table(settings.table, settings.split))
    clips = ClipIndex(root, follow_links=bool(settings.allowed_roots))
    layout, columns = _understood(settings, table_rows, clips)
    clips.may_miss = not settings.media
    rejected: Rejections = []
    drafts: list[DraftRow] = []
    for number, row in table_rows:
        try:
            drafts += [DraftRow(number, draft) for draft in _drafts_of(row, layout, columns)]
        except Rejected as error:
            rejected.append(error.line(number))
    may_be_text = layout != "table" or columns.lists_files
    making = Making(clips, places, settings.problem_type, settings.subtitles, may_be_text)
    numbers = settings.answers if settings.answers != "auto" else _numbers(drafts)
    if numbers != "text":
        print(f"numbers as answers: positions {numbers.replace('_', ' ')} (change with --answers)")
    rows = _made_rows(drafts, making, numbers, rejected)
    samples = _checked(rows, settings, root, rejected)
    usable = {sample.problem_id for sample in samples}
    kept = [row.fields for row in rows if row.fields["problem_id"] in usable]
    held = held_out(samples, settings.holdout, root) if settings.holdout and kept else set()
    with claimed(out.parent):
        replace_rows(rejected_path, sorted(rejected, key=lambda line: line["row"]))
        if held:
            replace_rows(held_path, [row for row in kept if row["problem_id"] in held])
        if kept := [row for row in kept if row["problem_id"] not in held]:
            replace_rows(out, kept)
    counts = Counter(line["reason"] for line in rejected).most_common()
    if counts:
        print(table(("refused", "questions"), [(name, f"{n:,}") for name, n in counts]), end="\n\n")
        print(*(f"{reason}: {REMEDIES[reason]}" for reason, _ in counts), sep="\n")
        print(f"\ndetails for each row: {rejected_path}\n")
    if clips.missing:
        such = f"{len(clips.missing):,} (such as {next(iter(clips.missing))})"
        print(f"files that are not there yet, with the paths of the table: {such}; data check opens them")
    if clips.renamed:
        name, path = next(iter(clips.renamed.items()))
        print(
            f"files with another name than in the table: {len(clips.renamed):,} (such as {path} for {name!r})"
        )
    for words, of_rows in making.notes.items():
        shown = ", ".join(map(str, of_rows[:_ROWS_SHOWN])) + (", …" if len(of_rows) > _ROWS_SHOWN else "")
        print(f"{words}: {len(of_rows):,} (rows {shown})")
    if not kept:
        print(f"none of the {len(table_rows):,} rows could be used; {out} is not written")
        return 1
    spoken = sum(sample.subtitles is not None for sample in samples)
    subtitles = f", {spoken:,} of them with subtitles (shown with --subtitles)" if spoken else ""
    print(format_counts(samples), end="\n\n")
    print(f"{out}: {len(kept):,} questions from {len(table_rows):,} rows{subtitles}")
    if held:
        print(f"{held_path}: {len(held):,} more, about clips that {out} does not have")
    validate = f" --eval_manifest {held_path}" if held else ""
    print(f"to train on it: --train_manifest {out}{validate} --media_root {root}")
    return 1 if rejected and settings.strict else 0


def _understood(
    settings: MakeSettings, numbered: list[tuple[int, Any]], clips: ClipIndex
) -> tuple[str, Columns]:
    """Return the layout of a table's rows, and the columns beside its chat, or of the whole table; print
    them. Rows that nest several questions are replaced by these.

    Raises ManifestError without any row, RequestError for wrong columns.
    """
    rows = [row for _, row in numbered if isinstance(row, dict)]
    unread = [row.reason for _, row in numbered if isinstance(row, Unreadable)]
    if unread and (not rows or "nothing after it" in unread[-1]):
        raise ManifestError(f"{settings.table}: {unread[-1]}")
    if not rows:
        raise ManifestError(f"{settings.table}: it has no rows{' with fields' * bool(numbered)}")
    layout = settings.layout if settings.layout != "auto" else layout_of(rows[0])
    chat = LAYOUTS.get(layout, ())
    if chat:
        print(f"layout: {layout} (change with --layout)\n")
    else:
        numbered[:] = [
            (number, question)
            for number, row in numbered
            for question in (questions_in(row) if isinstance(row, dict) else [row])
        ]
        outer, rows = rows, [row for _, row in numbered if isinstance(row, dict)]
        if name := next((name for name in rows[0] if name in clips.paths), None):
            raise ManifestError(f"{settings.table}: its first line names {name}; put one with columns above")
        if left := {name for row in outer for name in row}.difference(*rows):
            print(f"lists of questions, and what is not repeated beside each: {', '.join(sorted(left))}\n")
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in chat]
    known = CHAT_COLUMNS if chat else COLUMN_NAMES
    columns = guess_columns(names, settings.columns, rows, known, lambda cell: _is_file(cell, clips))
    shown = [
        (field, "+".join(names), "given" if field in settings.columns else "guessed")
        for field, names in columns.names.items()
    ]
    needed = ("path",) if chat else ("problem", "answer", "path")
    shown += [(field, "", "no such column") for field in needed if field not in columns.names]
    if shown:
        print(table(("field", "column", ""), shown))
    if columns.unused:
        print(f"kept as they are: {', '.join(columns.unused)}")
    if names:
        print("to change that: --columns problem=COLUMN,answer=COLUMN,… (none: no such column)\n")
    return layout, columns


def _is_file(cell: Any, clips: ClipIndex) -> bool:
    try:
        return all([isinstance(path, InTable) or clips.find(path) for path in files_of(cell)])
    except Rejected as error:
        return error.reason == "several clips"


def _drafts_of(row: Any, layout: str, columns: Columns) -> Iterator[Draft]:
    """Yield the drafts of one row of a table. Raises Rejected."""
    if isinstance(row, Unreadable):
        raise Rejected("unreadable row", row.reason)
    if not isinstance(row, dict):
        raise Rejected("unreadable row", f"it is {row!r:.60}, not an object with fields")
    if isinstance(row.get("history"), list) and row["history"]:
        raise Rejected("several questions", f"a history of {len(row['history'])} earlier messages")
    if layout != "table" and not isinstance(row.get(LAYOUTS[layout][0]), list):
        raise Rejected("unreadable row", f"it does not have the layout {layout}: fields {', '.join(row)}")
    rest = {n: row[n] for n in columns.unused if not is_empty(row.get(n)) and n not in FIELDS}
    rest |= columns.values(row)
    try:
        drafts = [rest] if layout == "table" else list(conversation(row, LAYOUTS[layout]))
    except (AttributeError, TypeError) as error:
        raise Rejected("unreadable row", f"it does not have the layout {layout} ({error})") from error
    for place, draft in enumerate(drafts, start=1):
        fields = {name: value for name, value in draft.items() if value is not None}
        if rest.get("path") and fields.get("path", rest["path"]) != rest["path"]:
            raise Rejected("several media", f"its message shows {fields['path']}, its column {rest['path']}")
        if "answer" in rest and len(drafts) == 1:  # the reply of a chat gives the rationale
            process = split_response(fields.get("answer"))[0]
            fields = {"process": process, **fields, "answer": rest["answer"]}
        if len(drafts) > 1 and rest.get("problem_id") is not None:
            fields["problem_id"] = f"{plain_text(rest['problem_id'])}-{place}"
        yield rest | fields


def _numbers(drafts: Sequence[DraftRow]) -> Numbers:
    choices = []
    for draft in drafts:
        try:
            options = question_and_options(draft.fields)[1]
        except Rejected:  # reported when its row is made
            continue
        if options and draft.fields.get("answer") is not None:
            choices.append((split_response(draft.fields["answer"])[1], options))
    return numbers_of(choices)


def _made_rows(
    drafts: Sequence[DraftRow], making: Making, numbers: Numbers, rejected: Rejections
) -> list[DraftRow]:
    """Return the rows of a manifest. A repeated id gets a number appended; the default is the row number."""
    rows: dict[str, DraftRow] = {}
    repeated = 0
    for number, draft in drafts:
        name = draft.get("problem_id")
        name = number if name in (None, "") else name
        name = int(name) if isinstance(name, float) and name.is_integer() else name
        name = name if isinstance(name, (int, str)) and not isinstance(name, bool) else str(name)
        try:
            row = manifest_row(number, draft, making, numbers)
        except Rejected as error:
            rejected.append(error.line(number, name))
            continue
        unique, count = name, 1
        while str(unique) in rows:
            count += 1
            unique = f"{name}-{count}"
        repeated += unique != name
        former = {FORMER_ID: name} if unique != name else {}
        rows[str(unique)] = DraftRow(number, {"problem_id": unique, **former, **row})
    if repeated:
        print(f"repeated ids that got a number appended: {repeated:,} (the old one is kept as {FORMER_ID})")
    return list(rows.values())


def _checked(
    rows: Sequence[DraftRow], settings: MakeSettings, root: str, rejected: Rejections
) -> list[Sample]:
    """Check the rows as training would; return the usable samples."""
    samples, numbers, problems = check_manifest(
        [row.fields for row in rows], root, settings.allow_urls, allowed_roots=settings.allowed_roots
    )
    refused = [("no manifest row", problem) for problem in problems if problem.row]
    if settings.media and samples:
        budget = replace(FrameBudget(), **settings.remote_files())
        result = check_media(samples, budget, settings.workers, numbers)
        refused += [("media", problem) for problem in result.problems]
        samples = result.usable
    for reason, problem in refused:
        number = rows[problem.row - 1].number
        rejected.append(Rejected(reason, problem.text).line(number, problem.problem_id))
    return samples


def held_out(samples: Sequence[Sample], share: float, root: str) -> set[str | int]:
    """Return the ids of at most `share` of the questions, but of one clip at least. No clip is on both sides.

    Clips are drawn by their paths below `root`, so the division is the same on every machine. Raises
    RequestError if all questions are about the same clips.
    """
    leads: dict[str, str] = {}  # of each file: another that is shown with it, or itself

    def lead(path: str) -> str:
        while leads.setdefault(path, path) != path:
            path = leads[path]
        return path

    for sample in samples:
        for path in sample.paths:
            leads[lead(path)] = lead(sample.path)
    groups: dict[str, list[str | int]] = {}
    for sample in samples:
        name = path_below(root, lead(sample.path)) if sample.paths else f"text {sample.problem_id}"
        groups.setdefault(name, []).append(sample.problem_id)
    if len(groups) < 2:
        raise RequestError("holdout: all questions are about the same clips; add others, or leave it out")
    held: list[str | int] = []
    for name in sorted(groups, key=digest):
        if len(held) + len(groups[name]) <= share * len(samples):
            held += groups[name]
    return set(held or min(groups.values(), key=len))
