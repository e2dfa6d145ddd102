"""`video-r1 data check`: find bad rows and media that cannot be decoded before training."""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from video_r1.console import Progress, table
from video_r1.data.balance import constant_answers
from video_r1.data.grounding import ON_VIDEOS, outside_of, parse_located
from video_r1.data.manifests.records import Problem, Sample, check_manifest, placed_rows
from video_r1.data.reading import Batch, Reader
from video_r1.data.sources.media_paths import media_root_of
from video_r1.data.sources.media_types import ClipRef
from video_r1.errors import RequestError
from video_r1.files import replace_rows
from video_r1.settings.frames import FrameBudget
from video_r1.settings.shared import RemoteSettings

FORMER_ID = "former_id"
"""Field of a row that was given an id of its own."""
_SOURCES_SHOWN = 40  # the largest; the line of all counts the others too


@dataclass(frozen=True, slots=True)
class MediaCheck:
    """Result of decoding the media of samples."""

    problems: list[Problem]  # one per question with unusable media
    usable: list[Sample]
    files: int  # distinct files (or windows of them) that were decoded
    video_seconds: float  # of all usable clips or windows


def check_media(
    samples: Sequence[Sample],
    budget: FrameBudget | None = None,
    workers: int | None = None,
    rows: Sequence[int] | None = None,
) -> MediaCheck:
    """Decode the frames of every sample in parallel, exactly as training would; each file or window once.

    Args:
        budget: the frames to decode and their size. Default: the training budget.
        workers: files to decode at a time. Default: one per core.
        rows: each sample's row number, for the problems. Default: its position in `samples`, from 1.
    """
    numbers = rows if rows is not None else range(1, len(samples) + 1)
    files: dict[ClipRef, list[int]] = {}  # with the questions about each
    for place, sample in enumerate(samples):
        for file in sample.files:
            files.setdefault(file, []).append(place)

    failed: dict[int, str] = {}
    video_seconds = 0.0
    workers = workers or os.cpu_count() or 1
    with (
        Reader(budget or FrameBudget(), threads=workers) as reader,
        Progress(len(files), "checking media", "files") as bar,
    ):
        batches = (Batch([cast("Sample", file)]) for file in files)  # a Reader needs only `files`
        durations = reader.batches(batches, lambda _, media: media[0].duration, 2 * workers)
        for places, (found,) in zip(files.values(), durations, strict=True):
            if isinstance(found, float):
                video_seconds += found
                outside = {place: _outside(samples[place], found) for place in places}
                failed |= {
                    place: f"{said}; the clip has {found:.1f} s" for place, said in outside.items() if said
                }
            else:
                failed.update(dict.fromkeys(places, str(found)))
            bar.update(bad=len(failed)) if failed else bar.update()
    problems = [Problem(numbers[place], samples[place].problem_id, failed[place]) for place in sorted(failed)]
    usable = [sample for place, sample in enumerate(samples) if place not in failed]
    return MediaCheck(problems, usable, len(files), video_seconds)


def _outside(sample: Sample, duration: float) -> str:
    """Return which time of a row is outside of its clip; "" for none."""
    looks = [given["start"] for turn in sample.work for name, given in turn.calls if name == "look"]
    if late := [start for start in looks if start >= duration]:
        return f"its messages look at {late[0]:g} s"
    truth = parse_located(sample.answer, sample.problem_type) if sample.problem_type in ON_VIDEOS else None
    return outside_of(truth, duration) if truth else ""


def format_counts(samples: Sequence[Sample]) -> str:
    """Return tables of the number of questions by type and by source, for each modality, and a warning for
    each number of options with which one letter is right too often.
    """
    by_type = Counter((sample.problem_type, sample.data_type) for sample in samples)
    by_source = Counter((sample.data_source or "(no source)", sample.data_type) for sample in samples)
    modalities = sorted({sample.data_type for sample in samples}) or ["video"]
    tables = [_counted("problem type", by_type, modalities), _counted("source", by_source, modalities)]
    constant = constant_answers((len(sample.options), sample.answer) for sample in samples)
    warnings = [
        f"warning: {answer}; rl --shuffle_options true varies its position"
        for answer in constant
        if answer.stands_out
    ]
    return "\n\n".join(tables + warnings)


