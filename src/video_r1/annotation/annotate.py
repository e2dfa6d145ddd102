"""`video-r1 annotate`: rationales written by a teacher, filtered into a manifest for SFT.

    manifest ─► Teacher ─► journal ─► judge ─► OUT (kept)
                                          └──► OUT.rejected.jsonl (the others, with the reason)

OUT and OUT.rejected.jsonl follow from the journal and the filters' settings alone, in the manifest's order:
filters can be changed without asking again, and an interruption leaves no trace. Each rank has its own
teacher and journal (part-<rank>.OUT.journal.jsonl), which rank 0 merges at the end or when a run continues.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from video_r1.annotation.filters import FILTERS, Verdict, judge, rationale_of
from video_r1.annotation.teachers import Answered, EndpointTeacher, EngineTeacher
from video_r1.chat_client import Completion, Endpoint, endpoint_urls, open_endpoint
from video_r1.console import table, tell
from video_r1.data.decoding.frame_cache import media_state, open_frame_cache
from video_r1.data.manifests.records import Sample, load_manifest, manifest_row, samples_digest
from video_r1.data.reading import Reader
from video_r1.data.sources.media_paths import media_root_of
from video_r1.data.templates import load_template
from video_r1.errors import RequestError, VideoR1Error, writing_to
from video_r1.evaluation.question_loop import CLIP_FIELDS, changed_media, engine_facts, own_file, run_share
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
from video_r1.recipe import plain
from video_r1.settings.decoding import AnnotateSettings, TeacherSettings
from video_r1.settings.frames import FrameBudget

Found = TypeVar("Found")
KEEP = "Continue with the same ones, choose another --out, or move the file away"

# Kinds of questions without rationales, and their names in the table.
FAILURES = {"media": "not asked: media", "prompt": "not asked: prompt", "endpoint": "not answered"}
_DRAWN_WITH = (
    "fps", "min_frames", "max_frames", "frame_pixels", "image_pixels",
    "samples", "temperature", "top_p", "max_new_tokens", "seed", "frames_as", "request_fields",
)  # fmt: skip


class Counts(NamedTuple):
    """Numbers of questions and of rationales by outcome: "kept", one of FILTERS or one of FAILURES."""

    questions: Counter[str]
    rationales: Counter[str]

    def table(self) -> str:
        total = self.questions.total()
        rows = []
        for name in ("kept", *FILTERS, *FAILURES):
            count = self.questions[name]
            if count or name not in FAILURES:
                drawn = "" if name in FAILURES else f"{self.rationales[name]:,}"
                rows.append((FAILURES.get(name, name), f"{count:,}", f"{count / total:.1%}", drawn))
        rows.append(("all", f"{total:,}", "", f"{self.rationales.total():,}"))
        return table(("", "questions", "share", "rationales"), rows)


def run_annotate(settings: AnnotateSettings) -> Counts:
    """Annotate a manifest, print the table and return the counts.

    Raises ManifestError, ConfigError, RequestError (also for a journal made with other settings and an OUT
    that no annotation has written), and VideoR1Error when the teacher fails, nothing is kept, or another rank
    is lost; all answers so far are then in the journal.
    """
    assert settings.manifest is not None and settings.out is not None
    manifest, out = settings.manifest, Path(settings.out)
    with process_group(out.parent), writing_to(out):
        samples = decided_by_first(lambda: load_manifest(manifest, **settings.manifest_options()))
        counts = answered(settings, samples, partial(_write, settings))
        root = media_root_of(manifest, settings.media_root)
        print(f"{counts.table()}\n\nmanifest for SFT: {out}; its media root is {root}")
        print(f"rejected, with the reason: {rejected_path(out)}")
        if counts.questions["endpoint"]:
            count = f"{counts.questions['endpoint']:,}"
            print(f"{count} questions were not answered; run the same command to ask again")
        if not counts.questions["kept"]:
            raise VideoR1Error(f"no rationale was kept; {rejected_path(out)} has the reasons")
        return counts


def answered(
    settings: TeacherSettings,
    samples: Sequence[Sample],
    finish: Callable[[Sequence[Sample], "Journal"], Found],
) -> Found:
    """Ask the teacher what OUT's journal has no answer to; return rank 0's `finish(samples, journal)`.

    samples: cut to `limit`. Call it within `process_group`. Raises as `run_annotate`.
    """
    assert settings.teacher is not None and settings.out is not None
    teacher, out = settings.teacher, Path(settings.out)
    path = out.with_name(f"{out.stem}.journal.jsonl")
    drawn_with = {"teacher": teacher, **drawing(settings, samples)}
    open_teacher: Callable[[], EndpointTeacher | EngineTeacher] = partial(_local_teacher, settings)
    if settings.at_endpoint:
        key = os.environ.get(settings.key_variable)
        endpoint = Endpoint(endpoint_urls(teacher), key, settings.timeout, settings.wait)
        name, frames_as = open_endpoint(endpoint, settings.model, settings.frames_as)
        drawn_with |= {"teacher": name, "frames_as": frames_as}
        open_teacher = partial(EndpointTeacher, settings, endpoint, name, frames_as)
    samples, budget = samples[: settings.limit], settings.frame_budget(1)
    journals: list[Journal] = []  # rank 0 has it
    with ExitStack() as opened:

        def begin() -> set[str | int]:
            if out.exists() and not path.exists():
                raise RequestError(f"{out} exists and was not written by an annotation; choose another --out")
            journals.append(opened.enter_context(closing(Journal(path, drawn_with))))
            journals[0].merge(parts_of(path), drawn_with)
            states = {one.problem_id: journals[0].media(one.problem_id) for one in samples}
            refuse_changed(f"{path} holds an annotation", changed_media(samples, states, budget), KEEP)
            return {one.problem_id for one in samples if journals[0].is_answered(one.problem_id)}

        def end() -> Found:
            journals[0].merge(parts_of(path), drawn_with)
            return finish(samples, journals[0])

        done = decided_by_first(begin)
        if len(done) < len(samples):
            if done and process_index() == 0:
                tell(f"{len(done)} of {len(samples)} questions are answered already")
            asked = opened.enter_context(closing(open_teacher()))  # closed last: see process_group
            size = 1 if isinstance(asked, EndpointTeacher) else settings.batch_size
            batches = [samples[at : at + size] for at in range(0, len(samples), size)]
            alone = process_count() == 1
            own = nullcontext(journals[0]) if alone else closing(Journal(own_file(path), drawn_with))
            try:
                with own as journal:
                    run_share(
                        [batch for batch in batches if any(one.problem_id not in done for one in batch)],
                        lambda batch: sum(one.problem_id not in done for one in batch),
                        lambda share: _record(asked.answers(share, done), journal, budget),
                        "asking",
                    )
            except KeyboardInterrupt as stop:
                raise Interrupted(number_of(stop), f"the answers so far are in {path}") from stop
            wait_for_everyone()
        return decided_by_first(end)


def drawing(settings: TeacherSettings, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the settings that the teacher's answers depend on besides the teacher (see fingerprint.py)."""
    fields = [*CLIP_FIELDS, "problem", "problem_type", "options", "messages"]
    return {
        "manifest": samples_digest(samples, [*fields, *(["subtitles"] if settings.subtitles else [])]),
        "prompt_template": digest(asdict(load_template(settings.prompt_template, settings.subtitles))),
        **({"engine": "endpoint"} if settings.at_endpoint else engine_facts(settings, settings.teacher)),
        **plain({name: getattr(settings, name) for name in _DRAWN_WITH}),
        **settings.tool_values(),
    }


