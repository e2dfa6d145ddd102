"""`video-r1 ask`: questions about one video or image, the reasoning shown as it is written; with `--contrast`
and `--samples` also how much of the answers hangs on the order of the frames.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from video_r1.console import table
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
    """Answers the settings' questions on standard output and returns the last answer in order.

    Of each question the first answer in order is written as it comes, and named again below it unless it
    ends with it. With contrasts or several samples a table follows: shares and intervals of all answers.

    Raises RequestError for a missing file, ConfigError for an unusable checkpoint, MediaError for an unusable
    file and PromptError for a prompt over the limit.
    """
    assert settings.question is not None  # settings without it are refused
    samples = [question_sample(settings, question) for question in settings.question]
    # After the file has been looked for: importing torch takes seconds.
    from video_r1.evaluation.session import ModelSession, sampling_of

    sampling, answer = sampling_of(settings), ""
    with closing(ModelSession(settings)) as interview:
        for number, sample in enumerate(samples):
            prompts = interview.prompts(sample, ["ordered", *settings.contrast])
            if len(samples) > 1:
                print(f"{chr(10) if number else ''}{sample.problem}")
            views = interview.ask(sample, prompts, settings.samples, sampling, _write_first)
            answer = _print_answer(sample, views[0])
            if len(views) > 1 or settings.samples > 1:
                print(f"\n{views_table(sample, views)}")
    return answer


def _write_first(prompt: int, piece: str) -> None:
    if prompt == 0:
        print(piece, end="", flush=True)


def _print_answer(sample: Sample, view: View) -> str:
    rollout = view.rollouts[0]
    answer = named_answer(sample, rollout.text)
    if not answer:
        print("\n\nNo answer was given.")
    elif rollout.text.rstrip().endswith(answer):  # it stands there already, as in an output without tags
        print()
    else:
        print(f"\n\nAnswer: {answer}")
    if rollout.finish_reason == "length":
        print(f"The output was cut off at {len(rollout.token_ids)} tokens (max_new_tokens).", file=sys.stderr)
    return answer


def views_table(sample: Sample, views: Sequence[View]) -> str:
    """The shares of each view with their 95 % intervals, and what was answered how often."""
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
    what = "right" if sample.answer else "as most in order"
    return table(("frames", what, "95 %", "in order minus this", "answers"), rows)


def question_sample(settings: AskSettings, question: str) -> Sample:
    """A question outside of any manifest; its solution is the settings' answer, "" for none.

    The first file's name says whether it is an image (a GIF counts as a video). Without a type, a question
    with options is multiple choice and any other free-form. Options without letters get them: "A. left".
    Raises RequestError when there is no such file.
    """
    from video_r1.data.manifests.records import Sample
    from video_r1.data.sources.media_paths import data_type_of

    assert settings.path is not None  # settings without it are refused
    path, *others = map(found_file, [settings.path, *settings.more_paths])
    options = labelled(settings.options)
    kind = settings.problem_type or ("multiple choice" if settings.options else "free-form")
    return Sample(
        problem_id=shorten(question, 60, placeholder=" …"),  # what its errors call it
        problem=question,
        data_type=data_type_of(path),
        problem_type=kind,
        solution=solution_of(settings.answer, kind, options),
        path=path,
        options=options,
        start=settings.start,
        end=settings.end,
        extra={} if settings.clip_fps is None else {"fps": settings.clip_fps},
        more_paths=tuple(others),
    )


def found_file(said: str) -> str:
    """The absolute path of a file of this machine, or an address. Raises RequestError when there is none."""
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
    """The solution of a row, "" without an answer. Raises RequestError for one of no such type."""
    if not answer:
        return ""
    read = read_answer(f"<answer>{answer}</answer>", kind, options)
    if not read:
        form = GROUNDING_FORMS.get(kind, "a number")
        wanted = f"one of the options, {', '.join(options)}" if options else form
        raise RequestError(f"answer is {answer!r}; it must be {wanted}")
    return f"<answer>{read}</answer>"


def named_answer(sample: Sample, output: str) -> str:
    """The answer in an output, tolerantly read; for multiple choice the whole option, "B. right"."""
    answer = read_answer(output, sample.problem_type, sample.options)
    named = [option for option in sample.options if option.lstrip("(")[:1].upper() == answer]
    return named[0] if sample.problem_type == "multiple choice" and named else answer


def labelled(options: Sequence[str]) -> tuple[str, ...]:
    """Options behind letters, as they are where they all have some. Raises RequestError for too many."""
    if all(_LABELLED.match(option) for option in options):
        return tuple(options)
    if len(options) > len(LETTERS):
        raise RequestError(f"{len(options)} options; at most {len(LETTERS)} can be lettered")
    return tuple(lettered(options))
