"""`video-r1 annotate`: rationales by a teacher, filtered into a manifest for SFT.

    manifest ─► Teacher ─► journal ─► judge ─► OUT (kept)
                (ahead of it by a bounded     └► OUT.rejected.jsonl (the others, with the reason)
                 number of questions)

The journal has what the teacher wrote; both other files follow from it and the filters' settings alone, in
the manifest's order. So the filters can be changed afterwards without asking the teacher again, and it does
not matter where a run was interrupted.

Several processes share the questions, each with a teacher and a journal of its own
(part-<process>.OUT.journal.jsonl). The first one takes these into OUT's journal: at the end, or when a run
that was killed is continued, by however many processes.
"""

import fcntl
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from video_r1.annotation.filters import FILTERS, Verdict, judge, rationale_of
from video_r1.annotation.teachers import (
    EndpointTeacher,
    EngineTeacher,
    Teacher,
    TeacherAnswer,
    TeacherRequest,
)
from video_r1.chat_client import Completion, Endpoint, endpoint_urls, open_endpoint
from video_r1.console import Progress, table
from video_r1.data.decoding.frame_cache import open_frame_cache
from video_r1.data.manifests.records import FIELDS, Sample, load_manifest
from video_r1.data.reading import Reader
from video_r1.data.sources.media_paths import media_root_of, path_below
from video_r1.data.templates import load_template
from video_r1.errors import RequestError, VideoR1Error, writing_to
from video_r1.files import json_lines, lock, part_of, parts_of, whole_lines, without_links, writing_rows
from video_r1.fingerprint import changed, digest, refuse_changed
from video_r1.processes import (
    Interrupted,
    decided_by_first,
    number_of,
    own_share,
    process_count,
    process_group,
    process_index,
    wait_for_everyone,
)
from video_r1.settings.annotation import AnnotateSettings


