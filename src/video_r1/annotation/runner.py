"""`video-r1 annotate`: rationales by a teacher, filtered into a manifest for SFT.

    manifest ─► Teacher ─► journal ─► judge ─► OUT (kept)
                (ahead of it by a bounded     └► OUT.rejected.jsonl (the others, with the reason)
                 number of questions)

The journal has what the teacher wrote; both other files follow from it and the filters' settings alone, in
the manifest's order. So the filters can be changed afterwards without asking the teacher again, and it does
not matter where a run was interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from video_r1.annotation.filters import FILTERS, rationale_of
from video_r1.annotation.journal import Journal, replaced
from video_r1.annotation.judging import Rules, Verdict, judge
from video_r1.annotation.teachers import Answered, Question, Teacher
from video_r1.data.records import Sample
from video_r1.errors import RequestError
from video_r1.progress import progress
from video_r1.rollout.chat import Completion
from video_r1.tables import table

FAILURES = ("media", "prompt", "endpoint")
"""Kinds of questions without rationales; see `teachers.Failed`."""


def annotate(
    samples: Sequence[Sample],
    open_teacher: Callable[[], Teacher],
    out: Path,
    *,
    media_root: str | Path,
    rules: Rules,
    settings: Mapping[str, Any],
) -> Counts:
    """Has the teacher answer what the journal has no answer to, then writes the manifest for SFT.

    out: the manifest for SFT (.json or .jsonl); OUT.journal.jsonl and OUT.rejected.jsonl, without its ending,
    stand beside it. media_root: what the rows' paths are relative to. settings: what the teacher's answers
    depend on, JSON values by name; one that was begun with others is refused. open_teacher is called
    when there is a question without an answer. Returns the counts. Raises RequestError, also when the journal
    cannot be continued or `out` is another file, and what the teacher raises; the journal then has all
    answers that were there.
    """
    path = out.with_name(f"{out.stem}.journal.jsonl")
    if out.exists() and not path.exists():
        raise RequestError(f"{out} exists and was not written by an annotation; choose another --out")
    with closing(Journal(path, settings)) as journal:
        if open_questions(samples, journal, batch_size=1):
            teacher = open_teacher()
            try:
                ask(samples, teacher, journal, rules)
            except KeyboardInterrupt:
                print(
                    f"\nthe answers so far are in {journal.path}; the same command continues", file=sys.stderr
                )
                raise
            finally:
                teacher.close()
        return write(samples, journal, out, media_root, rules)


def open_questions(samples: Sequence[Sample], journal: Journal, batch_size: int) -> list[Question]:
    """The batches that have a question without an answer, in the manifest's order. A failure is no answer."""
    done = [journal.is_answered(sample.problem_id) for sample in samples]
    questions = []
    for start in range(0, len(samples), batch_size):
        batch = range(start, min(start + batch_size, len(samples)))
        if not all(done[place] for place in batch):
            questions += [Question(place, samples[place], done[place]) for place in batch]
    return questions


def ask(samples: Sequence[Sample], teacher: Teacher, journal: Journal, rules: Rules) -> None:
    """Has the teacher answer every open question; shows the share that passes the filters as it goes."""
    questions = open_questions(samples, journal, teacher.batch_size)
    count = sum(not question.done for question in questions)
    if count < len(samples):
        print(f"{len(samples) - count} of {len(samples)} questions are answered already", file=sys.stderr)
    answered = kept = failed = 0
    with closing(teacher.answers(questions)) as answers, progress(count, "annotating", "questions") as bar:
        for finished in answers:
            journal.append(entry(one) for one in finished)
            for one in finished:
                if isinstance(one.outcome, list):
                    answered += 1
                    kept += judge(one.sample, one.outcome, rules).kept is not None
                else:
                    failed += 1
            figures = {"kept": f"{kept / answered:.0%}"} if answered else {}
            bar.update(len(finished), **figures, **({"failed": str(failed)} if failed else {}))