def _local_teacher(settings: TeacherSettings) -> EngineTeacher:
    from video_r1.rollout.engine_factory import open_engine, open_prompts

    decoding = copy(settings)
    decoding.model = settings.teacher
    builder, budget = open_prompts(decoding)
    cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
    engine = open_engine(decoding, builder)
    return EngineTeacher(engine, builder, Reader(budget, cache, settings.workers), settings)


def _record(answers: Generator[list[Answered]], journal: "Journal", budget: FrameBudget) -> Generator[int]:
    """Append the answers to the journal as they come; yield their number."""
    with closing(answers):
        for finished in answers:
            journal.append(
                {"problem_id": sample.problem_id, "media": media_state(sample, budget), **entry}
                for sample, entry in finished
            )
            yield len(finished)


def rejected_path(out: str | Path) -> Path:
    return Path(out).with_name(f"{Path(out).stem}.rejected.jsonl")


def _write(settings: AnnotateSettings, samples: Sequence[Sample], journal: "Journal") -> Counts:
    """Judge all answers in the journal and write both files, each in one step, in the manifest's order."""
    assert settings.manifest is not None and settings.out is not None
    out, root = Path(settings.out), media_root_of(settings.manifest, settings.media_root)
    counts = Counts(Counter(), Counter())
    with writing_rows(out) as keep, writing_rows(rejected_path(out)) as reject:
        for sample in samples:
            if sample.problem_id not in journal:
                continue
            entry = journal[sample.problem_id]
            completions = entry.get("completions", [])
            if "failed" in entry:
                verdict = Verdict(None, entry["failed"], [])
            else:
                verdict = judge(sample, [Completion(**each) for each in completions], settings)
            if verdict.kept is not None:
                chosen, text = verdict.judged[verdict.kept], completions[verdict.kept]["text"]
                row = manifest_row(replace(sample, work=()), root)
                if work := completions[verdict.kept].get("work"):
                    row["messages"] = [*sample.messages, *work]
                row |= {
                    "process": f"<think>{rationale_of(text)}</think>",
                    "annotation": {
                        "answer": chosen.answer,
                        "score": round(chosen.score, 4),
                        "passed": sum(not one.rejected for one in verdict.judged),
                        "samples": len(verdict.judged),
                    },
                }
                keep(row)
            else:
                detail = {"detail": entry["reason"]} if "reason" in entry else {}
                judged = zip(completions, verdict.judged, strict=True)
                rationales = [{**completion, **one._asdict()} for completion, one in judged]
                row = {"problem_id": sample.problem_id, "reason": verdict.reason, **detail}
                reject({**row, "truth": sample.answer, "rationales": rationales})
            counts.questions[verdict.reason or "kept"] += 1
            counts.rationales.update(one.rejected or "kept" for one in verdict.judged)
    return counts


