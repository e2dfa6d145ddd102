"""`video-r1 annotate`: rationales written by a teacher, filtered into a manifest for SFT.

    manifest ─► Teacher ─► journal ─► judge ─► OUT (kept)
                                          └──► OUT.rejected.jsonl (the others, with the reason)

The journal holds the teacher's answers. OUT and OUT.rejected.jsonl follow from it and the filters' settings
alone, in the manifest's order, so the filters can be changed later without asking the teacher again, and an
interruption leaves no trace.

Several ranks share the questions. Each has its own teacher and its own journal
(part-<rank>.OUT.journal.jsonl), which rank 0 merges at the end, or when a killed run is continued.
"""

import fcntl
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from video_r1.annotation.filters import FILTERS, Verdict, judge, rationale_of
from video_r1.annotation.teachers import EndpointTeacher, EngineTeacher, Teacher, TeacherAnswer
from video_r1.chat_client import Completion, Endpoint, endpoint_urls, open_endpoint
from video_r1.console import table
from video_r1.data.decoding.frame_cache import open_frame_cache
from video_r1.data.manifests.records import FIELDS, Sample, load_manifest
from video_r1.data.reading import Reader
from video_r1.data.sources.media_paths import media_root_of, path_below
from video_r1.data.templates import load_template
from video_r1.errors import RequestError, VideoR1Error, writing_to
from video_r1.evaluation.question_loop import own_file, run_share
from video_r1.files import json_lines, lock, parts_of, whole_lines, without_links, writing_rows
from video_r1.fingerprint import changed, digest, refuse_changed
from video_r1.processes import (
    Interrupted,
    decided_by_first,
    number_of,
    process_count,
    process_group,
    process_index,
    wait_for_everyone,
)
from video_r1.settings.decoding import AnnotateSettings

FAILURES = {"media": "not asked: media", "prompt": "not asked: prompt", "endpoint": "not answered"}
"""Kinds of questions without rationales (see `teachers.Failed`), and their names in the table."""
_DRAWN_WITH = (
    "fps", "min_frames", "max_frames", "frame_pixels", "image_pixels",
    "samples", "temperature", "top_p", "max_new_tokens", "seed", "frames_as", "request_fields",
)  # fmt: skip


class Counts:
    """Numbers of questions and of rationales by outcome: "kept", one of FILTERS or one of FAILURES."""

    def __init__(self) -> None:
        self.questions: Counter[str] = Counter()
        self.rationales: Counter[str] = Counter()

    def table(self) -> str:
        """Return the closing table: each filter with its counts.

        A rejected question counts under the filter that stopped the rationale that came furthest.
        """
        total = max(1, self.questions.total())
        rows = []
        for name in ("kept", *FILTERS, *FAILURES):
            count = self.questions[name]
            if count or name not in FAILURES:
                drawn = "" if name in FAILURES else f"{self.rationales[name]:,}"
                rows.append((FAILURES.get(name, name), f"{count:,}", f"{count / total:.1%}", drawn))
        rows.append(("all", f"{self.questions.total():,}", "", f"{self.rationales.total():,}"))
        return table(("", "questions", "share", "rationales"), rows)


def run_annotate(settings: AnnotateSettings) -> Counts:
    """Annotate a manifest, print the table and return the counts.

    The manifest, the journal and the endpoint are checked before a model is loaded, and no teacher is started
    when every question has its answer. Raises ManifestError, ConfigError, RequestError, and VideoR1Error when
    the teacher fails, nothing is kept, or another rank is lost.
    """
    assert settings.manifest is not None and settings.teacher is not None and settings.out is not None
    manifest, teacher, out = settings.manifest, settings.teacher, settings.out
    with process_group(Path(out).parent):
        samples = decided_by_first(lambda: load_manifest(manifest, **settings.manifest_options()))
        drawn_with = {"teacher": teacher, **drawing(settings, samples)}
        if settings.at_endpoint:
            key = os.environ.get(settings.key_variable)
            endpoint = Endpoint(endpoint_urls(teacher), key, settings.timeout, settings.wait)
            name, frames_as = open_endpoint(endpoint, settings.model, settings.frames_as)
            drawn_with |= {"teacher": name, "frames_as": frames_as}

        def open_teacher() -> Teacher:
            if settings.at_endpoint:
                return EndpointTeacher(settings, endpoint, name, frames_as)
            return _local_teacher(settings)

        with writing_to(out):
            counts = annotate(samples[: settings.limit], open_teacher, settings, drawn_with)
        root = media_root_of(manifest, settings.media_root)
        print(f"{counts.table()}\n\nmanifest for SFT: {out}; its media root is {root}")
        print(f"rejected, with the reason: {rejected_path(out)}")
        if counts.questions["endpoint"]:
            count = f"{counts.questions['endpoint']:,}"
            print(f"{count} questions were not answered; run the same command to ask again")
        if not counts.questions["kept"]:
            raise VideoR1Error(f"no rationale was kept; {rejected_path(out)} has the reasons")
        return counts


