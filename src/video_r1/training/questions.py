"""Order of the training questions; their media are read in the background.

No random state passes from step to step: the order of an epoch, the replacement of an unusable question and
the shuffled frame order are each drawn from a generator that is seeded by their purpose and place. A resumed
run therefore sees exactly what an uninterrupted one sees.
"""

import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from video_r1.data.answers import option_prefix
from video_r1.data.manifests.records import Sample
from video_r1.data.reading import Reader, Unusable, derived_generator, quarantined
from video_r1.errors import MediaError, PromptError, VideoR1Error
from video_r1.files import append_line, warn_once

Loaded = TypeVar("Loaded")
Content = TypeVar("Content")
QUARANTINE = "quarantine.jsonl"
MAX_DRAWS = 100
"""Unusable questions in a row after which training stops: then all media are missing."""


class Slot(NamedTuple):
    """A place in the stream of questions. `iteration` counts the updates on the same rollouts, from 0;
    `round` counts the earlier questions of this slot (`selection.select`).
    """

    epoch: int
    index: int
    iteration: int = 0
    round: int = 0


@dataclass(eq=False)
class EpochSlots(Dataset):
    """Slots of the current epoch, which the data loader sets; keys are (index, iteration)."""

    questions: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.questions

    def __getitem__(self, key: tuple[int, int]) -> Slot:
        return Slot(self.epoch, *key)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of an epoch, in order: `batch_size` questions each, `step_batches` of them (over all
    ranks) per optimizer step, each step repeated `iterations` times.

    The last step is filled up from the start of the epoch: questions do not depend on the number of ranks.
    """

    def __init__(self, questions: int, batch_size: int, step_batches: int = 1, iterations: int = 1) -> None:
        self.batch_size = batch_size
        self.drop_last = False
        self.iterations = iterations
        padding = -questions % (batch_size * step_batches)
        indices = [i % questions for i in range(questions + padding)]
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        self.steps = [batches[i : i + step_batches] for i in range(0, len(batches), step_batches)]

    def __len__(self) -> int:
        return self.iterations * sum(len(step) for step in self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            for iteration in range(self.iterations):
                for batch in step:
                    yield [(index, iteration) for index in batch]


@dataclass(frozen=True, slots=True)
class Ready(Generic[Content]):
    """A question whose media could be read. `skipped`: number of unusable questions drawn before it."""

    sample: Sample
    content: Content
    skipped: int
    slot: Slot


Reading = Future[Ready[Any]]
"""A question that is being read."""


@dataclass(eq=False)
class QuestionSource(Generic[Loaded, Content]):
    """Draws the question of each slot and reads it in the reader's threads.

    `load(sample)` reads the media, which are kept in memory until their tensors fill `cache_bytes`;
    `build(sample, loaded, generator)` makes the training input. If either raises MediaError or PromptError,
    the question is written to `quarantine` (JSON lines) once, unless its id is `listed` there already, and
    another question replaces it.
    """

    samples: Sequence[Sample]
    load: Callable[[Sample], Loaded]
    build: Callable[[Sample, Loaded, torch.Generator], Content]
    seed: int
    reader: Reader
    quarantine: Path
    cache_bytes: int = 0
    listed: Collection[str | int] = ()

    def __post_init__(self) -> None:
        self.kept: dict[int, Loaded] = {}
        self.kept_bytes = 0
        self.unusable: set[int] = set()
        self.lock = threading.Lock()
        self.order = lru_cache(maxsize=4)(partial(epoch_order, self.seed, self.samples))

    def submit(self, slot: Slot) -> Future[Ready[Content]]:
        """Start reading the slot's question; `result()` raises the errors of `ready`."""
        return self.reader.submit(self.ready, slot)

    def ready(self, slot: Slot) -> Ready[Content]:
        """Return the slot's question, or the next usable one drawn for it.

        Raises VideoR1Error when MAX_DRAWS questions in a row cannot be used.
        """
        reason, check = "", " Check media_root and the files with: video-r1 data check MANIFEST"
        for attempt in range(MAX_DRAWS):
            index = self.draw(slot, attempt)
            if index in self.unusable:
                continue
            sample = self.samples[index]
            try:
                generator = self.generator("frame order", slot, attempt)
                return Ready(sample, self.build(sample, self.loaded(index), generator), attempt, slot)
            except (MediaError, PromptError) as error:
                self.set_aside(index, error)
                reason = f"; the last one: {error}"
                check = check if isinstance(error, MediaError) else ""
        raise VideoR1Error(
            f"none of {min(MAX_DRAWS, len(self.samples))} questions could be used{reason}. "
            f"All reasons are in {self.quarantine}.{check}"
        )

    def loaded(self, index: int) -> Loaded:
        """Return what was kept of a sample, or load it and keep it if there is room."""
        if index in self.kept:
            return self.kept[index]
        loaded = self.load(self.samples[index])
        size = tensor_bytes(loaded)
        with self.lock:
            if self.kept_bytes + size <= self.cache_bytes and index not in self.kept:
                self.kept[index] = loaded
                self.kept_bytes += size
        return loaded

    def draw(self, slot: Slot, attempt: int = 0) -> int:
        """Draw the index of a slot's sample. Attempts and rounds above 0 draw replacements."""
        if attempt == slot.round == 0:
            return self.order(slot.epoch)[slot.index]
        generator = self.generator("replacement", slot, attempt)
        return int(torch.randint(len(self.samples), (1,), generator=generator))

    def generator(self, purpose: str, slot: Slot, attempt: int) -> torch.Generator:
        further = () if slot.round == 0 else ("round", slot.round)
        return derived_generator(self.seed, purpose, slot.epoch, slot.index, attempt, *further)

    def set_aside(self, index: int, error: Unusable) -> None:
        with self.lock:
            if index in self.unusable:
                return
            self.unusable.add(index)
            if self.samples[index].problem_id not in self.listed:
                append_line(self.quarantine, quarantined(self.samples[index], error))