class Journal:
    """Every answer of the teacher as a JSON line: `problem_id` and `completions`, or `failed` and `reason`.

    The first line holds the settings that the answers depend on. A last line that was cut off is removed when
    the journal is opened; a later line about a question replaces an earlier one. Raises RequestError when the
    file holds answers made with other settings, is not a journal, or is being written by another process.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._entries: dict[str, tuple[int, bool]] = {}  # byte offset of the last line, is it an answer
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", opener=without_links)  # noqa: SIM115
        try:
            lock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(settings)
        except BaseException as error:  # nobody else can close the file
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise RequestError(
                f"{path} is being written by another process; wait for it, or stop it"
            ) from error

    def _read(self, settings: Mapping[str, Any]) -> None:
        for number, place, entry in whole_lines(self._file):
            if entry is None or ("settings" if number == 1 else "problem_id") not in entry:
                raise RequestError(
                    f"{self.path}, line {number} does not belong to an annotation's journal; move the file "
                    "away, or choose another --out"
                )
            self._note(entry, place)
            if number == 1:
                changes = changed(entry["settings"], settings)
                refuse_changed(f"{self.path} holds an annotation", changes, KEEP)
        if self._file.seek(0, os.SEEK_END) == 0:
            self.append([{"settings": settings}])

    def __contains__(self, problem_id: object) -> bool:
        return str(problem_id) in self._entries

    def is_answered(self, problem_id: str | int) -> bool:
        """Return whether the last entry of a question has completions; a failure is no answer."""
        return self._entries.get(str(problem_id), (0, False))[1]

    def media(self, problem_id: str | int) -> str:
        """Return the state of the media when the question was answered; "" without an answer."""
        return self[problem_id].get("media", "") if self.is_answered(problem_id) else ""

    def __getitem__(self, problem_id: str | int) -> dict[str, Any]:
        self._file.seek(self._entries[str(problem_id)][0])
        return json.loads(self._file.readline())

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append entries and flush them to the disk."""
        place = self._file.seek(0, os.SEEK_END)
        for entry in entries:
            self._note(entry, place)
            place += self._file.write(json_lines([entry]))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _note(self, entry: Mapping[str, Any], place: int) -> None:
        if "problem_id" in entry:  # the first line has none
            self._entries[str(entry["problem_id"])] = place, "failed" not in entry

    def merge(self, parts: Iterable[Path], settings: Mapping[str, Any]) -> None:
        """Move the entries of other journals here and remove those files."""
        for part in parts:
            with closing(Journal(part, settings)) as journal:
                self.append(journal[name] for name in journal._entries if not self.is_answered(name))
            part.unlink()

    def close(self) -> None:
        self._file.close()