def drawing(settings: AnnotateSettings, samples: list[Sample]) -> dict[str, Any]:
    """Return the settings that the teacher's answers depend on besides the teacher (see fingerprint.py)."""
    engine = "server" if settings.engine.startswith("http") else settings.engine
    return {
        "manifest": digest(
            [
                [s.problem_id, s.problem, s.options, s.solution, s.path, s.start, s.end]
                + ([s.subtitles] if settings.subtitles else [])
                + ([s.fps] if s.fps else [])
                + [*s.more_paths]
                + [[turn["role"], turn["content"]] for turn in s.messages]
                for s in samples
            ]
        ),
        "prompt_template": digest(asdict(load_template(settings.prompt_template, settings.subtitles))),
        "engine": "endpoint" if settings.at_endpoint else engine,
        **{name: getattr(settings, name) for name in _DRAWN_WITH},
    }


def _local_teacher(settings: AnnotateSettings) -> Teacher:
    from video_r1.rollout.engine_factory import open_engine, open_prompts

    decoding = copy(settings)
    decoding.model = settings.teacher
    processor, builder, budget = open_prompts(decoding)
    cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
    engine = open_engine(decoding, processor)
    return EngineTeacher(engine, builder, Reader(budget, cache, settings.workers), settings)


def annotate(
    samples: Sequence[Sample],
    open_teacher: Callable[[], Teacher],
    settings: AnnotateSettings,
    drawn_with: Mapping[str, Any],
) -> Counts:
    """Have the teacher answer the questions that have no answer in the journal; then write both manifests.

    open_teacher is called only if there is such a question. drawn_with: the settings that the answers depend
    on, JSON values by name. Every rank calls this and returns the counts. Raises RequestError, also for a
    journal made with other settings and an OUT that no annotation has written, and what the teacher raises;
    all answers so far are then in the journal.
    """
    assert settings.out is not None
    out = Path(settings.out)
    path = out.with_name(f"{out.stem}.journal.jsonl")
    names = [sample.problem_id for sample in samples]
    with ExitStack() as opened:
        journals: list[Journal] = []  # rank 0 has it

        def begin() -> set[str | int]:
            if out.exists() and not path.exists():
                raise RequestError(f"{out} exists and was not written by an annotation; choose another --out")
            journals.append(opened.enter_context(closing(Journal(path, drawn_with))))
            journals[0].merge(parts_of(path), drawn_with, names)
            return {name for name in names if journals[0].is_answered(name)}

        def finish() -> Counts:
            journals[0].merge(parts_of(path), drawn_with, names)
            return _write(samples, journals[0], settings)

        done = decided_by_first(begin)
        if len(done) < len(names):
            if done and process_index() == 0:
                print(f"{len(done)} of {len(names)} questions are answered already", file=sys.stderr)
            teacher = opened.enter_context(closing(open_teacher()))  # closed last: see process_group
            size = teacher.batch_size
            batches = [samples[at : at + size] for at in range(0, len(samples), size)]
            alone = process_count() == 1
            own = nullcontext(journals[0]) if alone else closing(Journal(own_file(path), drawn_with))
            try:
                with own as journal:
                    run_share(
                        [batch for batch in batches if any(one.problem_id not in done for one in batch)],
                        lambda batch: sum(one.problem_id not in done for one in batch),
                        lambda share: _record(teacher.answers(share, done), journal, settings),
                        "annotating",
                    )
            except KeyboardInterrupt as stop:
                raise Interrupted(number_of(stop), f"the answers so far are in {path}") from stop
            wait_for_everyone()
        return decided_by_first(finish)


def _record(
    answers: Generator[list[TeacherAnswer]], journal: "Journal", settings: AnnotateSettings
) -> Generator[tuple[int, dict[str, str]]]:
    """Append the answers to the journal as they come; yield their number and the share kept so far."""
    answered = kept = failed = 0
    with closing(answers):
        for finished in answers:
            journal.append(_entry(one) for one in finished)
            for one in finished:
                if isinstance(one.outcome, list):
                    answered += 1
                    kept += judge(one.sample, one.outcome, settings).kept is not None
                else:
                    failed += 1
            figures = {"kept": f"{kept / answered:.0%}"} if answered else {}
            yield len(finished), figures | ({"failed": str(failed)} if failed else {})


def _entry(answer: TeacherAnswer) -> dict[str, Any]:
    outcome = answer.outcome
    if isinstance(outcome, list):
        said: dict[str, Any] = {"completions": [completion._asdict() for completion in outcome]}
    else:
        said = {"failed": outcome.kind, "reason": outcome.reason}
    return {"problem_id": answer.sample.problem_id, **said}


def rejected_path(out: str | Path) -> Path:
    return Path(out).with_name(f"{Path(out).stem}.rejected.jsonl")