class Journal:
    """One question a line: `problem_id` and either `completions` or `failed` and `reason`.

    path: the file; settings: JSON values by name. Raises RequestError when the file holds answers to other
    settings, is no journal, is being written by another process, or cannot be opened.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._places: dict[str, int] = {}
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
        except BaseException:  # whatever it was: nobody else has the file to close it
            self._file.close()
            raise

    def _read(self, settings: Mapping[str, Any]) -> None:
        """Finds the place of every line, or begins the file."""
        for number, place, entry in whole_lines(self._file):
            if entry is None or ("settings" if number == 1 else "problem_id") not in entry:
                raise RequestError(
                    f"{self.path}, line {number} is none of an annotation's journal; move the file away, or "
                    "choose another --out"
                )
            self._note(entry, place)
            if number == 1:
                remedy = "Continue with the same ones, choose another --out, or move the file away"
                changes = changed(entry["settings"], settings)
                refuse_changed(f"{self.path} holds an annotation", changes, remedy)
        if self._file.seek(0, os.SEEK_END) == 0:
            self.append([{"settings": settings}])

    def _note(self, entry: Mapping[str, Any], place: int) -> None:
        if "problem_id" in entry:  # the first line has the settings
            name = str(entry["problem_id"])
            self._places[name] = place
            (self._failed.add if "failed" in entry else self._failed.discard)(name)

    def __contains__(self, problem_id: object) -> bool:
        return str(problem_id) in self._places

    @property
    def names(self) -> list[str]:
        """The questions that have an entry, in the order of their first ones."""
        return list(self._places)

    def is_answered(self, problem_id: str | int) -> bool:
        """Whether the last entry of a question has completions."""
        return problem_id in self and str(problem_id) not in self._failed

    def __getitem__(self, problem_id: str | int) -> dict[str, Any]:
        """The last entry of a question. KeyError when there is none."""
        self._file.seek(self._places[str(problem_id)])
        return json.loads(self._file.readline())

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries and returns when the disk has them."""
        place = self._file.seek(0, os.SEEK_END)
        for entry in entries:
            self._note(entry, place)
            place += self._file.write(json_lines([entry]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def take_up(self, parts: Iterable[Path], settings: Mapping[str, Any], names: Sequence[str | int]) -> None:
        """Moves the entries of other journals here, in the order of `names`, and removes those files.

        Raises RequestError as a Journal of theirs does.
        """
        places = {str(name): place for place, name in enumerate(names)}
        with ExitStack() as closing_parts:
            opened = [closing_parts.enter_context(closing(Journal(part, settings))) for part in parts]
            found = [(places.get(name, len(places)), name, one) for one in opened for name in one.names]
            self.append(
                one[name]
                for _, name, one in sorted(found, key=lambda entry: entry[0])
                if not self.is_answered(name)
            )
        for one in opened:
            one.path.unlink()

    def close(self) -> None:
        """Closes the file, which lets another process open it."""
        self._file.close()


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """An OSError inside becomes a RequestError: the path cannot be written."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror or error}") from error


FAILURES = {"media": "not asked: media", "prompt": "not asked: prompt", "endpoint": "not answered"}
"""Kinds of questions without rationales (see `teachers.Failed`), and what the table calls them."""


def rejected_path(out: str | Path) -> Path:
    return Path(out).with_name(f"{Path(out).stem}.rejected.jsonl")


class Counts:
    """What became of the questions and of the rationales: "kept", a filter of FILTERS, or one of FAILURES."""

    def __init__(self) -> None:
        self.questions: Counter[str] = Counter()
        self.rationales: Counter[str] = Counter()

    def table(self) -> str:
        """The closing table: every filter with its counts. A rejected question counts under the filter that
        stopped the rationale that came furthest; of a question's rationales all that pass are counted."""
        total = max(1, self.questions.total())
        rows = []
        for name in ("kept", *FILTERS, *FAILURES):
            count = self.questions[name]
            if count or name not in FAILURES:
                drawn = "" if name in FAILURES else f"{self.rationales[name]:,}"
                rows.append((FAILURES.get(name, name), f"{count:,}", f"{count / total:.1%}", drawn))
        rows.append(("all", f"{self.questions.total():,}", "", f"{self.rationales.total():,}"))
        return table(("", "questions", "share", "rationales"), rows)


def annotate(
    samples: Sequence[Sample],
    open_teacher: Callable[[], Teacher],
    settings: AnnotateSettings,
    drawn_with: Mapping[str, Any],
) -> Counts:
    """Has the teacher answer what the journal has no answer to, then writes the manifest for SFT.

    Beside the manifest OUT stand OUT.journal.jsonl and OUT.rejected.jsonl, without its ending. drawn_with:
    what the teacher's answers depend on, JSON values by name; one that was begun with others is refused.
    open_teacher is called when there is a question without an answer. Every process of the command calls
    this and has the counts that it returns. Raises RequestError, also when the journal cannot be continued or
    OUT is another file, and what the teacher raises; the journal then has all answers that were there.
    """
    assert settings.out is not None
    out = Path(settings.out)
    path = out.with_name(f"{out.stem}.journal.jsonl")
    names = [sample.problem_id for sample in samples]
    with ExitStack() as opened:
        journals: list[Journal] = []  # the first process has it

        def begin() -> list[bool]:
            if out.exists() and not path.exists():
                raise RequestError(f"{out} exists and was not written by an annotation; choose another --out")
            journals.append(opened.enter_context(closing(Journal(path, drawn_with))))
            journals[0].take_up(parts_of(path), drawn_with, names)
            return [journals[0].is_answered(name) for name in names]

        def finish() -> Counts:
            journals[0].take_up(parts_of(path), drawn_with, names)
            return write(samples, journals[0], settings)

        done = decided_by_first(begin)
        if not all(done):
            teacher = opened.enter_context(closing(open_teacher()))  # closed last: see process_group
            try:
                with own_journal(path, drawn_with, journals) as own:
                    ask(samples, done, teacher, own, settings)
            except KeyboardInterrupt as stop:
                raise Interrupted(number_of(stop), f"the answers so far are in {path}") from stop
            wait_for_everyone()
        return decided_by_first(finish)


def own_journal(
    path: Path, drawn_with: Mapping[str, Any], journals: list[Journal]
) -> AbstractContextManager[Journal]:
    """Where this process writes its answers: the only one into the journal, others into a part of it."""
    if process_count() == 1:
        return nullcontext(journals[0])
    return closing(Journal(part_of(path, process_index()), drawn_with))


def open_questions(samples: Sequence[Sample], done: Sequence[bool], batch_size: int) -> list[TeacherRequest]:
    """This process's share of the batches that have a question without an answer, in the manifest's order. A
    failure is no answer."""
    batches = [
        range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)
    ]
    own = own_share([batch for batch in batches if not all(done[place] for place in batch)])
    return [TeacherRequest(place, samples[place], done[place]) for batch in own for place in batch]


def ask(
    samples: Sequence[Sample],
    done: Sequence[bool],
    teacher: Teacher,
    journal: Journal,
    settings: AnnotateSettings,
) -> None:
    """Has the teacher answer this process's share of the questions that are not `done`; the first one shows
    the share of its own that passes the filters as it goes."""
    questions = open_questions(samples, done, teacher.batch_size)
    count = sum(not question.done for question in questions)
    quiet = process_index() > 0
    if any(done) and not quiet:
        print(f"{sum(done)} of {len(samples)} questions are answered already", file=sys.stderr)
    title = "annotating" if process_count() == 1 else f"annotating (process 1 of {process_count()})"
    answered = kept = failed = 0
    with (
        closing(teacher.answers(questions)) as answers,
        Progress(count, title, "questions", quiet=quiet) as bar,
    ):
        for finished in answers:
            journal.append(entry(one) for one in finished)
            for one in finished:
                if isinstance(one.outcome, list):
                    answered += 1
                    kept += judge(one.sample, one.outcome, settings).kept is not None
                else:
                    failed += 1
            figures = {"kept": f"{kept / answered:.0%}"} if answered else {}
            bar.update(len(finished), **figures, **({"failed": str(failed)} if failed else {}))


def entry(answered: TeacherAnswer) -> dict[str, Any]:
    """A line of the journal."""
    outcome = answered.outcome
    if isinstance(outcome, list):
        said: dict[str, Any] = {"completions": [completion._asdict() for completion in outcome]}
    else:
        said = {"failed": outcome.kind, "reason": outcome.reason}
    return {"problem_id": answered.sample.problem_id, **said}


def write(samples: Sequence[Sample], journal: Journal, settings: AnnotateSettings) -> Counts:
    """Judges all answers in the journal and writes both files, each in one step, in the manifest's order."""
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
                keep(kept_row(sample, completions[verdict.kept], verdict, root))
            else:
                reject(rejected_row(sample, completions, verdict, found.get("reason", "")))
            counts.questions[verdict.reason or "kept"] += 1
            counts.rationales.update(one.rejected or "kept" for one in verdict.judged)
    return counts


def kept_row(sample: Sample, completion: Completion, verdict: Verdict, root: str) -> dict[str, Any]:
    """A row of the manifest for SFT: the sample's own, with the teacher's rationale as `process`.

    `solution` stays the manifest's. `annotation` has the answer's score and how many rationales passed.
    """
    assert verdict.kept is not None  # the caller asks for kept ones only
    chosen = verdict.judged[verdict.kept]
    paths = [path_below(root, path) for path in sample.paths]
    row = {name: value for name in FIELDS if (value := getattr(sample, name)) is not None}
    return {
        **row,
        "process": f"<think>{rationale_of(completion.text)}</think>",
        "path": paths if len(paths) > 1 else paths[0],
        **sample.extra,
        "annotation": {
            "answer": chosen.answer,
            "score": round(chosen.score, 4),
            "passed": sum(not one.rejected for one in verdict.judged),
            "samples": len(verdict.judged),
        },
    }


def rejected_row(
    sample: Sample, completions: Sequence[Completion], verdict: Verdict, detail: str
) -> dict[str, Any]:
    """A line about a rejected question: why, and each of its rationales with the filter that stopped it."""
    row = {
        "problem_id": sample.problem_id,
        "reason": verdict.reason,
        "detail": detail,
        "truth": sample.answer,
    }
    rationales = [
        {**completion._asdict(), **one._asdict()}
        for completion, one in zip(completions, verdict.judged, strict=True)
    ]
    return {name: value for name, value in row.items() if value != ""} | {"rationales": rationales}


# What the teacher's answers depend on, beside the teacher, the manifest and the template.
DRAWN_WITH = (
    "fps", "min_frames", "max_frames", "frame_pixels", "image_pixels",
    "samples", "temperature", "top_p", "max_new_tokens", "seed", "frames_as", "request_fields",
)  # fmt: skip


def run_annotate(settings: AnnotateSettings) -> Counts:
    """Annotate a manifest, print the table and return the counts.

    The manifest, the journal and an endpoint are looked at before a model is loaded; no teacher is started
    when every question has its answer. Raises ManifestError, ConfigError, RequestError, and VideoR1Error when
    the teacher fails, nothing is kept, or another process of the annotation (by `accelerate launch`) is lost.
    """
    assert settings.manifest is not None and settings.teacher is not None and settings.out is not None
    with process_group(Path(settings.out).parent):
        return _annotate(settings, settings.manifest, settings.teacher, settings.out)


def _annotate(settings: AnnotateSettings, manifest: str, teacher: str, out: str) -> Counts:
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
        return local_teacher(settings)

    with writing_to(out):
        counts = annotate(samples[: settings.limit], open_teacher, settings, drawn_with)
    root = media_root_of(manifest, settings.media_root)
    print(f"{counts.table()}\n\nmanifest for SFT: {out}; its media root is {root}")
    print(f"rejected, with the reason: {rejected_path(out)}")
    if counts.questions["endpoint"]:
        print(f"{counts.questions['endpoint']:,} questions were not answered; the same command asks again")
    if not counts.questions["kept"]:
        raise VideoR1Error(f"no rationale was kept; {rejected_path(out)} has the reasons")
    return counts


def drawing(settings: AnnotateSettings, samples: list[Sample]) -> dict[str, Any]:
    """What the teacher's answers depend on, beside the teacher: answers with another are not mixed."""
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
        **{name: getattr(settings, name) for name in DRAWN_WITH},
    }


def local_teacher(settings: AnnotateSettings) -> Teacher:
    """A checkpoint, on the engine that the settings name."""
    from video_r1.rollout.engine_factory import open_engine, open_prompts

    decoding = copy(settings)
    decoding.model = settings.teacher
    processor, builder, budget = open_prompts(decoding)
    cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
    engine = open_engine(decoding, processor)
    return EngineTeacher(engine, builder, Reader(budget, cache, settings.workers), settings)