def with_shuffled_options(sample: Sample, generator: torch.Generator) -> Sample:
    """Draw the order of a sample's options, and adapt the solution's letter.

    Options keep their order where a text refers to them by letter or place ("A and B", "all of the above"),
    or where the row has a chat of its own, which contains them; a warning says so once.
    """
    marks = [option_prefix(option) for option in sample.options]
    letters = [mark.strip(" (.):") for mark in marks]
    texts = [option[len(mark) :] for option, mark in zip(sample.options, marks, strict=True)]
    if sample.answer not in letters:
        return sample
    if sample.messages or refers_to_options(sample.problem, texts, letters):
        warn_once("shuffle_options: questions that refer to their options by letter or place keep the order")
        return sample
    order = torch.randperm(len(marks), generator=generator).tolist()
    options = tuple(mark + texts[old] for mark, old in zip(marks, order, strict=True))
    letter = letters[order.index(letters.index(sample.answer))]
    return replace(sample, options=options, solution=f"<answer>{letter}</answer>")


_PLACES = re.compile(
    r"^\W*(both|neither|either|all|none|any)( (of )?(them|these|those|the (two|three|others?)))?\W*$"
    r"|\b(all|none|both|neither|either|any|each|one|two|most) (of )?(the |these |those )?"
    r"(above|below|following|others?|previous|preceding)\b"
    r"|\b(the|as|is|from|stated|mentioned|listed|shown|see|same) (above|below)\W*$"
    r"|\b(former|latter|aforementioned|options?|choices?|answers?|alternatives?|anteriores|ci-dessus|obigen?)\b"
    r"|以上|上述|上記|选项|两者|都[是不对]|выше",
    re.IGNORECASE,
)  # in an option
_NUMBERED = re.compile(
    r"\b(first|second|third|fourth|last|next) (option|choice|answer|alternative)", re.IGNORECASE
)


def refers_to_options(problem: str, options: Sequence[str], letters: Sequence[str]) -> bool:
    """Whether a question or one of its options (texts without letters) names options by letter or place."""
    others = "".join(letter for letter in letters if letter not in "AI") or "B"
    word = "[AI]"  # words of their own: letters only beside a mark or a conjunction, or alone
    named = re.compile(
        rf"(?<![\w'’.-])[{others}{others.lower()}](?![\w'’])|^\W*{word}\W*$|(?<!\w){word}\s*[).:;/&+,]"
        rf"|(?<!\w){word} (and|or|nor|&) "
        rf"|\b(and|or|nor|only|both|neither|either|than|option) \(?{word}(?!\w)(?! \w)"
    )
    return (
        any(map(named.search, [problem, *options]))
        or any(map(_PLACES.search, options))
        or bool(_NUMBERED.search(problem))
    )


def epoch_order(seed: int, samples: Sequence[Sample], epoch: int) -> list[int]:
    """Draw the order of an epoch, as indices of samples; a clip and its reversed twin stand together."""
    drawn = torch.randperm(len(samples), generator=derived_generator(seed, "epoch", epoch)).tolist()
    together: dict[object, list[int]] = {}
    for index in drawn:
        pair = pair_of(samples[index])
        together.setdefault(pair[0] if pair else (index,), []).append(index)
    return [index for indices in together.values() for index in indices]


def pair_of(sample: Sample) -> tuple[str, int] | None:
    """Return the name of a sample's pair and the number of its questions (`data pairs`); None without one."""
    match sample.extra.get("pairs"):
        case {"pair accuracy": [name, int(size)]}:
            return str(name), size
    return None


def tensor_bytes(value: Any) -> int:
    """Count the bytes of all tensors in a tensor, Media, Prompt, or a dict or tuple of these."""
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(tensor_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return 0
    return sum(map(tensor_bytes, value))