def _write(samples: Sequence[Sample], journal: "Journal", settings: AnnotateSettings) -> Counts:
    """Judge all answers in the journal and write both files, each in one step, in the manifest's order.

    A kept row is the sample's own with the teacher's rationale as `process`; `solution` is the manifest's. A
    rejected row has the reason, and each rationale with the filter that stopped it.
    """
    assert settings.manifest is not None and settings.out is not None
    out = Path(settings.out)
    root = media_root_of(settings.manifest, settings.media_root)
    counts = Counts()
    with writable(out), writing_rows(out) as keep, writing_rows(rejected_path(out)) as reject:
        for sample in samples:
            if sample.problem_id not in journal:
                continue
            found = journal[sample.problem_id]
            completions = [Completion(**completion) for completion in found.get("completions", ())]
            failed = Verdict(None, found["failed"], []) if "failed" in found else None
            verdict = failed or judge(sample, completions, settings)
            if verdict.kept is not None:
                chosen, text = verdict.judged[verdict.kept], completions[verdict.kept].text
                paths = [path_below(root, path) for path in sample.paths]
                row = {name: value for name in FIELDS if (value := getattr(sample, name)) is not None}
                annotation = {
                    "answer": chosen.answer,
                    "score": round(chosen.score, 4),
                    "passed": sum(not one.rejected for one in verdict.judged),
                    "samples": len(verdict.judged),
                }
                keep(
                    {
                        **row,
                        "process": f"<think>{rationale_of(text)}</think>",
                        "path": paths if len(paths) > 1 else paths[0],
                        **sample.extra,
                        "annotation": annotation,
                    }
                )
            else:
                row = {"problem_id": sample.problem_id, "reason": verdict.reason}
                row |= {"detail": found.get("reason", ""), "truth": sample.answer}
                judged = zip(completions, verdict.judged, strict=True)
                rationales = [{**completion._asdict(), **one._asdict()} for completion, one in judged]
                reject(
                    {name: value for name, value in row.items() if value != ""} | {"rationales": rationales}
                )
            counts.questions[verdict.reason or "kept"] += 1
            counts.rationales.update(one.rejected or "kept" for one in verdict.judged)
    return counts


class Journal:
    """Every answer of the teacher as a JSON line: `problem_id` and `completions`, or `failed` and `reason`.

    The first line holds the settings that the answers depend on. Lines are flushed to the disk as they are
    appended; a last line that was cut off is removed when the journal is opened again. A later line about a
    question replaces an earlier one.

    path: the file; settings: JSON values by name. Raises RequestError when the file holds answers made with
    other settings, is not a journal, is being written by another process, or cannot be opened.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._places: dict[str, int] = {}  # byte offset of each question's last line
        self._failed: set[str] = set()
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", opener=without_links)  # noqa: SIM115
        try:
            try:
                lock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RequestError(
                    f"{path} is being written by another process; wait for it, or stop it"
                ) from error
            self._read(settings)
        except BaseException:  # of any kind: nobody else can close the file
            self._file.close()
            raise

    def _read(self, settings: Mapping[str, Any]) -> None:
        """Index the lines; write the first one if the file is empty."""
        for number, place, entry in whole_lines(self._file):
            if entry is None or ("settings" if number == 1 else "problem_id") not in entry:
                raise RequestError(
                    f"{self.path}, line {number} does not belong to an annotation's journal; move the file "
                    "away, or choose another --out"
                )
            self._note(entry, place)
            if number == 1:
                remedy = "Continue with the same ones, choose another --out, or move the file away"
                changes = changed(entry["settings"], settings)
                refuse_changed(f"{self.path} holds an annotation", changes, remedy)
        if self._file.seek(0, os.SEEK_END) == 0:
            self.append([{"settings": settings}])

    def _note(self, entry: Mapping[str, Any], place: int) -> None:
        if "problem_id" in entry:  # the first line has none
            name = str(entry["problem_id"])
            self._places[name] = place
            (self._failed.add if "failed" in entry else self._failed.discard)(name)

    def __contains__(self, problem_id: object) -> bool:
        return str(problem_id) in self._places

    def is_answered(self, problem_id: str | int) -> bool:
        """Whether the last entry of a question has completions; a failure is no answer."""
        return problem_id in self and str(problem_id) not in self._failed

    def __getitem__(self, problem_id: str | int) -> dict[str, Any]:
        """Return the last entry of a question. Raises KeyError when there is none."""
        self._file.seek(self._places[str(problem_id)])
        return json.loads(self._file.readline())

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append entries; return when they are on the disk."""
        place = self._file.seek(0, os.SEEK_END)
        for entry in entries:
            self._note(entry, place)
            place += self._file.write(json_lines([entry]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def merge(self, parts: Iterable[Path], settings: Mapping[str, Any], names: Sequence[str | int]) -> None:
        """Move the entries of other journals here, in the order of `names`, and remove those files."""
        places = {str(name): place for place, name in enumerate(names)}
        with ExitStack() as open_parts:
            journals = [open_parts.enter_context(closing(Journal(part, settings))) for part in parts]
            found = [(places.get(name, len(places)), name, one) for one in journals for name in one._places]
            self.append(
                one[name]
                for _, name, one in sorted(found, key=lambda entry: entry[0])
                if not self.is_answered(name)
            )
        for one in journals:
            one.path.unlink()

    def close(self) -> None:
        """Close the file, which lets another process open it."""
        self._file.close()


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a RequestError: the path cannot be written."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error