def _counted(title: str, counted: Counter[tuple[str, str]], modalities: Sequence[str]) -> str:
    totals: Counter[str] = Counter()
    for (name, _), count in counted.items():
        totals[name] += count
    names = [name for name, _ in totals.most_common()]
    rows = []
    for label, members in (*((name, [name]) for name in names[:_SOURCES_SHOWN]), ("all", names)):
        numbers = [sum(counted[name, modality] for name in members) for modality in modalities]
        rows.append((label, *(f"{number:,}" for number in (*numbers, sum(numbers)))))
    return table((title, *modalities, "all"), rows)


def run_check(
    manifest: str | Path,
    media_root: str | Path | None = None,
    allow_urls: bool = False,
    media: bool = True,
    workers: int | None = None,
    remote_cache: str | None = None,
    remote_cache_gb: float = RemoteSettings.remote_cache_gb,
    allowed_roots: Sequence[str] = (),
    renumber: str | None = None,
) -> int:
    """Check a manifest, and its media unless `media` is false; print every problem and the counts.

    renumber: a manifest to write first, and to check instead, in which each row has an id of its own.

    Returns the exit code: 0 without problems, else 1.

    Raises:
        ManifestError: no such manifest or media root.
        RequestError: `renumber` exists.
        VideoR1Error: a server that media are fetched from cannot be reached.
    """
    if renumber:
        media_root = media_root_of(manifest, media_root)
        _renumber(manifest, media_root, Path(renumber))
    checked = renumber or manifest
    samples, rows, problems = check_manifest(checked, media_root, allow_urls, allowed_roots=allowed_roots)
    print(*problems, sep="\n", end="\n" * bool(problems))
    budget = FrameBudget(remote_cache=remote_cache, remote_bytes=int(remote_cache_gb * 1e9))
    result = check_media(samples, budget, workers, rows) if media else MediaCheck([], samples, 0, 0.0)
    print(*result.problems, sep="\n", end="\n" * bool(result.problems))
    print(f"\n{format_counts(result.usable)}\n")
    if media:
        hours = result.video_seconds / 3600
        print(f"{result.files:,} media files or windows opened; {hours:.2f} hours of video")
    bad_rows = len({problem.row for problem in problems if problem.row})
    if any(problem.text.startswith("problem_id is ") for problem in problems):
        print("--renumber OUT writes a manifest in which each row has an id of its own")
    summary = f"usable questions: {len(result.usable):,}; rows with problems: {bad_rows:,}"
    print(summary + (f"; questions with unusable media: {len(result.problems):,}" if media else ""))
    return 1 if problems or result.problems else 0


def _renumber(manifest: str | Path, root: str, out: Path) -> None:
    """Write a manifest's rows; those with an id of an earlier row get a number appended, those without an id
    the row's number.
    """
    if out.exists():
        raise RequestError(f"--renumber {out} exists; choose another file")
    rows = [row for _, row in placed_rows(manifest, "train", root) if isinstance(row, dict)]
    taken, used, given = {str(row.get("problem_id")) for row in rows}, set[str](), 0
    for place, row in enumerate(rows):
        former = row.get("problem_id")
        is_id = type(former) in (int, str) and former != ""
        if is_id and str(former) not in used:
            used.add(str(former))
            continue
        begin, first = (f"{former}-", 2) if is_id else ("row-", place + 1)
        own = next(name for n in itertools.count(first) if (name := f"{begin}{n}") not in taken)
        rows[place] = {**row, "problem_id": own, **({} if former is None else {FORMER_ID: former})}
        taken.add(own)
        given += 1
    replace_rows(out, rows)
    print(f"{out}: {given:,} of {len(rows):,} rows got another id; the old one is kept as {FORMER_ID}")