def entry(answered: Answered) -> dict[str, Any]:
    """A line of the journal."""
    outcome = answered.outcome
    if isinstance(outcome, list):
        said: dict[str, Any] = {"completions": [completion._asdict() for completion in outcome]}
    else:
        said = {"failed": outcome.kind, "reason": outcome.reason}
    return {"problem_id": answered.sample.problem_id, **said}


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
        failures = [name for name in FAILURES if self.questions[name]]
        for name in ("kept", *FILTERS, *failures):
            label = f"not asked: {name}" if name in ("media", "prompt") else name
            label = "not answered" if name == "endpoint" else label
            count = self.questions[name]
            drawn = "" if name in FAILURES else f"{self.rationales[name]:,}"
            rows.append((label, f"{count:,}", f"{count / total:.1%}", drawn))
        rows.append(("all", f"{self.questions.total():,}", "", f"{self.rationales.total():,}"))
        return table(("", "questions", "share", "rationales"), rows)


def write(
    samples: Sequence[Sample], journal: Journal, out: Path, media_root: str | Path, rules: Rules
) -> Counts:
    """Judges all answers in the journal and writes both files, each in one step, in the manifest's order."""
    root = os.path.realpath(media_root)
    counts = Counts()
    with replaced(out) as kept_file, replaced(out.with_name(f"{out.stem}.rejected.jsonl")) as rejected_file:
        rows = _Rows(kept_file, as_list=out.suffix == ".json")
        for sample in samples:
            if sample.problem_id not in journal:
                continue
            found = journal[sample.problem_id]
            if "failed" in found:
                counts.questions[found["failed"]] += 1
                _write_line(rejected_file, rejected_row(sample, found["failed"], found["reason"]))
                continue
            completions = [Completion(**completion) for completion in found["completions"]]
            verdict = judge(sample, completions, rules)
            counts.questions[verdict.reason or "kept"] += 1
            counts.rationales.update(one.rejected or "kept" for one in verdict.judged)
            if verdict.kept is None:
                _write_line(rejected_file, rejected_row(sample, verdict.reason, "", completions, verdict))
            else:
                rows.write(kept_row(sample, completions[verdict.kept], verdict, root))
        rows.end()
    return counts


def kept_row(sample: Sample, completion: Completion, verdict: Verdict, root: str) -> dict[str, Any]:
    """A row of the manifest for SFT: the sample's own, with the teacher's rationale as `process`.

    `solution` stays the manifest's. `annotation` says how the teacher's answer scored, and how many of its
    rationales passed.
    """
    assert verdict.kept is not None  # the caller asks for kept ones only
    is_url = sample.path.startswith(("http://", "https://"))
    row: dict[str, Any] = {
        "problem_id": sample.problem_id,
        "problem": sample.problem,
        "data_type": sample.data_type,
        "problem_type": sample.problem_type,
        "options": list(sample.options),
        "process": f"<think>{rationale_of(completion.text)}</think>",
        "solution": sample.solution,
        "path": sample.path if is_url else os.path.relpath(sample.path, root),
        "data_source": sample.data_source,
    }
    row |= {name: time for name, time in (("start", sample.start), ("end", sample.end)) if time is not None}
    judged = verdict.judged
    return {
        **row,
        **sample.extra,
        "annotation": {
            "answer": judged[verdict.kept].answer,
            "score": round(judged[verdict.kept].score, 4),
            "passed": sum(not one.rejected for one in judged),
            "samples": len(judged),
        },
    }


def rejected_row(
    sample: Sample,
    reason: str,
    detail: str,
    completions: Sequence[Completion] = (),
    verdict: Verdict | None = None,
) -> dict[str, Any]:
    """A line about a rejected question: why, and each of its rationales with the filter that stopped it."""
    rationales = [
        {
            **completion._asdict(),
            "answer": one.answer,
            "score": one.score,
            "rejected": one.rejected,
            "detail": one.detail,
        }
        for completion, one in zip(completions, verdict.judged if verdict else (), strict=True)
    ]
    row = {"problem_id": sample.problem_id, "reason": reason, "detail": detail, "truth": sample.answer}
    return {name: value for name, value in row.items() if value != ""} | {"rationales": rationales}


class _Rows:
    """Rows one after the other, as JSON lines or as a JSON list with a row on each line."""

    def __init__(self, file: TextIO, as_list: bool) -> None:
        self.file, self.as_list, self.count = file, as_list, 0

    def write(self, row: Mapping[str, Any]) -> None:
        if self.as_list:
            self.file.write(",\n" if self.count else "[\n")
            self.file.write(json.dumps(row, ensure_ascii=False))
        else:
            _write_line(self.file, row)
        self.count += 1

    def end(self) -> None:
        if self.as_list:
            self.file.write("\n]\n" if self.count else "[]\n")


def _write_line(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
