"""`video-r1 ask`: questions about one video or image, with the reasoning shown as it is written.

With `--contrast` and `--samples` it also shows how much the answers depend on the order of the frames.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from video_r1.console import table, tell
from video_r1.data.answers import LETTERS, lettered, read_answer
from video_r1.data.grounding import GROUNDING_FORMS
from video_r1.errors import RequestError
from video_r1.settings.decoding import AskSettings

if TYPE_CHECKING:
    from video_r1.data.manifests.records import Sample
    from video_r1.evaluation.session import View

_LABELLED = re.compile(r"\(?[A-Za-z][.):]\s*\S")
_ANSWERS_SHOWN = 4


def run_ask(settings: AskSettings) -> str:
    """Print the answers to the settings' questions; return the last ordered answer.

    Raises RequestError for a missing file, ConfigError for an unusable checkpoint, MediaError for an unusable
    file and PromptError for a prompt over the limit.
    """
    assert settings.question is not None  # settings without it are refused
    samples = [question_sample(settings, question) for question in settings.question]
    # The file is looked for first, because importing torch takes seconds.
    from video_r1.evaluation.session import ModelSession, sampling_of, verdict

    sampling, answer = sampling_of(settings), ""
    with closing(ModelSession(settings)) as session:
        for number, sample in enumerate(samples):
            prompts = session.prompts(sample, ["ordered", *settings.contrast])
            if len(samples) > 1:
                print(f"{chr(10) if number else ''}{sample.problem}")
            views = session.ask(sample, prompts, settings.samples, sampling, _write_first)
            answer = _print_answer(sample, views[0])
            if len(views) > 1 or settings.samples > 1:
                print(f"\n{views_table(sample, views)}\n{verdict(sample, views)}".rstrip())
    return answer


def _write_first(prompt: int, piece: str) -> None:
    if prompt == 0:
        print(piece, end="", flush=True)


def _print_answer(sample: Sample, view: View) -> str:
    rollout = view.rollouts[0]
    answer = named_answer(sample, rollout.text)
    if not answer:
        print("\n\nNo answer was given.")
    elif rollout.text.rstrip().endswith(answer):  # printed already
        print()
    else:
        print(f"\n\nAnswer: {answer}")
    if rollout.finish_reason == "length":
        tell(f"The output was cut off at {len(rollout.token_ids)} tokens (max_new_tokens).")
    return answer


def views_table(sample: Sample, views: Sequence[View]) -> str:
    """Return a table with each view's share, its 95 % interval, and its most frequent answers."""
    rows = []
    for view in views:
        counts = Counter(answer[:30] or "none" for answer in view.answers).most_common()
        said = [f"{answer} ×{count}" if count > 1 else answer for answer, count in counts[:_ANSWERS_SHOWN]]
        share, gap = view.share, view.gap
        rows.append((
            view.prompt.order,
            f"{sum(view.counted)} of {len(view.counted)}",
            f"{share.low:.2f} to {share.high:.2f}",
            "" if gap is None else f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]",
            ", ".join([*said, "…"] if len(counts) > _ANSWERS_SHOWN else said),
        ))  # fmt: skip
    what = "right" if sample.answer else "as the ordered majority"
    return table(("frames", what, "95 %", "ordered minus this", "answers"), rows)


def question_sample(settings: AskSettings, question: str, is_text: bool = False) -> Sample:
    """Return a sample for a question that is in no manifest; its solution is the settings' answer or "".

    is_text: the question is about no file. The default type is multiple choice with options, else free-form.
    Raises RequestError for a missing file.
    """
    from video_r1.data.manifests.records import Sample
    from video_r1.data.sources.media_paths import data_type_of

    assert settings.path is not None  # settings without it are refused
    path, *others = [""] if is_text else map(found_file, [settings.path, *settings.more_paths])
    options = labelled(settings.options)
    kind = settings.problem_type or ("multiple choice" if settings.options else "free-form")
    return Sample(
        problem_id=shorten(question, 60, placeholder=" …"),  # its name in errors
        problem=question,
        data_type="text" if is_text else data_type_of(path),
        problem_type=kind,
        solution=solution_of(settings.answer, kind, options),
        path=path,
        options=options,
        start=settings.start,
        end=settings.end,
        extra={} if settings.clip_fps is None else {"fps": settings.clip_fps},
        more_paths=tuple(others),
        play=settings.play,
    )


def found_file(said: str) -> str:
    """Return the absolute path of a local file, or an address. Raises RequestError for a missing file."""
    if not said:
        raise RequestError("a path is empty; name a video, an image or a folder of frames")
    from video_r1.data.sources.archives import split_member
    from video_r1.data.sources.remote import local_file, on_this_machine

    path = on_this_machine(said)
    if (file := local_file(path)) is None:
        return path
    if not Path(file).exists():
        raise RequestError(f"{said}: no such file or folder of frames")
    inside, file = split_member(path), str(Path(file).resolve())
    return f"{inside[0]}::{file}" if inside else file


def solution_of(answer: str | None, kind: str, options: Sequence[str]) -> str:
    """Return an answer as a row's solution, "" for none. Raises RequestError if the type forbids it."""
    if not answer:
        return ""
    read = read_answer(f"<answer>{answer}</answer>", kind, options)
    if not read:
        form = GROUNDING_FORMS.get(kind, "a number")
        wanted = f"one of the options, {', '.join(options)}" if options else form
        raise RequestError(f"answer is {answer!r}; it must be {wanted}")
    return f"<answer>{read}</answer>"


def named_answer(sample: Sample, output: str) -> str:
    """Return the answer in an output, parsed tolerantly; for multiple choice the whole option, "B. right"."""
    answer = read_answer(output, sample.problem_type, sample.options)
    named = [option for option in sample.options if option.lstrip("(")[:1].upper() == answer]
    return named[0] if sample.problem_type == "multiple choice" and named else answer


def labelled(options: Sequence[str]) -> tuple[str, ...]:
    """Return the options with letters; keep them if all have some. Raises RequestError for too many."""
    if all(_LABELLED.match(option) for option in options):
        return tuple(options)
    if len(options) > len(LETTERS):
        raise RequestError(f"{len(options)} options; at most {len(LETTERS)} are supported")
    return tuple(lettered(options))
