"""`video-r1 ask`: one question about one video or image, the reasoning shown as it is written."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from video_r1.data.answers import LETTERS, lettered, read_answer
from video_r1.errors import RequestError
from video_r1.settings.decoding import AskSettings

if TYPE_CHECKING:
    from video_r1.data.prompts import Prompt
    from video_r1.data.records import Sample
    from video_r1.data.rollouts import Rollout
    from video_r1.rollout.engine import RolloutEngine, SamplingSettings

_LABELLED = re.compile(r"\(?[A-Za-z][.):]\s*\S")


def run_ask(settings: AskSettings) -> str:
    """Answers the settings' question on standard output and returns the answer.

    The answer is named again below the output unless the output ends with it.

    Raises RequestError for a missing file, ConfigError for an unusable checkpoint, MediaError for an unusable
    file and PromptError for a prompt over the limit.
    """
    sample = question_sample(settings)
    # After the file has been looked for: importing torch takes seconds.
    from video_r1.data.frame_cache import open_frame_cache, read_cached
    from video_r1.rollout.choice import open_engine, open_prompts
    from video_r1.rollout.engine import SamplingSettings

    processor, builder, budget = open_prompts(settings)
    cache = open_frame_cache(settings.frame_cache, settings.frame_cache_gb)
    prompt = builder.build(sample, read_cached(sample, budget, cache))
    sampling = replace(SamplingSettings.of(settings), seed=settings.seed)
    with closing(open_engine(settings, processor)) as engine:
        stream = TextStream(builder.tokenizer, partial(print, end="", flush=True))
        rollout = ask(engine, stream, prompt, sampling)
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


def question_sample(settings: AskSettings) -> Sample:
    """A question outside of any manifest; it has no solution.

    The file's name says whether it is an image (a GIF counts as a video). Without a type, a question with
    options is multiple choice and any other free-form. Options without letters get them: "A. left".
    Raises RequestError when there is no such file.
    """
    from video_r1.data.places import data_type_of
    from video_r1.data.records import Sample
    from video_r1.data.remote import is_address, on_this_machine

    assert settings.path is not None and settings.question is not None  # settings without them are refused
    path = on_this_machine(settings.path)
    if not is_address(path) and not Path(path).is_file():
        raise RequestError(f"{settings.path}: no such file")
    return Sample(
        problem_id=shorten(settings.question, 60, placeholder=" …"),  # what its errors call it
        problem=settings.question,
        data_type=data_type_of(path),
        problem_type=settings.problem_type or ("multiple choice" if settings.options else "free-form"),
        solution="",
        path=path if is_address(path) else str(Path(path).resolve()),
        options=_labelled(settings.options),
        start=settings.start,
        end=settings.end,
    )


def ask(engine: RolloutEngine, stream: TextStream, prompt: Prompt, sampling: SamplingSettings) -> Rollout:
    """Puts one question to a model; the stream is given the output piece by piece, all of it once.

    An engine whose `generate` takes `on_token` is heard token by token, any other at its end.
    """
    generate: Any = engine.generate
    if "on_token" in inspect.signature(generate).parameters:
        groups = generate([prompt], sampling, on_token=lambda prompt, completion, token: stream.add(token))
    else:
        groups = generate([prompt], sampling)
    rollout = groups[0][0]
    stream.close(rollout.text)
    return rollout


class TextStream:
    """Turns tokens into text as they come; a character that is still incomplete waits for its next token."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._token_ids: list[int] = []
        self._written = 0  # characters

    def add(self, token_id: int) -> None:
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.close(text)

    def close(self, text: str) -> None:
        """Writes what of the whole `text` is not written yet."""
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


def named_answer(sample: Sample, output: str) -> str:
    """The answer in an output, tolerantly read; for multiple choice the whole option, "B. right"."""
    answer = read_answer(output, sample.problem_type, sample.options)
    named = [option for option in sample.options if option.lstrip("(")[:1].upper() == answer]
    return named[0] if sample.problem_type == "multiple choice" and named else answer


def _labelled(options: Sequence[str]) -> tuple[str, ...]:
    if all(_LABELLED.match(option) for option in options):
        return tuple(options)
    if len(options) > len(LETTERS):
        raise RequestError(f"{len(options)} options; at most {len(LETTERS)} can be lettered")
    return tuple(lettered(options))
